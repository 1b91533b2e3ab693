"""What a checkpoint is and whether it is whole; with a second one, how the two differ.

Exit code 0: whole (and, of two, equal in every parameter). 1: damaged, or different. 2: there is no checkpoint, or
MYTHOS_CHECKPOINT_KEY_FILE names a key and it is not signed with it.
"""

import argparse
import json
import sys
from dataclasses import asdict

from mythos_dist.checkpoint.arguments import path
from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import EXIT_USER_ERROR, run_command

MAX_LINES = 100  # of tensors that differ


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=path, help="a run.dir (its newest checkpoint) or the folder of one checkpoint")
    add("other", type=path, nargs="?", help="a second one, to compare")
    add("--no-verify", action="store_true", help="look at sizes only, do not read every byte")
    add("--json", action="store_true", help="print everything as JSON")
    return parse_arguments(parser)


def main() -> None:
    """Inspect; see the top of this file for exit codes."""
    arguments = parse()
    from mythos_dist.checkpoint.describe import (
        REFUSED,
        counted,
        difference_line,
        differing_settings,
        differing_tensors,
        inspect,
        lines,
    )

    given = [arguments.checkpoint, *([arguments.other] if arguments.other else [])]
    both, about = zip(*(inspect(one, verify=not arguments.no_verify) for one in given), strict=True)
    damaged = any(one["damaged"] for one in about)
    refused = any(one["signature"] in REFUSED for one in about)
    settings = list(differing_settings(*both)) if len(both) == 2 else []
    tensors = list(differing_tensors(*both)) if len(both) == 2 and not damaged else []
    if arguments.json:
        found = [one if isinstance(one, str) else asdict(one) for one in tensors]
        print(json.dumps({"checkpoints": about, "settings": settings, "tensors": found}))
    else:
        for one in about:
            print("\n".join(lines(one)))
        for name, first, second in settings:
            print(f"  {difference_line(name, first, second)}")
        for one in tensors[:MAX_LINES]:
            print(f"  {one}")
        if len(tensors) > MAX_LINES:
            print(f"  and {len(tensors) - MAX_LINES} more")
        if len(both) == 2 and not damaged:
            differ = f"{counted(len(tensors), 'tensor')} {'differs' if len(tensors) == 1 else 'differ'}"
            print(differ if tensors else "every parameter is equal, bit for bit")
    sys.exit(EXIT_USER_ERROR if refused else 1 if damaged or tensors else 0)


if __name__ == "__main__":
    run_command(main)
