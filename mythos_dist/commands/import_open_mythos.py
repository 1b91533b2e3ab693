"""Start a run from OpenMythos' weights: write them as the checkpoint of step 0, which any layout can load.

mythos import open-mythos open_mythos.pt configs/1b.yaml model.mode=reference run.dir=runs/from-open-mythos
torchrun … -m mythos_dist.train configs/1b.yaml model.mode=reference run.dir=runs/from-open-mythos
"""

import argparse

from mythos_dist.config.arguments import add_config, add_print_options, nonempty_path, parse_arguments, print_result
from mythos_dist.errors import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("weights", type=nonempty_path, help="a state dict: a .pt file, a .safetensors file, or a folder of the latter")
    add_config(parser, "the YAML file of the new run; its model.* must fit the weights")
    add_print_options(parser)
    return parser


def main() -> None:
    """Import. Exit code 0, or 2 for a usage or input error."""
    arguments = parse_arguments(build_parser())
    from mythos_dist.checkpoint.open_mythos import import_open_mythos
    from mythos_dist.config.load import load_config
    from mythos_dist.progress import Bar

    config = load_config(arguments.config, arguments.overrides)
    with Bar("importing", quiet=arguments.quiet) as shown:
        folder = import_open_mythos(arguments.weights, config, shown.update)
    text = f"{arguments.weights} -> {folder}; train with run.dir={config.run.dir} to start from it"
    print_result(arguments, text, (), weights=arguments.weights, out=folder)


if __name__ == "__main__":
    run_command(main)
