"""Continue a training of DeepSpeed's here: write its universal checkpoint as the one that a run resumes from.

python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder global_step9 --output_folder new
mythos import deepspeed new configs/1b.yaml run.dir=runs/from-deepspeed
torchrun … -m mythos_dist.train configs/1b.yaml run.dir=runs/from-deepspeed

The module that DeepSpeed trained is Mythos, or holds one. Nothing in the files is run. Needs no GPU; one tensor is in
memory at a time.
"""

import argparse

from mythos_dist.config.arguments import add_config, add_print_options, nonempty_path, parse_arguments, print_result
from mythos_dist.errors import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=nonempty_path, help="a universal checkpoint, or the folder with latest_universal")
    add_config(parser, "the YAML file of the run; its model.* must fit the weights")
    add_print_options(parser)
    return parser


def main() -> None:
    """Import. Exit code 0, or 2 for a usage or input error."""
    arguments = parse_arguments(build_parser())
    from mythos_dist.checkpoint.universal_import import import_universal
    from mythos_dist.config.load import load_config
    from mythos_dist.progress import Bar

    config = load_config(arguments.config, arguments.overrides)
    notes: list[str] = []
    with Bar("importing", quiet=arguments.quiet) as shown:
        folder = import_universal(arguments.folder, config, shown.update, notes.append)
    text = f"{arguments.folder} -> {folder}; train with run.dir={config.run.dir} to continue from it"
    print_result(arguments, text, notes, folder=arguments.folder, out=folder)


if __name__ == "__main__":
    run_command(main)
