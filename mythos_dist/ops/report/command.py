"""`mythos report`, and the report that a run writes at its end."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mythos_dist.errors import UserError
from mythos_dist.files import make_folders, os_user_error, real_path, valid_unicode, write_atomically
from mythos_dist.ops.report.page import render
from mythos_dist.ops.report.run import RunReport, read_run
from mythos_dist.progress import Bar

FILE = "report.html"


def write_report(folders: Sequence[Path], out: Path, refresh: int | None = None, quiet: bool = True) -> list[RunReport]:
    """Write the page of the runs in `folders` to `out`, with a bar unless `quiet`.

    Raises UserError with all problems.
    """
    reports, problems = [], []
    files = [folder / "metrics.jsonl" for folder in folders]
    size = sum(file.stat().st_size for file in files if file.is_file())
    with Bar("reading", size, quiet=quiet) as shown:
        for folder, name in zip(folders, distinct_names(folders), strict=True):
            try:
                reports.append(read_run(folder, name, shown.update))
            except UserError as error:
                problems += error.problems
            except OSError as error:
                problems += os_user_error(error, folder, "cannot be read").problems
    if problems:
        raise UserError(problems)
    try:
        write_atomically(out, valid_unicode(render(reports, refresh)))
    except OSError as error:
        raise os_user_error(error, out) from None
    return reports


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = [real_path(folder).parts for folder in folders]
    longest = max(map(len, parts))
    for n in range(1, longest + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i})" for i, name in enumerate(("/".join(part[-1:]) for part in parts), 1)]


def run(folders: Sequence[Path], out: Path | None, watch: int | None) -> None:
    """Write the report once, or every `watch` seconds until the runs end or Ctrl-C. Raises UserError."""
    if out is not None:
        make_folders(out.parent)
    out = out or folders[0] / FILE
    while True:
        reports = write_report(folders, out, watch, quiet=False)
        running = [report.name for report in reports if report.state == "running"]
        if watch is None or not running:
            print(out)
            return
        steps = "  ".join(f"{report.name}: {report.state}, step {last_step(report)}" for report in reports)
        print(f"{out}  {steps}; again in {watch} s", file=sys.stderr, flush=True)
        time.sleep(watch)


def last_step(report: RunReport) -> int:
    """0 before the first one."""
    return int(report.metrics.columns["step"][-1]) if len(report.metrics) else 0
