"""Export a checkpoint's weights, from any layout, as safetensors, with the tokenizer.

    safetensors   our names: model = Mythos.from_pretrained("OUT")
    hf            AutoModelForCausalLM.from_pretrained("OUT", trust_remote_code=True)
    open_mythos   the names of OpenMythos' class: OpenMythos(config).load_state_dict(..., strict=False)
    deepspeed-universal   weights and Adam's moments for engine.load_checkpoint("OUT") with load_universal

Needs no GPU; one tensor is in memory at a time.
"""

import argparse

from mythos_dist.config.arguments import (
    CHECKPOINT_HELP,
    add_export_options,
    add_write_options,
    location,
    nonempty_path,
    number,
    parse_arguments,
)
from mythos_dist.errors import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=location, help=CHECKPOINT_HELP)
    add_export_options(parser)
    add(
        "--format",
        choices=("safetensors", "hf", "open_mythos", "deepspeed-universal"),
        default="safetensors",
        help="for which class (%(default)s)",
    )
    add("--average", action="store_true", help="the average of the weights that the run keeps (average.kind)")
    add(
        "--file-size",
        type=number(1e-5, 1e4),
        default=5.0,
        metavar="GB",
        help="largest file (%(default)s; deepspeed-universal: one per tensor)",
    )
    add(
        "--prefix",
        default="",
        help="of parameter names (deepspeed-universal), such as model. if your module holds Mythos so",
    )
    add("--tokenizer", type=nonempty_path, help="tokenizer file (default: that of the training shards)")
    add_write_options(parser, workers=2)
    return parser


def main() -> None:
    """Export. Exit code 0, or 2 for a usage or input error."""
    arguments = parse_arguments(build_parser())
    from mythos_dist.train.export_command import run  # imports torch

    run(arguments)


if __name__ == "__main__":
    run_command(main)
