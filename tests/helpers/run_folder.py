"""What is in a run folder."""

import json
import shutil
from pathlib import Path
from typing import Any


def lines(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a file; any that is not valid JSON raises."""
    return [json.loads(text) for text in (run_dir / name).read_text().splitlines()]


def at(run_dir: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def copy_until(run_dir: Path, step: int, to: Path) -> Path:
    """A copy of a run as it was after the checkpoint of a step, but with the lines of later steps, as a kill leaves
    some: the next start removes them."""
    shutil.copytree(run_dir, to)
    for checkpoint in (to / "checkpoints").glob("step-*"):
        if checkpoint.name > at(to, step).name:
            shutil.rmtree(checkpoint)
    (to / "checkpoints" / "latest").write_text(at(to, step).name)
    (to / "COMPLETED").unlink(missing_ok=True)
    return to
