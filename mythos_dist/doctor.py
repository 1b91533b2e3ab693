"""Check whether this machine is ready for training, and with a config what it would use here.

Starts no training and leaves nothing behind. Exit code 0: no problem. 1: problems, each with its remedy. 2: the config
is wrong.
"""

import argparse
import contextlib
import io
import json
import socket
import sys
from collections.abc import Iterator, Sequence

from mythos_dist import __version__
from mythos_dist.config.arguments import add_config, add_json_option, parse_arguments
from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError, run_command
from mythos_dist.ops.doctor.findings import Check, Finding
from mythos_dist.ops.doctor.machine import Machine
from mythos_dist.ops.doctor.machine_checks import MACHINE_CHECKS
from mythos_dist.ops.doctor.probe import Probe, join_group
from mythos_dist.progress import Bar
from mythos_dist.units import count


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="mythos doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config(parser, "a YAML file; without one only the machine is checked", optional=True)
    add_json_option(parser)
    return parser


def main() -> None:
    """Run all checks, print the findings and exit."""
    arguments = parse_arguments(build_parser())
    if arguments.overrides and not arguments.config:
        raise UserError(f"{arguments.overrides[0]} needs a config file before it, such as configs/1b.yaml")
    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    # Libraries print and warn while they are imported; what matters of it is among the findings. The bar keeps the
    # standard error that it begins with.
    with (
        Bar("checking", 1, unit=" checks") as shown,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        # A fact that cannot be read is reported by each check that needs it.
        findings = list(dict.fromkeys(Check("doctor", diagnose).run(config, shown)))
    problems, notes = (sum(one.status == status for one in findings) for status in ("problem", "note"))
    host = socket.gethostname()
    if arguments.json:
        report = {"version": __version__, "host": host, "config": arguments.config}
        report |= {"problems": problems, "notes": notes, "lines": [finding._asdict() for finding in findings]}
        print(json.dumps(report))
    else:
        print(f"mythos_dist {__version__} on {host}" + (f", {arguments.config}" if config else ""))
        print("\n".join(as_table(findings)))
        print(f"{count(problems, 'problem')}, {count(notes, 'note')}")
    sys.exit(1 if problems else 0)


def as_table(findings: Sequence[Finding]) -> list[str]:
    """A line per finding, with the remedy below it."""
    width = max(len(finding.topic) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"  {finding.status:<7}  {finding.topic:<{width}}  {finding.text}")
        if finding.remedy:
            lines.append(f"  {'':7}  {'':{width}}  -> {finding.remedy}")
    return lines


def diagnose(config: Config | None, shown: Bar) -> Iterator[Finding]:
    """All findings about this machine, and with a config about what it would use. `shown`: counts the checks."""
    shown.describe("importing torch")
    with contextlib.suppress(Exception):  # checks that need torch report why it fails
        import torch  # noqa: F401 - imported once here instead of in the probe, too
    machine = Machine(Probe(join_group))
    yield from _run(MACHINE_CHECKS, shown, machine)
    if config:
        # Imports what training does: if that fails, it is a finding after those about the machine.
        from mythos_dist.ops.doctor.config_checks import config_checks

        yield from _run(config_checks(config), shown, machine, config)


def _run(checks: Sequence[Check], shown: Bar, *arguments: object) -> Iterator[Finding]:
    before = shown.done
    for done, check in enumerate(checks):
        shown.show(before + done, before + len(checks))
        shown.describe(check.topic)
        yield from check.run(*arguments)
    shown.show(before + len(checks))


if __name__ == "__main__":
    run_command(main)
