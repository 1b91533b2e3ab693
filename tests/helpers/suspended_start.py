"""Program: one start of a run, which suspends itself (SIGSTOP) just before its first rename to the name in argv[2].

argv[1] is the run folder. The renames are those of a real start: `writer.json`, `config.yaml`, `deepspeed.json`,
`metrics.jsonl`, `rollbacks.json`, a checkpoint of step 2, `latest`, `COMPLETED`.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.small_checkpoint import VALUES, manifest
from helpers.small_run import SMALL, TINY

from mythos_dist.checkpoint.manifest import LocalShard
from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.checkpoint.save import Saver
from mythos_dist.config.load import load_config
from mythos_dist.config.schema import CheckpointConfig
from mythos_dist.parallel.mesh import SINGLE
from mythos_dist.train.line_file import LineFile
from mythos_dist.train.run_folder import mark_completed, take_over, write_settings
from mythos_dist.train.spikes import Rollback, SpikeGuard


def run_start(run_dir: Path) -> None:
    """Do everything that renames a file of the run folder. Raises UserError if the run was started again since."""
    fence = take_over(run_dir)
    config = load_config(TINY, [*SMALL, f"run.dir={run_dir}"])
    write_settings(config, SINGLE, fence)
    metrics = LineFile(run_dir / "metrics.jsonl", fence)
    metrics.rewind(lambda line: line["step"] < 2)
    metrics.append({"step": 2, "start": fence.start})
    SpikeGuard(config.faults, [Rollback(2, 1, [fence.start], "a test")]).write(fence)
    values = {kind: torch.from_numpy(VALUES * fence.start) for kind in ("parameter", "exp_avg", "exp_avg_sq")}
    state = {"w": LocalShard(Piece.full((5, 12)), (5, 12), values, writes=True)}
    saver = Saver(run_dir / "checkpoints", CheckpointConfig(background=False), fence, state)
    saver.save(manifest(2, fence.start))
    fence.record_status("completed", "", 2)
    mark_completed(fence, config)


def suspend_before_rename(name: str) -> None:
    """Send this process SIGSTOP before its first rename to a file or folder called `name`."""
    waiting = [name]

    def watch(function):
        def watched(source, target, **options):
            if Path(target).name in waiting:
                waiting.clear()
                os.kill(os.getpid(), signal.SIGSTOP)
            return function(source, target, **options)

        return watched

    os.replace, os.rename = watch(os.replace), watch(os.rename)


if __name__ == "__main__":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    suspend_before_rename(sys.argv[2])
    run_start(Path(sys.argv[1]))
