"""What a run tells: one line a step in metrics.jsonl, on the console and in wandb, all from rank 0.

Lines of steps behind the checkpoint that a run resumes from are cut off: each step stands in the file once.
"""

import hashlib
import logging
import math
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from mythos_dist.checkpoint.fence import Fence
from mythos_dist.config.schema import Config
from mythos_dist.files import get_number
from mythos_dist.model.flops import train_flops_per_token
from mythos_dist.parallel.process import DTYPES
from mythos_dist.train.depth import HeldOut, draw_curves
from mythos_dist.train.engine import StepResult
from mythos_dist.train.line_file import FILES, LineFile
from mythos_dist.units import short

log = logging.getLogger(__name__)

# Dense bf16 peak in TFLOP/s by a part of the device's name, from NVIDIA's data sheets.
_GPU_PEAKS = {"H200": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "B200": 2250.0}


def batch_id(sample_ids: Sequence[int]) -> str:
    """Hash of a global batch's sample ids, whatever their order: the same at every layout."""
    return hashlib.sha256(",".join(map(str, sorted(sample_ids))).encode()).hexdigest()[:16]


def peak_flops(config: Config) -> float:
    """FLOP/s that one rank could reach: as set, by the GPU's name, or measured on a CPU while all ranks measure."""
    if config.run.peak_tflops is not None:
        return config.run.peak_tflops * 1e12
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return next((peak * 1e12 for part, peak in _GPU_PEAKS.items() if part in name), math.nan)
    dtype = DTYPES[config.train.dtype]
    a, b = (torch.ones(1024, 1024, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    begin, products = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.3:
        torch.mm(a, b)
        products += 1
    return products * 2 * 1024**3 / (time.perf_counter() - begin)


def step_line(config: Config, step: int, result: StepResult, ids: list[int], seconds: float, peak: float) -> dict:
    """A line of metrics.jsonl; `peak` is the FLOP/s of all ranks together."""
    tokens = config.train.global_batch * config.train.seq_len
    flops = train_flops_per_token(config.model, config.train.seq_len, result.n_loops) * tokens
    load = result.expert_counts.sum(0).double()
    return {
        "step": step,
        "time": time.time(),
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "n_loops": result.n_loops,
        "backprop": result.backprop,
        **({"mean_loops": result.mean_loops} if config.loops.per == "sequence" else {}),
        "tokens": step * tokens,
        "batch_id": batch_id(ids),
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": flops / seconds / peak,
        "objective": result.objective,
        "expert_load_max": float(load.max() / load.mean()),
        "experts_idle": int((load == 0).sum()),
        "skipped": result.skipped,
        **({"communication": result.communication} if result.communication is not None else {}),
    }


class Metrics:
    """Rank 0's writer. `step` writes a training step's line, `held_out` one of eval.jsonl."""

    def __init__(self, config: Config, run_dir: Path, resumed_step: int, fence: Fence | None = None):
        """Cut off lines behind `resumed_step` and open wandb. Raises OSError, and UserError if `fence` is not the
        newest start's."""
        self.total_steps = config.train.steps
        self.mean_loops = config.loops.mean_of(config.model)
        self.run_dir, self.fence = run_dir, fence
        self._files = {name: LineFile(run_dir / name, fence) for name in FILES}
        self.rewind(resumed_step)
        self.wandb = _start_wandb(config, run_dir)

    def rewind(self, step: int) -> None:
        """Drop the lines of the steps behind `step`: they come again."""
        last = step or -1  # from the start, even the loss before step 1 comes anew

        def keep(line: dict[str, Any]) -> bool | None:
            at = get_number(line, "step")
            return None if at is None else at <= last

        for file in self._files.values():
            file.rewind(keep)

    def step(self, line: dict[str, Any]) -> None:
        """Append a step's line and show it."""
        self._write("metrics.jsonl", line)
        skipped = f"  {line['decision']}" if "decision" in line else ""
        print(
            f"step {line['step']}/{self.total_steps}  loss {line['loss']:.3f}  grad_norm {line['grad_norm']:.2f}  "
            f"lr {line['lr']:.1e}  tokens/s {short(line['tokens_per_second'])}  mfu {100 * line['mfu']:.1f}%  "
            f"expert_load_max {line['expert_load_max']:.1f}x{skipped}",
            flush=True,
        )

    def held_out(self, step: int, found: HeldOut, curve: dict[int, HeldOut]) -> None:
        """Append what was measured on held-out data after `step` steps, `curve` by the number of loops."""
        by_loops = {str(n): one._asdict() for n, one in curve.items()}
        line = {"step": step, "heldout_loss": found.loss, "accuracy": found.accuracy}
        written = self._write("eval.jsonl", line | ({"by_loops": by_loops} if curve else {}))
        perplexity = math.exp(found.loss) if found.loss < 700 else math.inf  # exp(710) overflows
        print(
            f"step {step}/{self.total_steps}  held-out loss {found.loss:.3f}  perplexity {perplexity:.1f}",
            flush=True,
        )
        if curve:
            losses = "  ".join(f"{n}: {one.loss:.3f}" for n, one in curve.items())
            print(f"step {step}/{self.total_steps}  held-out loss by loops  {losses}", flush=True)
            try:
                if written:
                    draw_curves(self.run_dir / "loops.png", {"held out": curve}, self.mean_loops)
            except OSError as error:
                log.warning("loops.png cannot be written (%s)", error.strerror)

    def to_disk(self) -> None:
        """Before a checkpoint: lines of the steps in it must not be lost when it is not. What fails costs a warning."""
        for file in self._files.values():
            try:
                file.to_disk()
            except OSError as error:
                log.warning("%s: %s", file.file, error.strerror)

    def flush(self) -> None:
        """Write what could not be written before. Raises OSError, and UserError as `__init__`."""
        for file in self._files.values():
            file.flush()
        self.to_disk()

    def close(self) -> None:
        """End the wandb run."""
        for file in self._files.values():
            file.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _write(self, name: str, line: dict[str, Any]) -> bool:
        """Returns False if the run was started again since: nothing is written then."""
        # JSON has no NaN or infinity: a number that is none of its kind becomes null.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        if not self._files[name].append(finite):
            return False
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])
        return True


def _start_wandb(config: Config, run_dir: Path):
    """A wandb run, or None. Offline never touches the network; online falls back to it when there is none."""
    mode = os.environ.get("WANDB_MODE", config.run.wandb)
    if mode == "disabled":
        return None
    import wandb

    if mode == "online" and not _reaches("api.wandb.ai"):
        log.warning("wandb: api.wandb.ai cannot be reached; this run is recorded offline (later: wandb sync)")
        mode = "offline"
    run_id = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]  # a resumed run is the same run

    def start(mode: Literal["online", "offline"]):
        return wandb.init(
            mode=mode,
            project="mythos_dist",
            name=run_dir.name,
            id=run_id,
            resume="allow",
            dir=run_dir,
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=30),
        )

    if mode == "online":
        try:
            return start("online")
        except wandb.Error as error:  # not logged in, or the server does not answer
            log.warning("wandb: %s; this run is recorded offline (later: wandb sync)", error)
    return start("offline")


def _reaches(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return False
    return True
