"""Describe a checkpoint and check its integrity; with a second checkpoint, list the differences.

Exit code 0: intact (and, with two, every parameter is equal). 1: damaged, or different. 2: no checkpoint, or
MYTHOS_CHECKPOINT_KEY_FILE names a key and the checkpoint is not signed with it.
"""

import argparse
import json
import sys
from dataclasses import asdict

from mythos_dist.config.arguments import CHECKPOINT_HELP, add_json_option, location, parse_arguments
from mythos_dist.errors import EXIT_USER_ERROR, run_command

MAX_LINES = 100  # tensors that differ


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=location, help=CHECKPOINT_HELP)
    add("other", type=location, nargs="?", help="a second checkpoint to compare with")
    add("--no-verify", action="store_true", help="check file sizes only, not hashes")
    add_json_option(parser)
    return parser


def main() -> None:
    """Inspect; see the top of this file for exit codes."""
    arguments = parse_arguments(build_parser())
    from mythos_dist.checkpoint.describe import (
        REFUSED,
        difference_line,
        differing_settings,
        differing_tensors,
        inspect,
        summary_lines,
    )
    from mythos_dist.units import count

    paths = [arguments.checkpoint, arguments.other] if arguments.other else [arguments.checkpoint]
    inspected = [inspect(path, verify=not arguments.no_verify, quiet=False) for path in paths]
    checkpoints = [checkpoint for checkpoint, _ in inspected]
    summaries = [summary for _, summary in inspected]
    damaged = any(summary["damaged"] for summary in summaries)
    refused = any(summary["signature"] in REFUSED for summary in summaries)
    compared = len(paths) == 2 and not damaged
    settings = list(differing_settings(*checkpoints)) if len(paths) == 2 else []
    tensors = list(differing_tensors(*checkpoints)) if compared else []
    if arguments.json:
        differences = [tensor if isinstance(tensor, str) else asdict(tensor) for tensor in tensors]
        print(json.dumps({"checkpoints": summaries, "settings": settings, "tensors": differences}))
    else:
        for summary in summaries:
            print("\n".join(summary_lines(summary)))
        for name, first_value, second_value in settings:
            print(f"  {difference_line(name, first_value, second_value)}")
        for tensor in tensors[:MAX_LINES]:
            print(f"  {tensor}")
        if len(tensors) > MAX_LINES:
            print(f"  and {len(tensors) - MAX_LINES} more")
        if compared and tensors:
            print(f"{count(len(tensors), 'tensor')} {'differs' if len(tensors) == 1 else 'differ'}")
        elif compared:
            print("every parameter is equal, bit for bit")
    sys.exit(EXIT_USER_ERROR if refused else 1 if damaged or tensors else 0)


if __name__ == "__main__":
    run_command(main)
