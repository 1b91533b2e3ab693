"""Write a report of one run, or a comparison of several, as one HTML page that opens anywhere.

    mythos report runs/demo
    mythos report runs/a runs/b --out comparison.html
    mythos report runs/first --watch

Losses, learning rate, gradient norm, speed, planned against measured values, load of the experts, telemetry of the
loops, restarts with their reasons, checkpoints, data, settings and their differences. It needs no GPU, and works while
a run is active; --watch writes it again until the run ends, and a browser that shows it reads it again.
"""

import argparse
from pathlib import Path

from mythos_dist.config.arguments import integer, nonempty_path, parse_arguments
from mythos_dist.errors import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", type=nonempty_path, nargs="+", metavar="RUN", help="a run.dir")
    add("--out", type=Path, help="the page (default: report.html in the first RUN)")
    add(
        "--watch",
        type=integer(1, 86400),
        nargs="?",
        const=30,
        metavar="SECONDS",
        help="write it again every 30 s, or SECONDS, until the runs end",
    )
    return parser


def main() -> None:
    """Write the page; the exit code is 0, or 2 for a user error."""
    arguments = parse_arguments(build_parser())

    from mythos_dist.ops.report.command import run

    run(arguments.runs, arguments.out, arguments.watch)


if __name__ == "__main__":
    run_command(main)
