"""Demo, minutes on a CPU: text -> shards -> train on 4 ranks -> kill -> resume with another layout -> generate text."""

import argparse

from mythos_dist.config.arguments import integer, parse_arguments
from mythos_dist.errors import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    stop_at = integer(1, 99)  # of the 100 steps in configs/demo.yaml
    parser.add_argument("--stop-at", type=stop_at, default=50, help="kill the first run after this step (%(default)s)")
    return parser


def main() -> None:
    """Run the demo in the current folder."""
    arguments = parse_arguments(build_parser())
    from mythos_dist.ops.demo import run_demo

    run_demo(arguments.stop_at)


if __name__ == "__main__":
    run_command(main)
