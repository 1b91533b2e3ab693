"""Verify that a folder of shards, or its copy in a store, is complete and undamaged: after a copy or before a long run.

Reads every byte once, writes nothing. Exit code 0: all good. 1: problems found. 2: no such folder, an unfinished
conversion, or a store that cannot be reached.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from mythos_dist.config.arguments import parse_arguments, path_text
from mythos_dist.errors import UserError, exit_with, run_command
from mythos_dist.units import count
from mythos_dist.urls import is_url

if TYPE_CHECKING:
    from mythos_dist.prepare.verify import VerifyReport

MAX_LINES = 100  # of bad shards that are printed
ADVICE = "copy these files there again from their source, or delete the folder and run `mythos shards` again"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=path_text, metavar="DIR", help="folder of shards, with manifest.json, or its URL")
    add("--workers", type=int, help="worker processes; 0: none (default: one per core, at least 8 for a URL)")
    add("--json", action="store_true", help="print the report as JSON on standard output")
    add("--quiet", action="store_true", help="print problems only")
    return parser


def main() -> None:
    """Verify; the exit code is 0, 1 for problems, 2 if there is nothing to verify, or 130 after Ctrl-C."""
    arguments = parse_arguments(build_parser())
    from mythos_dist.prepare.verify import verify

    try:
        report = verify(arguments.folder, workers=workers_of(arguments), quiet=arguments.quiet)
    except UserError as error:
        exit_with(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    if arguments.json:
        print(json.dumps({"ok": report.ok, **asdict(report)}))
    elif not (arguments.quiet and report.ok):
        print("\n".join(lines(report)))
    sys.exit(0 if report.ok else 1)


def workers_of(arguments: argparse.Namespace) -> int:
    """Worker processes; each reads one shard at a time, and those of a store mostly wait for it."""
    if arguments.workers is not None:
        return arguments.workers
    cores = len(os.sched_getaffinity(0))
    return max(8, cores) if is_url(arguments.folder) else cores


def lines(report: "VerifyReport") -> list[str]:
    """The report as text: remarks, problems, and a summary with advice."""
    totals = {"shard": report.shards, "window": report.windows, "token": report.tokens}
    total = ", ".join([*(count(number, noun) for noun, number in totals.items()), f"{report.bytes / 1e9:.3f} GB"])
    remarks = [f"remark: {remark}" for remark in report.remarks]
    if report.ok:
        return [*remarks, f"{total}: all good"]
    bad = [f"{one['shard']}: {'; '.join(one['problems'])}" for one in report.bad]
    more = [f"and {len(bad) - MAX_LINES:,} more"] if len(bad) > MAX_LINES else []
    summary = (
        f"{total}: {count(len(bad), 'bad shard')}, {count(len(report.problems), 'problem')} of the folder; {ADVICE}"
    )
    return [*remarks, *report.problems, *bad[:MAX_LINES], *more, summary]


if __name__ == "__main__":
    run_command(main)
