"""Write a checkpoint: DeepSpeed's ZeRO files and what they lack, in a temporary folder that is renamed when complete.

checkpoints/step-00000010/ holds DeepSpeed's files and checkpoint.json; checkpoints/latest names the newest one.
A run that is killed while it saves leaves a `.tmp` folder that nobody reads.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

META_FILE = "checkpoint.json"


def save_checkpoint(engine: Any, checkpoints: Path, step: int, meta: dict[str, Any], keep: int) -> None:
    """Save under `checkpoints` after `step` steps and delete all but the `keep` newest. Every rank calls this.

    engine: DeepSpeed's. meta: JSON values that `read_meta` gives back, with the layout that can load the files.
    """
    rank = dist.get_rank()
    name = f"step-{step:08d}"
    temporary = checkpoints / f"{name}.tmp"
    if rank == 0:
        checkpoints.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(str(checkpoints), tag=temporary.name, save_latest=False)
    dist.barrier()  # all files are there
    if rank == 0:
        (temporary / META_FILE).write_text(json.dumps({"step": step, **meta}, indent=2) + "\n")
        shutil.rmtree(checkpoints / name, ignore_errors=True)
        temporary.rename(checkpoints / name)
        pointer = checkpoints / "latest.tmp"
        pointer.write_text(name + "\n")
        pointer.replace(checkpoints / "latest")
        for old in sorted(checkpoints.glob("step-????????"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
