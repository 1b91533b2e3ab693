"""The cost of a loop: time and memory by the number of loops, and the overhead of looping.

time: seconds of forward and backward for 1, 2, ... loops, interleaved, and a line through the medians.
memory: peak memory of processes that recompute every loop, by the number of loops. Only the state between loops, saved
for the backward pass, has to grow: h in the model's dtype.
no_grad: peak memory of processes without recomputation, by the number of loops: with gradient through all loops, and
through the last 4 only. A loop without gradient should add nothing.
telemetry: share of the training time of the demo's model (one process, one micro-batch per step) that goes to telemetry
samples of the loops (`loops.telemetry_every`), from its metrics.jsonl.
overhead: share of a training step with act.mode=safe that goes to drawing the number of loops, halting (with the
output so far), counting the experts' tokens, and updating the router's bias. Each part is marked in real steps:
its forward is timed by the clock, its backward by the profiler through autograd's sequence numbers.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import COMMON, DTYPES, ROOT, SHAPES, Trainer, add_options, resident, run_interleaved, serve
from torch.profiler import ProfilerActivity, profile

import mythos_dist.model.moe as moe
import mythos_dist.train.schedule as schedule
from mythos_dist.config.schema import ActConfig, Config, LoopsConfig, MythosConfig
from mythos_dist.model import Mythos
from mythos_dist.model.recompute import Recompute

TARGETS = {"r2": 0.99, "growth": 1.15, "overhead": 0.02, "no_grad": 0.02, "telemetry": 0.02}
MEMORY_LOOPS = (4, 8, 16, 32)
BACKPROP = 4  # loops with gradient, of more


def model_config(arguments: argparse.Namespace) -> MythosConfig:
    """The model of all parts, with 8 loops on average."""
    return MythosConfig(**(COMMON | SHAPES[arguments.shape][1]))


def build(arguments: argparse.Namespace, recompute: Recompute | None = None, act: ActConfig | None = None) -> Trainer:
    """The model with its optimizer and a batch."""
    torch.set_num_threads(arguments.threads)
    config = model_config(arguments)
    tokens = arguments.batch, SHAPES[arguments.shape][0]
    return Trainer(Mythos(config, act=act, recompute=recompute), config.vocab_size, tokens, DTYPES[arguments.dtype])


def time_loops(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of forward and backward by loops, and the line through them."""
    trainer = build(arguments)
    numbers = range(1, arguments.loops + 1)
    seconds: dict[int, list[float]] = {n: [] for n in numbers}

    def run(n_loops: int) -> float:
        begin = time.perf_counter()
        trainer.losses(n_loops)["objective"].backward()
        passed = time.perf_counter() - begin
        trainer.model.zero_grad()
        return passed

    run(arguments.loops)
    for i in range(arguments.rounds):  # every second round in reverse, so that a drift of speed does not bend the line
        for n in reversed(numbers) if i % 2 else numbers:
            seconds[n].append(run(n))
    medians = {n: statistics.median(some) for n, some in seconds.items()}
    slope, rest = statistics.linear_regression(list(medians), list(medians.values()))
    r2 = statistics.correlation(list(medians), list(medians.values())) ** 2
    return {"seconds": medians, "per_loop": slope, "without_loops": rest, "r2": r2}


def memory_worker(n_loops: int, arguments: argparse.Namespace) -> None:
    """Two training steps, then the peak memory of this process."""
    trainer = build(arguments, Recompute(arguments.recompute))
    trainer.passed = {"backprop": arguments.backprop}
    for _ in range(2):
        trainer.step(n_loops)
    serve({"bytes": resident("VmHWM")}, lambda _: {})


def peaks_of(arguments: argparse.Namespace, numbers: Sequence[int], *more: str) -> dict[int, float]:
    """Peak bytes of a process by loops, medians."""
    # Each large tensor gets pages of its own: otherwise glibc raises this threshold when it frees one, and then
    # fragmentation changes the peak by 20 MB from run to run.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(128 << 10)
    settings = f"--shape {arguments.shape} --dtype {arguments.dtype} --batch {arguments.batch}"
    command = [sys.executable, __file__, *settings.split(), f"--threads={arguments.threads}"]
    peaks: dict[int, list[int]] = {n: [] for n in numbers}
    for _ in range(-(-arguments.rounds // 2)):  # peaks hardly vary
        for n in numbers:
            ((first,),) = run_interleaved({"memory": [*command, f"--worker={n}", *more]}, 0).values()
            peaks[n].append(first["bytes"])
    return {n: statistics.median(some) for n, some in peaks.items()}


def measure_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peaks with recomputation, and their growth relative to the saved hidden states."""
    peaks = peaks_of(arguments, MEMORY_LOOPS, "--recompute=loop")
    tokens, dim = arguments.batch * SHAPES[arguments.shape][0], SHAPES[arguments.shape][1]["dim"]
    state = tokens * dim * DTYPES[arguments.dtype].itemsize  # nothing halts, so there is no output so far
    first, last = MEMORY_LOOPS[0], MEMORY_LOOPS[-1]
    per_loop = (peaks[last] - peaks[first]) / (last - first)
    return {"bytes": peaks, "per_loop": per_loop, "state": state, "growth": per_loop / state}


def measure_no_grad(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peaks without recomputation, and what one more loop adds without and with gradient."""
    every = peaks_of(arguments, (4, 8))
    some = peaks_of(arguments, (8, 32), f"--backprop={BACKPROP}")
    with_gradient, without = (every[8] - every[4]) / 4, (some[32] - some[8]) / 24
    return {"bytes": {"all": every, "last": some}, "with": with_gradient, "without": without}


def measure_telemetry(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a telemetry sample and of a step, and the samples' share of the time at the default interval."""
    if not (ROOT / "data" / "sample").exists():
        subprocess.run([sys.executable, ROOT / "tools" / "make_sample_data.py"], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = (
            f"train.steps={4 * arguments.rounds} train.micro_batch=8 loops.telemetry_every=4 train.eval_samples=8 "
            f"run.wandb=disabled checkpoint.every=1000000 run.dir={folder}/run"
        )
        command = [sys.executable, "-m", "mythos_dist.train", "configs/demo.yaml", *settings.split()]
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    step = statistics.median(line["step_seconds"] for line in lines)
    sample = statistics.median(line["depth"]["seconds"] for line in lines if "depth" in line)
    every = LoopsConfig().telemetry_every
    return {"step": step, "sample": sample, "every": every, "share": sample / (every * step)}


class Pieces:
    """Seconds of marked pieces of a step, forward and backward."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._nodes: list[tuple[str, int, int]] = []  # autograd nodes of a piece: between these sequence numbers

    @contextlib.contextmanager
    def mark(self, name: str) -> Iterator[None]:
        """Time the forward of the code inside, and record its autograd nodes."""
        first, begin = _next_node(), time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin
        self._nodes.append((name, first, _next_node()))

    def wrap(self, name: str, owner: Any, attribute: str) -> None:
        """Mark every call of owner.attribute."""
        function = getattr(owner, attribute)

        def marked(*arguments: Any, **settings: Any) -> Any:
            with self.mark(name):
                return function(*arguments, **settings)

        setattr(owner, attribute, marked)

    def add_backward(self, profiler: profile) -> None:
        """Add the backward of all marked nodes."""
        for event in profiler.events() or []:
            if event.name.startswith("autograd::engine::evaluate_function"):
                for name, first, last in self._nodes:
                    if first < event.sequence_nr < last:
                        self.seconds[f"{name}, backward"] += event.cpu_time_total / 1e6
        self._nodes.clear()


def _next_node() -> int:
    """The sequence number of a new node: autograd numbers nodes in the order of the forward."""
    return torch.ones((), requires_grad=True).clone().grad_fn._sequence_nr()  # type: ignore[union-attr]


def mark_halting(pieces: Pieces, model: Mythos) -> None:
    """From the call of `Halting` to the end of its loop: halting, and the output so far."""
    recurrent, open_piece = model.recurrent, contextlib.ExitStack()
    halt, loop = recurrent.act.forward, recurrent._loop

    def marked_halt(*arguments: Any) -> Any:
        open_piece.enter_context(pieces.mark("halting"))
        return halt(*arguments)

    def marked_loop(*arguments: Any) -> Any:
        result = loop(*arguments)
        open_piece.close()
        return result

    recurrent.act.forward, recurrent._loop = marked_halt, marked_loop  # type: ignore[method-assign]


def measure_overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    """The median share of a training step by piece; each step draws its number of loops."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no log of the profiler
    trainer, pieces = build(arguments, act=ActConfig(mode="safe")), Pieces()
    model = trainer.model
    assert isinstance(model, Mythos)
    config = Config(model=model.config, loops=LoopsConfig(distribution="poisson", maximum=2 * COMMON["max_loop_iters"]))
    trainer.step()
    mark_halting(pieces, model)
    pieces.wrap("counting experts' tokens", moe, "tokens_per_expert")
    pieces.wrap("drawing the number of loops", schedule, "loops_at")
    pieces.wrap("updating the router's bias", model, "update_router_bias")
    loops, steps = [], []
    for step in range(1, 1 + arguments.rounds):
        pieces.seconds.clear()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            begin = time.perf_counter()
            loops.append(schedule.loops_at(config, step).n_loops)
            losses = trainer.step(loops[-1])
            model.update_router_bias(losses["expert_counts"])
            total = time.perf_counter() - begin
        pieces.add_backward(profiler)
        steps.append({name: seconds / total for name, seconds in pieces.seconds.items()})
    shares = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    return {"shares": shares, "overhead": statistics.median(sum(step.values()) for step in steps), "loops": loops}


def report(results: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Tables, with targets."""
    tokens = arguments.batch * SHAPES[arguments.shape][0]
    print(
        f"{arguments.shape} {arguments.dtype}: {tokens} tokens, {arguments.threads} threads, {arguments.rounds} rounds"
    )
    if timed := results.get("time"):
        for n, seconds in timed["seconds"].items():
            line = timed["without_loops"] + n * timed["per_loop"]
            print(f"{n:3} loops {seconds:8.3f} s   on the line {line:8.3f} s   {seconds / line - 1:+6.1%}")
        print(f"{timed['per_loop']:.4f} s per loop and {timed['without_loops']:.4f} s without loops")
        print(f"R^2 {timed['r2']:.5f} (target: more than {TARGETS['r2']})\n")
    if memory := results.get("memory"):
        before = None
        for n, peak in memory["bytes"].items():
            more = f"{(peak - before[1]) / (n - before[0]) / 1e6:8.3f} MB per additional loop" if before else ""
            print(f"{n:3} loops {peak / 1e6:8.1f} MB{more}")
            before = n, peak
        print(f"{memory['per_loop'] / 1e6:.3f} MB per loop; the states alone {memory['state'] / 1e6:.3f} MB")
        print(f"growth {memory['growth']:.3f} x the states' (target: at most {TARGETS['growth']})\n")
    if no_grad := results.get("no_grad"):
        share = no_grad["without"] / no_grad["with"]
        for name, peaks in no_grad["bytes"].items():
            text = "  ".join(f"{n} loops {peak / 1e6:.1f} MB" for n, peak in peaks.items())
            print(f"gradient through {'all' if name == 'all' else f'the last {BACKPROP}'}: {text}")
        print(
            f"a loop adds {no_grad['with'] / 1e6:.2f} MB, one without gradient {no_grad['without'] / 1e6:.3f} MB",
            end=": ",
        )
        print(f"{share:.2%} (target: at most {TARGETS['no_grad']:.0%})\n")
    if telemetry := results.get("telemetry"):
        print(f"a telemetry sample {telemetry['sample']:.3f} s, a step {telemetry['step']:.3f} s: ", end="")
        print(
            f"every {telemetry['every']} steps {telemetry['share']:.2%} (target: at most {TARGETS['telemetry']:.0%})\n"
        )
    if overhead := results.get("overhead"):
        for name, share in overhead["shares"].items():
            print(f"{name:40}{share:8.3%}")
        print(f"total {overhead['overhead']:.2%} of steps with {overhead['loops']} loops, medians", end=" ")
        print(f"(target: at most {TARGETS['overhead']:.0%})")


def main() -> None:
    """Measure all parts, or one; print tables, or JSON."""
    parts = {
        "time": time_loops,
        "memory": measure_memory,
        "no_grad": measure_no_grad,
        "telemetry": measure_telemetry,
        "overhead": measure_overhead,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=parts, help="default: all")
    add_options(parser, 16, "largest number of loops to time", "of each measurement")
    parser.add_argument("--worker", type=int, metavar="LOOPS", help=argparse.SUPPRESS)
    parser.add_argument("--backprop", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--recompute", choices=("none", "loop"), default="none", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        memory_worker(arguments.worker, arguments)
        return
    results = {part: parts[part](arguments) for part in ([arguments.part] if arguments.part else parts)}
    if arguments.json:
        print(json.dumps(results))
    else:
        report(results, arguments)


if __name__ == "__main__":
    main()
