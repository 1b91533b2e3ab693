"""A rank on fake tensors against the same rank of a real run: peak memory, FLOPs and every byte of its messages."""

import contextlib
import gc
import os
import sys
import time
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.launch import launch, new_process_groups, run_ranks
from helpers.parity import batches, change
from helpers.selection import by_ranks
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config
from mythos_dist.ops import dry_run as dry_run_module
from mythos_dist.ops.dry_run import LocalTraffic, RowCounts, dry_run, first_tiles
from mythos_dist.ops.plan.meter import Meter
from mythos_dist.parallel import expert
from mythos_dist.parallel.process import use_gpu_code

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1800)]

# Tensors of some MB, so that scalars do not matter. With lr=0 and a constant router bias each step sends the same rows.
SMALL = (
    "model.dim=256 model.vocab_size=2000 model.kv_lora_rank=64 model.q_lora_rank=96 model.qk_rope_head_dim=32 "
    "model.qk_nope_head_dim=32 model.v_head_dim=32 model.expert_dim=128 train.seq_len=256 train.micro_batch=1 "
    "train.global_batch=2 train.dtype=fp32 loops.mean=3 experts.z_loss=0.01 experts.bias_update_rate=0 optim.lr=0"
)
# As many micro-batches as a dry run takes, except in one layout. Mostly fp32: a CPU's products in bf16 take ten
# times as long.
LAYOUTS = {
    2: [
        "parallel.zero=3 train.recompute=loop average.kind=ema train.micro_batch=2 train.global_batch=4",
        "parallel.tensor=2 train.recompute=selective train.global_batch=1",
        "parallel.tensor=2 parallel.sequence=true train.recompute=loop train.recompute_every=2 train.global_batch=1 "
        "model.attn_type=gqa loops.backprop=2",
        "parallel.pipe=2 loops.objective=per_loop model.kv_sharing=first train.global_batch=3",
        "parallel.context=2 train.recompute=loop train.seq_len=255 train.global_batch=1",
    ],
    4: [
        "parallel.tensor=2 parallel.expert=2 parallel.zero=3",
        "parallel.expert=4 parallel.zero=2 train.global_batch=4",
        "optim.name=muon parallel.tensor=2 train.global_batch=2",
        "parallel.pipe=2 parallel.expert=2 train.dtype=bf16 train.global_batch=4",
    ],
}
# Other combinations of the settings above.
LONG = {
    2: [
        "train.micro_batch=2 train.global_batch=4",
        "parallel.zero=3 train.recompute=loop average.kind=ema",
        "parallel.expert=2 parallel.zero=2 train.micro_batch=2 train.global_batch=4",
        "model.attn_type=gqa loops.backprop=2",
        "parallel.tensor=2 parallel.sequence=true train.recompute=loop train.recompute_every=2 train.global_batch=1",
        "parallel.pipe=2 loops.objective=per_loop train.global_batch=3",
        "parallel.pipe=2 model.kv_sharing=first train.global_batch=3",
        "parallel.zero=2 train.dtype=bf16 train.global_batch=4 average.kind=ema",
        "parallel.pipe=2 train.recompute=loop model.attn_type=gqa train.global_batch=3",
        "train.dtype=bf16 train.global_batch=4",
        "parallel.zero=3 train.dtype=bf16",
        "parallel.expert=2 train.recompute=loop",
        "parallel.pipe=2 train.dtype=bf16",
        "parallel.tensor=2 model.kv_sharing=first train.recompute=loop train.global_batch=1",
        "parallel.context=2 model.attn_type=gqa train.global_batch=1",
        "parallel.context=2 parallel.expert=2 train.recompute=selective train.global_batch=1",
    ],
    4: [
        "parallel.expert=4 train.global_batch=4",
        "parallel.tensor=2 parallel.expert=2 parallel.sequence=true",
    ],
}
TOLERANCE = 0.005
PROFILED_STEPS = 3


def config_of(layout: str) -> Config:
    config = load_config("configs/tiny_cpu.yaml", [*SMALL.split(), *layout.split(), "data.path=none"])
    return change(config, data=dict(path="", document_mask=False))  # random tokens


def micro_batches_of(config: Config, world: int) -> int:
    """Of a real step; a dry run takes fewer by default."""
    replicas = world // (config.parallel.pipe * config.parallel.context * config.parallel.tensor)
    return config.train.global_batch // (config.train.micro_batch * replicas)


def compared_ranks(layout: str, world: int) -> list[int]:
    """Rank 0, and the last one if it is another stage or receives other rows."""
    return [0, world - 1] if "pipe" in layout or "expert" in layout else [0]


def measure(layouts: list[str]) -> list[dict[str, Any]]:
    """On each rank: what a step of each layout needs, by torch's profiler and the meter. Ranks that are not compared
    take the same steps without them."""
    from mythos_dist.parallel.mesh import build_mesh
    from mythos_dist.train.engine import Engine

    results = []
    for layout in layouts:
        print(layout, file=sys.stderr)  # shows where a failed launch was
        new_process_groups(layout)
        config = config_of(layout)
        mesh = build_mesh(config.parallel)
        micro_batches = next(batches(config, mesh.data.rank, mesh.data.size))
        answers: list[RowCounts] = []
        exchange_counts = expert.exchange_counts

        def record(*arguments: Any, answers: list = answers, exchange_counts: Any = exchange_counts) -> Any:
            answers.append(exchange_counts(*arguments))
            return answers[-1]

        with use_gpu_code(), mock.patch.object(expert, "exchange_counts", record):
            gc.collect()  # else the profiler records that the previous engine is freed
            compared = dist.get_rank() in compared_ranks(layout, dist.get_world_size())
            profiling = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            with release_gloo_tensors(), profiling if compared else contextlib.nullcontext() as profiler:
                engine = Engine(config, mesh)
                # In the first step pipeline stages send shapes, and ZeRO-3 traces which parameters are needed when.
                engine.train_step(micro_batches, 1)
                for _ in range(PROFILED_STEPS):
                    answers.clear()
                    with record_function("the step"):
                        engine.train_step(micro_batches, 2)
            routing = list(answers)
            engine.traffic = LocalTraffic(mesh)
            with Meter() if compared else contextlib.nullcontext(Meter()) as meter:
                meter.reset()
                communication = engine.train_step(micro_batches, 2).communication
        assert answers == routing * 2, "a step with lr=0 sent other rows than the previous one"
        results.append(
            {
                "peak": peak_of(profiler) if profiler else None,
                "flops": meter.flops,
                "communication": communication,
                "routing": routing,
            }
        )
        engine.close()
        del engine
        dist.barrier()
    return results


def release_gloo_tensors() -> Any:
    """After each message wait until gloo's thread has released its tensors: the profiler does not record that."""
    wait = dist.Work.wait

    def wait_longer(*arguments: Any) -> Any:
        done = wait(*arguments)
        time.sleep(0.01)  # 2 ms were too short on a busy machine
        return done

    return mock.patch.object(dist.Work, "wait", wait_longer)


def peak_of(profiler: profile) -> int:
    """Peak of allocated bytes during a step, counted since the profiler started; the least of all profiled steps.

    On a busy machine gloo's thread may hold a message's tensors for longer than `release_gloo_tensors` waits.
    """
    assert profiler.profiler and profiler.profiler.kineto_results
    left, events = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while left:
        events.append(left.pop())
        left += events[-1].children
    steps = [event for event in events if event.name == "the step"]
    assert len(steps) == PROFILED_STEPS
    peaks = [0] * len(steps)
    allocations = (event for event in events if event.tag == _EventType.Allocation)
    held: dict[int, int] = {}  # bytes by address, of allocations since the profiler started
    live = 0
    for event in sorted(allocations, key=lambda event: event.start_time_ns):
        size, address = event.extra_fields.alloc_size, event.extra_fields.ptr
        live += size if size > 0 else -held.pop(address, 0)
        if size > 0:
            live -= held.pop(address, 0)
            held[address] = size
        for i, step in enumerate(steps):
            if step.start_time_ns <= event.start_time_ns <= step.end_time_ns:
                peaks[i] = max(peaks[i], live)
    return min(peaks)


def run_dry(world: int, cases: list[tuple[str, int, list[RowCounts]]]) -> list[dict[str, Any]]:
    """The dry run for each layout, rank and routing."""
    results = []
    for layout, rank, routing in cases:
        print(layout, rank, file=sys.stderr)
        config = config_of(layout)
        dry = dry_run(config, world, rank, micro_batches=micro_batches_of(config, world), routing=routing)
        results.append(
            {
                "peak": sum(dry.memory.values()),
                "flops": dry.flops,
                "communication": dry.communication,
                "micro_batches": dry.micro_batches,
            }
        )
    return results


def run_dry_in_turns(world: int, cases: list[tuple[str, int, list[RowCounts]]]) -> list[dict[str, Any]]:
    """On each of two processes: half of the cases."""
    return run_dry(world, cases[int(os.environ["LOCAL_RANK"]) :: 2])


@pytest.mark.parametrize(("world", "layouts"), by_ranks(LAYOUTS, LONG))
def test_a_dry_run_equals_a_real_rank(world, layouts):
    """FLOPs and bytes over each axis exactly, peak memory within `TOLERANCE`, with the rows of the real routers."""
    real = list(zip(layouts, zip(*run_ranks(world, measure, layouts, seconds=1600), strict=True), strict=True))
    cases = [(layout, rank, ranks[rank]["routing"]) for layout, ranks in real for rank in compared_ranks(layout, world)]
    halves = launch(2, run_dry_in_turns, world, cases, seconds=1600)
    assert halves.codes == [0, 0], "\n".join(halves.tails)
    dry = {
        case[:2]: dry_result
        for i, half in enumerate(halves.values)
        for case, dry_result in zip(cases[i::2], half, strict=True)
    }
    for (layout, rank), dry_result in dry.items():
        measured, config = dict(real)[layout][rank], config_of(layout)
        micro_batches = micro_batches_of(config, world)
        where = f"{layout}, rank {rank}"
        assert dry_result["peak"] == pytest.approx(measured["peak"], rel=TOLERANCE), where
        assert dry_result["flops"] / dry_result["micro_batches"] == measured["flops"] / micro_batches, where
        assert dry_result["communication"] == measured["communication"], where


@pytest.mark.parametrize("attention", ["mla", pytest.param("gqa", marks=pytest.mark.long)])
def test_of_tiles_of_keys_that_repeat_two_show_what_all_need(attention):
    """A dry run that visits all eight tiles of a sequence over eight ranks has the same memory, FLOPs and bytes."""
    layout = (
        f"parallel.context=8 train.recompute=loop train.seq_len=2048 model.max_seq_len=2048 model.attn_type={attention}"
    )
    config, visited = config_of(f"{layout} train.global_batch=1 loops.mean=2"), Counter()

    def counting(visit: Any, name: str) -> Any:
        def count(shard: Any) -> Any:
            for tile in visit(shard):
                visited[name] += 1
                yield tile

        return count

    def run(name: str, tiles: Any) -> dict[str, Any]:
        with mock.patch.object(dry_run_module, "first_tiles", lambda meter: counting(tiles(meter), name)):
            return vars(dry_run(config, 8)) | {"seconds": 0}

    two, every = run("two", first_tiles), run("all", lambda _: lambda shard: shard.tiles)
    assert visited["two"] <= visited["all"] // 2
    assert two == every


def test_a_dry_run_prints_nothing_and_restores_the_process(capfd):
    """No output of DeepSpeed or torch; the environment and the process group are as before."""
    before = dict(os.environ)
    dry_run(config_of("parallel.zero=3 parallel.tensor=4 train.global_batch=32 loops.mean=1"), 64, 5, imbalance=1.2)
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == before
    assert not dist.is_initialized()
    assert (torch.ones(2) + 1).tolist() == [2, 2]
