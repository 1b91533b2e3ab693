"""How a run is doing: running, finished, requeued, stopped, hung or dead; with its step, loss, speed and time to go.

Asks the run folder and, if the run is a SLURM job, squeue; no rank is disturbed. Exit code 1: it is hung or dead, 2:
there is no run in the folder, 0: all is in order.
"""

import argparse
import dataclasses
import json
import sys
import time

from mythos_dist.config.arguments import number, parse_arguments, path_text
from mythos_dist.errors import run_command
from mythos_dist.ops.cluster.status import PATIENCE, format_status, read_status


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run_dir", type=path_text, help="run.dir of the run")
    add("--json", action="store_true", help="print one line of JSON")
    seconds = number(0, 10**6, above=True)
    add("--watch", type=seconds, nargs="?", const=10.0, metavar="SECONDS", help="again every so often (%(const)g s)")
    patience = "without a step, no hang yet (%(default)g)"
    add("--patience", type=seconds, default=PATIENCE, metavar="SECONDS", help=patience)
    return parse_arguments(parser)


def main() -> None:
    """Look once or, with --watch, until the run has ended and no job of it is left that could start it again."""
    arguments = parse()
    while True:
        status = read_status(arguments.run_dir, arguments.patience)
        lines = [json.dumps(dataclasses.asdict(status))] if arguments.json else format_status(status)
        if arguments.watch and not arguments.json:
            lines.insert(0, time.strftime("%F %T"))
        print("\n".join(lines), flush=True)
        ended = status.state == "finished" or (status.state in ("stopped", "dead") and not status.job_state)
        if not arguments.watch or ended:
            sys.exit(status.exit_code)
        time.sleep(arguments.watch)


if __name__ == "__main__":
    run_command(main)
