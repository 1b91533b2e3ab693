"""Metrics: one line per step in metrics.jsonl, on the console and in other sinks (sinks.py), all written by rank 0.

A run that resumes removes the lines of the steps after its checkpoint, so each step is in the file once.
"""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mythos_dist.checkpoint.fence import Fence
from mythos_dist.checkpoint.manifest import Lineage
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.files import get_number, write_atomically
from mythos_dist.model.flops import train_flops_per_token
from mythos_dist.parallel.process import DTYPES
from mythos_dist.parallel.traffic import Totals
from mythos_dist.train.evaluation import Evaluation, draw_curves
from mythos_dist.train.global_batch import tokens_at
from mythos_dist.train.line_file import FILES, LineFile
from mythos_dist.train.schedule import Phase
from mythos_dist.train.sinks import Sinks
from mythos_dist.units import count, short

log = logging.getLogger(__name__)

EXPERT_LOAD = "expert_load.json"
SHOWN_WAIT = 0.2  # seconds that a step waits for data, at least, if the console shows it

# Dense bf16 peak in TFLOP/s by a substring of the device's name, from NVIDIA's data sheets.
_GPU_PEAKS = {"H200": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "B200": 2250.0}


@dataclass
class StepResult:
    """What a training step has measured; equal on all ranks."""

    loss: float  # cross entropy, mean over the global batch's tokens, nats
    objective: float  # what was differentiated: loss plus auxiliary losses
    grad_norm: float  # global, before clipping
    lr: float
    phase: Phase  # of the learning rate
    n_loops: int
    backprop: int  # loops with gradient
    mean_loops: float  # over the sequences, if each has its own number of loops
    expert_counts: Tensor  # (n_loops, loop_layers * E) int64 on the CPU: tokens of the global batch
    skipped: bool  # the optimizer did not step
    communication: Totals | None  # bytes of all ranks' messages, by axis and kind; None: not counted


def batch_id(sample_ids: Sequence[int]) -> str:
    """Hash of a global batch's sample ids, independent of their order, so equal at every layout."""
    return hashlib.sha256(",".join(map(str, sorted(sample_ids))).encode()).hexdigest()[:16]


def peak_flops(config: Config) -> float:
    """Peak FLOP/s of one rank: as set; of a GPU dense bf16 by its name, nan if the name is unknown; of CPUs measured in
    `train.dtype`, shared by the node's ranks."""
    if config.run.peak_tflops is not None:
        return config.run.peak_tflops * 1e12
    if torch.cuda.is_available():
        device_name = torch.cuda.get_device_name()
        for name, tflops in _GPU_PEAKS.items():
            if name in device_name:
                return tflops * 1e12
        return math.nan
    threads = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * torch.get_num_threads()  # of all ranks on this node
    return _cpu_flops(DTYPES[config.train.dtype]) * min(1.0, len(os.sched_getaffinity(0)) / threads)


def _cpu_flops(dtype: torch.dtype) -> float:
    """FLOP/s of this process's threads: the fastest matrix product of 0.3 s.

    The mean depends on what else the machine does: with 20 other processes on two cores it was 10 times lower than the
    best. A small product ends before another process gets the core; only a large one occupies many threads.
    """
    best = 0.0
    for size in (384, 1024):
        a = torch.ones(size, size, dtype=dtype)
        torch.mm(a, a)
        end = time.perf_counter() + 0.15
        while (began := time.perf_counter()) < end:
            torch.mm(a, a)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def step_line(
    config: Config, lineage: Lineage, step: int, result: StepResult, ids: list[int], seconds: float, peak: float
) -> dict:
    """A line of metrics.jsonl; `peak` is the peak FLOP/s of all ranks together."""
    size, done = config.train.batch_size_at(lineage.first_step + step), tokens_at(config, lineage, step)
    tokens = size * config.train.seq_len
    no_grad = result.n_loops - result.backprop
    flops = train_flops_per_token(config.model, config.train.seq_len, result.n_loops, no_grad) * tokens
    load = result.expert_counts.sum(0).double()
    line = {
        "step": step,
        "time": time.time(),
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "phase": result.phase,
        "n_loops": result.n_loops,
        "backprop": result.backprop,
        "tokens": done,
        "tokens_total": lineage.tokens_before + done,
        "batch_id": batch_id(ids),
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": flops / seconds / peak,
        "objective": result.objective,
        "expert_load_max": float(load.max() / load.mean()),
        "experts_idle": int((load == 0).sum()),
        "skipped": result.skipped,
    }
    if lineage.first_step:
        line["schedule_step"] = lineage.first_step + step
    if config.run.stage:
        line["stage"] = config.run.stage
    if config.train.batch_ramp:
        line["global_batch"] = size
    if config.loops.per == "sequence":
        line["mean_loops"] = result.mean_loops
    if result.communication is not None:
        line["communication"] = result.communication
    return line


class Metrics:
    """Rank 0's writer of metrics.jsonl, eval.jsonl and the sinks."""

    def __init__(
        self, config: Config, run_dir: Path, resumed_step: int, fence: Fence | None = None, last_step: int | None = None
    ):
        """Remove the lines after `resumed_step` and open the sinks.

        last_step: of the run; None: train.steps. Raises OSError, and UserError if the run has a newer start than
        that of `fence`.
        """
        self.total_steps = config.train.steps if last_step is None else last_step
        self.mean_loops = config.loops.mean_of(config.model)
        self.run_dir = run_dir
        self._fence = fence
        self._files = {name: LineFile(run_dir / name, fence) for name in FILES}
        self._rewind_files(resumed_step)
        self._sinks = Sinks(config, run_dir, resumed_step)

    def rewind(self, step: int) -> None:
        """Remove the lines of the steps after `step`, which are repeated."""
        self._rewind_files(step)
        self._sinks.rewind(step)

    def _rewind_files(self, step: int) -> None:
        last = step or -1  # a run that starts over repeats even the evaluation before step 1

        def keep(line: dict[str, Any]) -> bool | None:
            at = get_number(line, "step")
            return None if at is None else at <= last

        for file in self._files.values():
            file.rewind(keep)

    def write_step(self, line: dict[str, Any]) -> None:
        """Append a step's line and print it."""
        self._write("metrics.jsonl", line)
        suffix = ""
        if line["data_wait_seconds"] > max(SHOWN_WAIT, line["step_seconds"] / 10):
            suffix += f"  waited {line['data_wait_seconds']:.1f} s for data"
        if "decision" in line:
            suffix += f"  {line['decision']}"
        print(
            f"step {line['step']}/{self.total_steps}  loss {line['loss']:.3f}  grad_norm {line['grad_norm']:.2f}  "
            f"lr {line['lr']:.1e} ({line['phase']})  tokens/s {short(line['tokens_per_second'])}  "
            f"mfu {100 * line['mfu']:.1f}%  expert_load_max {line['expert_load_max']:.1f}x{suffix}",
            flush=True,
        )

    def write_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Append a line with what was measured to eval.jsonl and print it; nothing was: do nothing."""
        line: dict[str, Any] = {"step": step}
        result, curve, of_average, snapshots, tasks = evaluation
        texts = []
        if result:
            line |= {"heldout_loss": result.loss, "accuracy": result.accuracy}
            perplexity = math.exp(result.loss) if result.loss < 700 else math.inf  # exp(710) overflows
            texts.append(f"held-out loss {result.loss:.3f}  perplexity {perplexity:.1f}")
        if curve:
            line["by_loops"] = {str(n): one._asdict() for n, one in curve.items()}
            losses = "  ".join(f"{n}: {one.loss:.3f}" for n, one in curve.items())
            texts.append(f"held-out loss by loops  {losses}")
        if of_average:
            line["heldout_loss_average"], line["accuracy_average"] = of_average
            line["average_samples"] = snapshots
            texts[0] += f"  of the average {of_average.loss:.3f} ({count(snapshots, 'snapshot')})"
        if tasks:
            line["tasks"] = tasks
            texts += [f"{task}  {_task_text(metrics)}" for task, metrics in tasks.items()]
        if not texts:
            return
        written = self._write("eval.jsonl", line)
        for text in texts:
            print(f"step {step}/{self.total_steps}  {text}", flush=True)
        try:
            if written and curve:
                draw_curves(self.run_dir / "loops.png", {"held out": curve}, self.mean_loops)
        except OSError as error:
            log.warning("loops.png cannot be written (%s)", error.strerror)

    def write_expert_load(self, step: int, counts: Tensor) -> None:
        """Replace the file with the tokens of each expert in the last probed step, counts (n_loops, loop_layers * E):
        no more than the newest, because a line for each probe would make metrics.jsonl several times as large."""
        file, content = self.run_dir / EXPERT_LOAD, json.dumps({"step": step, "counts": counts.tolist()})
        try:
            (self._fence.replace if self._fence else write_atomically)(file, content)
        except OSError as error:
            log.warning("%s cannot be written (%s)", file, error.strerror)
        except UserError:
            pass  # the run has a newer start: `Fence.check` ends all ranks before the next step

    def fsync(self) -> None:
        """Before a checkpoint: the lines of its steps must not be lost if it is not. Errors are logged as warnings."""
        for file in self._files.values():
            try:
                file.fsync()
            except OSError as error:
                log.warning("%s: %s", file.file, error.strerror)
        self._sinks.flush()

    def flush(self) -> None:
        """Write the lines that could not be written before. Raises OSError, and UserError as `__init__`."""
        for file in self._files.values():
            file.flush()
        self.fsync()

    def close(self) -> None:
        """Close the files and the sinks."""
        for file in self._files.values():
            file.close()
        self._sinks.close()

    def _write(self, name: str, line: dict[str, Any]) -> bool:
        """Returns False, and writes nothing, if the run was started again since."""
        # JSON has no NaN or infinity: they become null.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        if not self._files[name].append(finite):
            return False
        self._sinks.log(line["step"], {k: v for k, v in line.items() if k != "step"})
        return True


def _task_text(metrics: dict[str, dict[str, Any]]) -> str:
    """The values of a task's metrics with their standard errors."""
    values = []
    for metric, one in metrics.items():
        error = "" if one["stderr"] is None else f" ± {one['stderr']:.3f}"
        values.append(f"{metric} " + ("not finite" if one["value"] is None else f"{one['value']:.3f}{error}"))
    return "  ".join(values)
