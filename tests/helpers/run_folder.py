"""What is in a run folder."""

import json
from pathlib import Path
from typing import Any


def lines(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a file; any that is not valid JSON raises."""
    return [json.loads(text) for text in (run_dir / name).read_text().splitlines()]


def at(run_dir: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step-{step:08d}"
