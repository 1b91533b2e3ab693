"""Continue a training of DeepSpeed's here: write its universal checkpoint as the one that a run resumes from.

python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder global_step9 --output_folder new
python tools/import_deepspeed.py new configs/1b.yaml run.dir=runs/from-deepspeed
torchrun … -m mythos_dist.train configs/1b.yaml run.dir=runs/from-deepspeed

The module that DeepSpeed trained is Mythos, or holds one. Nothing in the files is run. Needs no GPU; one tensor is in
memory at a time.
"""

import argparse
import sys

from mythos_dist.config.arguments import add_config, nonempty_path, parse_arguments
from mythos_dist.errors import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=nonempty_path, help="a universal checkpoint, or the folder with latest_universal")
    add_config(parser, "the YAML file of the run; its model.* must fit the weights")
    add("--quiet", action="store_true", help="print only errors")
    return parser


def main() -> None:
    """Import. Exit code 0, or 2 for a usage or input error."""
    arguments = parse_arguments(build_parser())
    from mythos_dist.checkpoint.progress import bar
    from mythos_dist.checkpoint.universal_import import import_universal
    from mythos_dist.config.load import load_config

    config = load_config(arguments.config, arguments.overrides)
    notes: list[str] = []
    with bar("importing", quiet=arguments.quiet) as shown:
        folder = import_universal(arguments.folder, config, shown.update, notes.append)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if not arguments.quiet:
        print(f"{arguments.folder} -> {folder}; train with run.dir={config.run.dir} to continue from it")


if __name__ == "__main__":
    run_command(main)
