"""Show whether a run is running, completed, requeued, stopped, hung or dead, with its step, loss, speed and ETA.

Reads the run folder and, for a SLURM job, squeue; it does not contact the ranks. Exit codes: 1 the run is hung or dead;
2 there is no run in the folder; 0 otherwise.
"""

import argparse
import dataclasses
import json
import sys
import time

from mythos_dist.config.arguments import number, parse_arguments, path_text
from mythos_dist.errors import run_command
from mythos_dist.ops.cluster.status import PATIENCE, format_status, read_status


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run_dir", type=path_text, help="run.dir of the run")
    add("--json", action="store_true", help="print one line of JSON")
    seconds = number(0, 10**6, above=True)
    add("--watch", type=seconds, nargs="?", const=10.0, metavar="SECONDS", help="repeat every SECONDS (%(const)g)")
    patience_help = "time without a step after which the run may be hung (%(default)g)"
    add("--patience", type=seconds, default=PATIENCE, metavar="SECONDS", help=patience_help)
    return parser


def main() -> None:
    """Print the status once or, with --watch, until the run has ended and no SLURM job can restart it."""
    arguments = parse_arguments(build_parser())
    while True:
        status = read_status(arguments.run_dir, arguments.patience)
        lines = [json.dumps(dataclasses.asdict(status))] if arguments.json else format_status(status)
        if arguments.watch and not arguments.json:
            lines.insert(0, time.strftime("%F %T"))
        print("\n".join(lines), flush=True)
        ended = status.state == "completed" or (status.state in ("stopped", "dead") and not status.job_state)
        if not arguments.watch or ended:
            sys.exit(status.exit_code)
        time.sleep(arguments.watch)


if __name__ == "__main__":
    run_command(main)
