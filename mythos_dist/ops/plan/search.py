"""Which layouts of a run fit a cluster, and which of them is fastest.

Every combination of tensor x expert x pipe x ZeRO x micro-batch x recomputation x sequence parallelism that the rules
allow is looked at, but for those that a cheaper one rules out: what is held between steps does not depend on
activations, and a larger micro-batch never needs less memory.
"""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from mythos_dist.config.layout import divisors, layout_problems, nearest, works
from mythos_dist.config.schema import Config, MythosConfig
from mythos_dist.errors import UserError
from mythos_dist.model.flops import stage_costs
from mythos_dist.ops.plan.clusters import Cluster
from mythos_dist.ops.plan.cost import parts_of
from mythos_dist.ops.plan.estimate import Estimate, with_layout
from mythos_dist.ops.plan.memory import REUSED, static_memory
from mythos_dist.ops.plan.parameters import weights_of
from mythos_dist.parallel.mesh import mesh_coordinates
from mythos_dist.parallel.pipeline import StageSpec
from mythos_dist.units import count

AXES = ("tensor", "expert", "pipe", "zero", "sequence", "micro_batch", "recompute")  # what `fixed` may name
_PIPES = (1, 2, 4, 8, 16)
_RECOMPUTE = ("none", "selective", "loop")
_MOST_GPUS = 1 << 17
_MOST_AT_ONCE = 64  # sequences in a micro-batch


@dataclass(frozen=True)
class Found:
    """The fastest layouts that fit, fastest first; if none does, the one that needs least memory."""

    best: list[Estimate]
    tightest: Estimate | None  # None if no layout can be dealt out at all
    best_by_pipe: dict[int, Estimate]  # the fastest with so many stages
    best_by_expert: dict[int, Estimate]  # the fastest of this expert degree


def candidates(config: Config, gpus: int, fixed: Mapping[str, Any]) -> Iterator[tuple[Config, list[int]]]:
    """Layouts that the rules allow, as a config with the smallest micro-batch and all micro-batches that divide."""
    c, batch = config.model, config.train.global_batch

    def choices(name: str, values: Any) -> list[Any]:
        return [fixed[name]] if name in fixed else list(values)

    for pipe in choices("pipe", _PIPES):
        for tensor in choices("tensor", divisors(c.n_heads)):
            if gpus % (pipe * tensor) or batch % (gpus // (pipe * tensor)):
                continue
            each = batch // (gpus // (pipe * tensor))  # sequences of a replica
            micro = [m for m in choices("micro_batch", divisors(each)) if each % m == 0 and m <= _MOST_AT_ONCE]
            for expert in choices("expert", divisors(c.n_experts)) if micro else ():
                for zero, sequence, recompute in product(
                    choices("zero", _zeros(c, pipe, tensor, expert)),
                    choices("sequence", (True, False) if tensor > 1 else (False,)),
                    choices("recompute", _RECOMPUTE),
                ):
                    layout = dict(pipe=pipe, tensor=tensor, expert=expert, zero=zero, sequence=sequence)
                    first = with_layout(config, **layout, recompute=recompute, micro_batch=micro[0])
                    if works(first, gpus):
                        yield first, micro


def _zeros(c: MythosConfig, pipe: int, tensor: int, expert: int) -> tuple[int, ...]:
    """Pipelines know ZeRO-1 only. ZeRO-3 would gather a large looped block anew in every loop."""
    if pipe > 1:
        return (1,)
    block = sum(w.numel for w in weights_of(c, tensor, expert, StageSpec.full(c)) if w.name.startswith("recurrent"))
    return (1, 2, 3) if block < REUSED else (1, 2)


def search(
    config: Config, gpus: int, cluster: Cluster, fixed: Mapping[str, Any], keep: int = 8, imbalance: float = 1.0
) -> Found:
    """The `keep` fastest layouts of `config` on `gpus` that fit; `fixed` holds settings of AXES as they are given."""
    best: list[tuple[float, int, Estimate]] = []
    tightest, least, looked_at = None, float("inf"), 0
    static: dict[tuple, float] = {}
    by_pipe: dict[int, Estimate] = {}
    by_expert: dict[int, Estimate] = {}
    for first, micro_batches in candidates(config, gpus, fixed):
        key = (first.parallel.pipe, first.parallel.tensor, first.parallel.expert, first.parallel.zero)
        key = (*key, first.train.recompute == "loop")
        if key not in static:
            static[key] = _held(first, gpus)
        if static[key] > cluster.usable and tightest is not None and static[key] >= least:
            continue
        for micro_batch in micro_batches:
            looked_at += 1
            found = Estimate(with_layout(first, micro_batch=micro_batch), gpus, cluster, imbalance)
            if (size := found.fullest.bytes) < least:
                tightest, least = found, size
            if size > cluster.usable:
                break
            for of, degree in ((by_pipe, first.parallel.pipe), (by_expert, first.parallel.expert)):
                if degree not in of or found.step_seconds < of[degree].step_seconds:
                    of[degree] = found
            rank = (-found.step_seconds, -looked_at)
            if len(best) < keep:
                heapq.heappush(best, (*rank, found))
            elif rank > best[0][:2]:
                heapq.heapreplace(best, (*rank, found))
    fastest = [found for *_, found in sorted(best, key=lambda item: item[:2], reverse=True)]
    return Found(fastest, tightest, by_pipe, by_expert)


def _held(config: Config, gpus: int) -> float:
    """Bytes between steps of the fullest stage."""
    pipe, tensor = config.parallel.pipe, config.parallel.tensor
    parts = parts_of(config.model, config.loops.mean_of(config.model), pipe, stage_costs(config))
    sizes = []
    for i, part in enumerate(parts):
        mesh = mesh_coordinates(config.parallel, gpus, i * tensor)
        weights = weights_of(config.model, tensor, config.parallel.expert, part)
        sizes.append(sum(static_memory(config, mesh, weights).values()))
    return max(sizes)


def smallest_cluster(config: Config, gpus: int, cluster: Cluster, fixed: Mapping[str, Any]) -> int | None:
    """How many GPUs, doubled from `gpus` on, have a layout that fits; None: no number does."""
    while gpus < _MOST_GPUS:
        gpus *= 2
        if config.train.global_batch < gpus:  # else replicas would be without work
            config = replace(config, train=replace(config.train, global_batch=gpus))
        if search(config, gpus, cluster, fixed, keep=1).best:
            return gpus
    return None


def check_fixed(config: Config, gpus: int, fixed: Mapping[str, Any]) -> None:
    """Raises UserError for settings that contradict each other or the cluster, with the nearest that work."""
    problems = layout_problems(with_layout(config, **fixed))
    if not problems and {"tensor", "pipe"} <= fixed.keys():
        problems = layout_problems(with_layout(config, **fixed), gpus)
    if problems:
        raise UserError(problems)
    if not any(True for _ in candidates(config, gpus, fixed)):
        raise UserError(_no_layout(config, gpus, fixed))


def _no_layout(config: Config, gpus: int, fixed: Mapping[str, Any]) -> str:
    """Why no layout can be dealt out to so many GPUs, and the nearest number that has one."""
    given = ", ".join(f"{name}={value}" for name, value in fixed.items())
    batch = config.train.global_batch
    near = sorted(_numbers_of_gpus(config, fixed, 2 * gpus), key=lambda other: abs(other - gpus))
    working = []
    for other in near:
        if any(True for _ in candidates(config, other, fixed)):
            working.append(other)
        if len(working) == 2:
            break
    what = f"--gpus {gpus}" + (f" with --fixed {given}" if given else "")
    return (
        f"{what}: no layout deals a global batch of {count(batch, 'sequence')} to so many GPUs"
        + (f"; nearest that works: --gpus {' or '.join(map(str, nearest(gpus, working)))}" if working else "")
        + f", or another --global-batch, such as {max(1, batch // gpus) * gpus}"
    )


def _numbers_of_gpus(config: Config, fixed: Mapping[str, Any], most: int) -> set[int]:
    """Numbers that whole replicas make which the batch can be dealt to: no other has a layout."""
    pipes = [fixed["pipe"]] if "pipe" in fixed else _PIPES
    tensors = [fixed["tensor"]] if "tensor" in fixed else divisors(config.model.n_heads)
    numbers = (pipe * tensor * n for pipe in pipes for tensor in tensors for n in divisors(config.train.global_batch))
    return {number for number in numbers if number <= most}
