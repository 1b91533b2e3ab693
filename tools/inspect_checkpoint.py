"""What a checkpoint is and whether it is whole; with a second one, how the two differ.

Exit code 0: whole (and, of two, equal in every parameter). 1: damaged, or different. 2: there is no checkpoint.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from mythos_dist.errors import UserError, exit_with, run_command

MAX_LINES = 100  # of tensors that differ


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a run.dir (its newest checkpoint) or the folder of one checkpoint")
    add("other", type=Path, nargs="?", help="a second one, to compare")
    add("--no-verify", action="store_true", help="look at sizes only, do not read every byte")
    add("--json", action="store_true", help="print everything as JSON")
    return parser.parse_args()


def main() -> None:
    """Inspect; see the top of this file for exit codes."""
    arguments = parse()
    from mythos_dist.checkpoint.describe import differing_settings, differing_tensors, facts, lines
    from mythos_dist.checkpoint.manifest import damage
    from mythos_dist.checkpoint.restore import open_checkpoint

    try:
        both = [open_checkpoint(path) for path in (arguments.checkpoint, arguments.other) if path]
        told = [
            facts(one, damage(one.folder, one.manifest, list(one.manifest.files), hashes=not arguments.no_verify))
            for one in both
        ]
        damaged = any(one["damaged"] for one in told)
        settings = list(differing_settings(*both)) if len(both) == 2 else []
        tensors = list(differing_tensors(*both)) if len(both) == 2 and not damaged else []
    except UserError as error:
        exit_with(error)
    if arguments.json:
        found = [one if isinstance(one, str) else asdict(one) for one in tensors]
        print(json.dumps({"checkpoints": told, "settings": settings, "tensors": found}))
    else:
        for one in told:
            print("\n".join(lines(one)))
        for name, first, second in settings:
            print(f"  {name}: {first} | {second}")
        for one in tensors[:MAX_LINES]:
            words = (
                f"{one.name}: up to {one.largest:.3g} apart, {one.relative:.3g} of its norm"
                if not isinstance(one, str)
                else one
            )
            print(f"  {words}")
        if len(tensors) > MAX_LINES:
            print(f"  and {len(tensors) - MAX_LINES} more")
        if len(both) == 2 and not damaged:
            print(f"{len(tensors)} tensors differ" if tensors else "every parameter is equal, bit for bit")
    sys.exit(1 if damaged or tensors else 0)


if __name__ == "__main__":
    run_command(main)
