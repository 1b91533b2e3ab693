"""Which layouts of a run fit a cluster, and which of them is fastest.

Tries every combination of tensor x context x expert x pipe x ZeRO x micro-batch x recomputation x sequence parallelism
that the rules allow, except those that another one rules out: memory between steps does not depend on activations, and
a larger micro-batch never needs less memory. Of the context axis only degrees that leave each rank at least
`MIN_CONTEXT_TOKENS` of a sequence: with shorter sequences its messages never pay.
"""

import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from mythos_dist.config.layout import divisors, layout_problems, nearest, works
from mythos_dist.config.schema import Config, MythosConfig
from mythos_dist.errors import UserError
from mythos_dist.model.flops import stage_specs
from mythos_dist.model.parameter_table import local_parameters
from mythos_dist.ops.plan.clusters import Cluster
from mythos_dist.ops.plan.estimate import Estimate, with_layout
from mythos_dist.ops.plan.memory import MAX_REUSE_DISTANCE, static_memory
from mythos_dist.parallel.mesh import mesh_coordinates
from mythos_dist.units import count

# What `fixed` may name.
AXES = (
    *("tensor", "context", "expert", "pipe", "zero", "sequence"),
    *("micro_batch", "recompute", "chunk_tokens", "offload"),
)
_PIPES = (1, 2, 4, 8, 16)
CONTEXTS = (1, 2, 4, 8, 16, 32, 64, 128)
MIN_CONTEXT_TOKENS = 8192
_RECOMPUTE = ("none", "selective", "loop")
_CHUNK_TOKENS = (16384, 2048)  # sizes of chunks to try: smaller ones save little more and make small products
_MAX_GPUS = 1 << 17
_MAX_MICRO_BATCH = 64  # sequences


@dataclass
class SearchResult:
    """The fastest layouts that fit, fastest first, and the layout that needs least memory."""

    best: list[Estimate] = field(default_factory=list)
    smallest: Estimate | None = None  # None: no layout divides these GPUs
    best_by_pipe: dict[int, Estimate] = field(default_factory=dict)  # the fastest by number of stages
    best_by_expert: dict[int, Estimate] = field(default_factory=dict)  # the fastest by expert degree


def candidates(config: Config, gpus: int, fixed: Mapping[str, Any]) -> Iterator[tuple[Config, list[int]]]:
    """Layouts that the rules allow: a config with the smallest micro-batch, and all micro-batches that divide."""
    c, batch = config.model, math.gcd(*config.train.batch_sizes)
    saving = dict(chunk_tokens=fixed.get("chunk_tokens"), offload=fixed.get("offload", "none"))

    def choices(name: str, values: Any) -> list[Any]:
        return [fixed[name]] if name in fixed else list(values)

    contexts = [n for n in CONTEXTS if n == 1 or config.train.seq_len // n >= MIN_CONTEXT_TOKENS]
    for pipe, context, tensor in product(
        choices("pipe", _PIPES), choices("context", contexts), choices("tensor", divisors(c.n_heads))
    ):
        ranks = pipe * context * tensor  # of a replica
        if gpus % ranks or batch % (gpus // ranks):
            continue
        per_replica = batch // (gpus // ranks)  # sequences
        sizes = choices("micro_batch", divisors(per_replica))
        micro_batches = [size for size in sizes if per_replica % size == 0 and size <= _MAX_MICRO_BATCH]
        if not micro_batches:
            continue
        for expert in choices("expert", divisors(c.n_experts)):
            for zero, sequence, recompute in product(
                choices("zero", _zero_stages(c, pipe, tensor, expert)),
                choices("sequence", (True, False) if tensor > 1 else (False,)),
                choices("recompute", _RECOMPUTE),
            ):
                layout = dict(pipe=pipe, context=context, tensor=tensor, expert=expert, zero=zero, sequence=sequence)
                layout |= dict(recompute=recompute, micro_batch=micro_batches[0])
                first = with_layout(config, **layout, **saving)
                if works(first, gpus):
                    yield first, micro_batches


def _zero_stages(c: MythosConfig, pipe: int, tensor: int, expert: int) -> tuple[int, ...]:
    """Pipelines support ZeRO-1 only. ZeRO-3 would gather a large looped block again in every loop."""
    if pipe > 1:
        return (1,)
    block = sum(p.numel for p in local_parameters(c, tensor, expert) if p.name.startswith("recurrent"))
    return (1, 2, 3) if block < MAX_REUSE_DISTANCE else (1, 2)


def search(
    config: Config, gpus: int, cluster: Cluster, fixed: Mapping[str, Any], keep: int = 8, imbalance: float = 1.0
) -> SearchResult:
    """The `keep` fastest layouts of `config` on `gpus` that fit; `fixed` gives settings of AXES.

    Work in chunks and saved hidden states in host memory only take time: they are tried if nothing fits without them.
    """
    result = _search(config, gpus, cluster, fixed, keep, imbalance, save_memory=False)
    if result.best or result.smallest is None:
        return result
    return _search(config, gpus, cluster, fixed, keep, imbalance, save_memory=True)


def variants_of(config: Config, fixed: Mapping[str, Any]) -> list[Config]:
    """A layout without and with what saves memory and takes time, the least of it first and all of it last."""
    chunks = [fixed["chunk_tokens"]] if "chunk_tokens" in fixed else [None, *_CHUNK_TOKENS]
    offloads = [fixed["offload"]] if "offload" in fixed else ["none", "saved"]
    pairs = list(product(chunks, offloads if config.train.recompute == "loop" else offloads[:1]))
    variants = [with_layout(config, chunk_tokens=chunk, offload=offload) for chunk, offload in pairs]
    return [one for one in variants if not one.train.chunk_tokens or one.chunk_size or "chunk_tokens" in fixed]


def first_that_fits(variants: list[Config], gpus: int, cluster: Cluster, imbalance: float) -> Estimate:
    """The estimate of the first variant that fits; else of the last one: least memory of GPUs, most of hosts."""
    last = Estimate(variants[-1], gpus, cluster, imbalance)
    if last.largest_stage.bytes <= cluster.usable:
        for variant in variants[:-1]:
            if (estimate := Estimate(variant, gpus, cluster, imbalance)).fits:
                return estimate
    return last


def _search(
    config: Config,
    gpus: int,
    cluster: Cluster,
    fixed: Mapping[str, Any],
    keep: int,
    imbalance: float,
    save_memory: bool,
) -> SearchResult:
    result = SearchResult()
    smallest_size = float("inf")
    heap: list[tuple[float, int, Estimate]] = []  # (-seconds, -index, layout): the slowest of the best first
    static: dict[tuple, float] = {}
    tried = 0
    for first, micro_batches in candidates(config, gpus, fixed):
        p = first.parallel
        key = (p.pipe, p.context, p.tensor, p.expert, p.zero, first.train.recompute == "loop")
        if key not in static:
            static[key] = _static_bytes(first, gpus)
        if static[key] > cluster.usable and result.smallest is not None and static[key] >= smallest_size:
            continue
        for micro_batch in micro_batches:
            tried += 1
            variants = variants_of(with_layout(first, micro_batch=micro_batch), fixed)
            estimate = first_that_fits(variants if save_memory else variants[:1], gpus, cluster, imbalance)
            size = estimate.largest_stage.bytes
            if size < smallest_size:
                result.smallest, smallest_size = estimate, size
            if not estimate.fits:
                break
            _keep_fastest(result.best_by_pipe, p.pipe, estimate)
            _keep_fastest(result.best_by_expert, p.expert, estimate)
            item = (-estimate.step_seconds, -tried, estimate)
            if len(heap) < keep:
                heapq.heappush(heap, item)
            elif item[:2] > heap[0][:2]:
                heapq.heapreplace(heap, item)
    heap.sort(key=lambda item: item[:2], reverse=True)
    result.best = [estimate for _, _, estimate in heap]
    return result


def _keep_fastest(best: dict[int, Estimate], degree: int, estimate: Estimate) -> None:
    if degree not in best or estimate.step_seconds < best[degree].step_seconds:
        best[degree] = estimate


def _static_bytes(config: Config, gpus: int) -> float:
    """Bytes between steps of the largest stage."""
    tensor, expert = config.parallel.tensor, config.parallel.expert
    sizes = []
    for i, stage in enumerate(stage_specs(config)):
        mesh = mesh_coordinates(config.parallel, gpus, i * config.parallel.context * tensor)
        parameters = local_parameters(config.model, tensor, expert, stage)
        sizes.append(sum(static_memory(config, mesh, parameters).values()))
    return max(sizes)


def smallest_cluster(config: Config, gpus: int, cluster: Cluster, fixed: Mapping[str, Any]) -> int | None:
    """The number of GPUs, doubled from `gpus`, that has a layout that fits; None: no number has."""
    while gpus < _MAX_GPUS:
        gpus *= 2
        if min(config.train.batch_sizes) < gpus:  # every replica needs a sequence
            batch = max(gpus, config.train.global_batch)
            config = replace(config, train=replace(config.train, global_batch=batch, batch_ramp=()))
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
    if not _has_layout(config, gpus, fixed):
        raise UserError(_no_layout(config, gpus, fixed))


def _has_layout(config: Config, gpus: int, fixed: Mapping[str, Any]) -> bool:
    return next(candidates(config, gpus, fixed), None) is not None


def _no_layout(config: Config, gpus: int, fixed: Mapping[str, Any]) -> str:
    """That no layout divides these GPUs, and the nearest numbers of GPUs that have one."""
    batch = config.train.global_batch
    working = []
    for other in sorted(_possible_gpus(config, fixed, 2 * gpus), key=lambda other: abs(other - gpus)):
        if _has_layout(config, other, fixed):
            working.append(other)
        if len(working) == 2:
            break
    problem = f"--gpus {gpus}"
    if fixed:
        problem += " with --fixed " + ", ".join(f"{name}={value}" for name, value in fixed.items())
    ramp = " and the batches of train.batch_ramp" if config.train.batch_ramp else ""
    problem += f": no layout divides a global batch of {count(batch, 'sequence')}{ramp} among these GPUs"
    if working:
        problem += f"; nearest that works: --gpus {' or '.join(map(str, nearest(gpus, working)))}"
    return problem + f", or another --global-batch, such as {max(1, batch // gpus) * gpus}"


def _possible_gpus(config: Config, fixed: Mapping[str, Any], limit: int) -> set[int]:
    """Numbers of GPUs that consist of replicas among which the batch divides; no other number has a layout."""
    pipes = [fixed["pipe"]] if "pipe" in fixed else _PIPES
    tensors = [fixed["tensor"]] if "tensor" in fixed else divisors(config.model.n_heads)
    replicas = divisors(math.gcd(*config.train.batch_sizes))
    contexts = [fixed["context"]] if "context" in fixed else CONTEXTS
    numbers = {math.prod(sizes) for sizes in product(pipes, contexts, tensors, replicas)}
    return {number for number in numbers if number <= limit}
