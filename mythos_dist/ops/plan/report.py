"""What `mythos plan` prints: layouts as a table, the best one in detail, a dry run beside the plan."""

from collections.abc import Mapping, Sequence
from typing import Any

from mythos_dist.config.schema import Config
from mythos_dist.model.flops import attention_share
from mythos_dist.model.kv_cache import cache_bytes_per_token
from mythos_dist.ops.plan.estimate import Estimate
from mythos_dist.ops.plan.memory import PARTS
from mythos_dist.ops.plan.search import SearchResult
from mythos_dist.units import count, short

CACHE_MODES = ("all", "every:4", "last")
_HEADER = (
    "expert pipe data zero seq micro recompute | params grads optim  acts  work  comm total GB | step s tokens/s"
    "   MFU bubble"
)


def layout_table(estimates: Sequence[Estimate]) -> list[str]:
    """One row per layout, with a column for the context axis if a layout uses it."""
    context = any(estimate.config.parallel.context > 1 for estimate in estimates)
    header = f"tensor {'context ' if context else ''}{_HEADER}"
    return [header, *(_row(estimate, context) for estimate in estimates)]


def _row(estimate: Estimate, context: bool) -> str:
    p, train, stage = estimate.config.parallel, estimate.config.train, estimate.largest_stage
    parts = " ".join(f"{stage.memory.get(part, 0) / 1e9:5.1f}" for part in PARTS)
    return (
        f"{p.tensor:6} {f'{p.context:7} ' if context else ''}{p.expert:6} {p.pipe:4} {estimate.replicas:4} {p.zero:4} "
        f"{'yes' if p.sequence else 'no':>3} {train.micro_batch:5} {train.recompute:>9} |  {parts} "
        f"{stage.bytes / 1e9:5.1f}    | "
        f"{estimate.step_seconds:6.1f} {short(estimate.tokens_per_second):>8} {estimate.mfu:5.1%} "
        f"{estimate.seconds['bubble'] / estimate.step_seconds:6.1%}"
    ) + saving(estimate.config)


def saving(config: Config) -> str:
    """What a layout has besides the table's columns to save memory, as settings; empty: nothing."""
    train = config.train
    chunk = f"  chunk_tokens={train.chunk_tokens}" if config.chunk_size else ""
    return chunk + (f"  offload={train.offload}" if train.offload != "none" else "")


def details(estimate: Estimate, tokens: float) -> list[str]:
    """One layout: seconds by part, FLOPs, bytes by axis, and the cost of training on `tokens` tokens."""
    total, config = estimate.step_seconds, estimate.config
    parts = sorted(estimate.seconds.items(), key=lambda item: -item[1])
    stage = max(estimate.stages, key=lambda stage: estimate.flops(stage))
    hours = estimate.gpu_hours(tokens)
    rate = estimate.cluster.dollars_per_gpu_hour
    cost = f"{hours:,.0f} GPU-hours, {hours / estimate.world_size / 24:,.1f} days"
    if hours * rate:
        cost += f", ${hours * rate:,.0f} at ${rate:.2f} per GPU-hour"
    return [
        f"parameters      {estimate.parameters / 1e9:.3f} billion per GPU of the largest stage",
        f"step            {total:.2f} s: " + ", ".join(f"{name} {s:.2f}" for name, s in parts if s >= total / 1000),
        f"FLOPs           {estimate.model_flops / estimate.world_size:.3e} of the model per GPU and step, "
        f"{estimate.flops(stage):.3e} executed ({count(estimate.micro_batches, 'micro-batch', 'micro-batches')})",
        f"attention       {attention_share(config.model, config.train.seq_len, estimate.loops[0]):.1%} of the model's "
        f"forward FLOPs at {count(config.train.seq_len, 'token')} without document boundaries",
        *_bytes(estimate.communication(stage)),
        *_host(estimate),
        f"{short(tokens)} tokens ".ljust(16) + cost,
        "KV cache        " + _cache(cache_by_mode(estimate)),
    ]


def cache_by_mode(estimate: Estimate) -> dict[str, int]:
    """Bytes of the KV cache per token of a sequence that is decoded in bf16 with the loops of training, by mode."""
    model, (n_loops, _) = estimate.config.model, estimate.loops
    return {mode: cache_bytes_per_token(model, n_loops, mode) for mode in CACHE_MODES}


def _cache(by_mode: Mapping[str, int]) -> str:
    modes = ", ".join(f"{mode} {size / 1e3:,.1f} kB" for mode, size in by_mode.items())
    return f"{modes} per token of a sequence in bf16 (decoding; docs/generation.md)"


def _host(estimate: Estimate) -> list[str]:
    """Saved hidden states in host memory, if there are any."""
    if not estimate.host:
        return []
    usable = estimate.cluster.usable_on_host
    limit = f" of {usable / 1e9:.0f}" if usable < float("inf") else ""
    return [f"host memory     {estimate.host / 1e9:.1f}{limit} GB per GPU of hidden states (train.offload)"]


def _bytes(communication: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Bytes per step, one line per axis."""
    lines = []
    for axis, kinds in sorted(communication.items(), key=lambda item: -sum(item[1].values())):
        total = sum(kinds.values())
        if total >= 1e6:
            each = ", ".join(f"{kind} {size / 1e9:.3f}" for kind, size in sorted(kinds.items()) if size >= 1e5)
            lines.append(f"over {axis} ".ljust(16) + f"{total / 1e9:.3f} GB per step and GPU: {each}")
    return lines


def advice(result: SearchResult) -> list[str]:
    """Whether pipeline stages and a higher expert degree make a step faster."""
    return [*_pipeline_advice(result.best_by_pipe), *_expert_advice(result)]


def _pipeline_advice(best_by_pipe: Mapping[int, Estimate]) -> list[str]:
    without = best_by_pipe.get(1)
    with_stages = min(
        (estimate for pipe, estimate in best_by_pipe.items() if pipe > 1),
        default=None,
        key=lambda estimate: estimate.step_seconds,
    )
    if with_stages is None:
        return ["pipeline stages do not pay: no layout with them fits. Every stage holds the whole looped block."]
    if without is None:
        return ["only layouts with pipeline stages fit"]
    ratio = with_stages.step_seconds / without.step_seconds
    p = with_stages.config.parallel
    return [
        f"pipeline stages {'do not pay' if ratio > 1 else 'pay'}: the best layout with them (pipe {p.pipe}, tensor "
        f"{p.tensor}, expert {p.expert}) takes {ratio:.2f} times as long as the best without. Every stage holds "
        "the whole looped block."
    ]


def _expert_advice(result: SearchResult) -> list[str]:
    best = result.best[0]
    highest, chosen = max(result.best_by_expert), best.config.parallel.expert
    if highest <= chosen:
        return []
    ratio = result.best_by_expert[highest].step_seconds / best.step_seconds
    return [f"a higher expert degree does not pay: expert {highest} takes {ratio:.3f} times as long as {chosen}"]


def does_not_fit(
    result: SearchResult, smallest_cluster: int | None, longest: Estimate | None, helps: Sequence[str]
) -> list[str]:
    """Lines for the case that nothing fits: the layout that needs least memory, its largest part, a cluster that is
    large enough, the longest sequences that fit on this one, and settings with which these would fit."""
    estimate = result.smallest
    if estimate is None:
        return ["no layout divides these GPUs"]
    stage, cluster = estimate.largest_stage, estimate.cluster
    part = max(stage.memory, key=lambda name: stage.memory[name])
    return [
        f"no layout fits: the smallest needs {stage.bytes / 1e9:.1f} GB per GPU, and {cluster.name} has "
        f"{cluster.usable / 1e9:.1f} GB for a run",
        f"largest part: {part}, {stage.memory[part] / 1e9:.1f} GB",
        f"smallest cluster with a layout that fits: {count(smallest_cluster, 'GPU')}"
        if smallest_cluster
        else "no number of these GPUs is enough",
        *_length_advice(estimate, longest, helps),
        *layout_table([estimate]),
    ]


def _length_advice(estimate: Estimate, longest: Estimate | None, helps: Sequence[str]) -> list[str]:
    """If the length is why nothing fits: shorter sequences fit."""
    if longest is None:
        return []
    p, wanted = longest.config.parallel, count(estimate.config.train.seq_len, "token")
    settings = (
        f"tensor={p.tensor} context={p.context} expert={p.expert} pipe={p.pipe} zero={p.zero}{saving(longest.config)}"
    )
    return [
        f"the length is why: {count(longest.config.train.seq_len, 'token')} fit on these GPUs, "
        f"{wanted} do not ({' '.join(settings.split())})",
        f"what helps at {wanted}, each alone: {'; '.join(helps)}"
        if helps
        else f"no other setting makes {wanted} fit on these GPUs: use more of them, or shorter sequences",
    ]


def compare(estimate: Estimate, measured: Any) -> list[str]:
    """The plan and the dry run of the same rank and micro-batches, line by line."""
    stage, m = estimate.largest_stage, measured.micro_batches
    lines = [f"{'':26} {'plan':>16} {'dry run':>16}"]

    def line(name: str, plan: float, dry: float, form: str, unit: str) -> None:
        lines.append(f"{name:26} {plan:>16{form}} {dry:>16{form}} {unit}".rstrip())

    line("parameters of the rank", estimate.parameters, measured.parameters, ",", "")
    for part in PARTS:
        line(part, stage.memory.get(part, 0.0) / 1e9, measured.memory[part] / 1e9, ".3f", "GB")
    line("peak memory", stage.bytes / 1e9, sum(measured.memory.values()) / 1e9, ".3f", "GB")
    if estimate.host or measured.host_memory:
        line("host memory", estimate.host / 1e9, measured.host_memory / 1e9, ".3f", "GB")
    micro_batches = count(m, "micro-batch", "micro-batches")
    line(f"FLOPs, {micro_batches}", estimate.flops(stage, m) / 1e12, measured.flops / 1e12, ".3f", "T")
    planned, dry = estimate.communication(stage, m), measured.communication
    for axis in sorted(planned.keys() | dry.keys()):
        of_plan, of_dry_run = planned.get(axis, {}), dry.get(axis, {})
        for kind in sorted(of_plan.keys() | of_dry_run.keys()):
            line(f"{axis} {kind}", of_plan.get(kind, 0), of_dry_run.get(kind, 0), ",", "bytes")
    return lines


def as_json(estimate: Estimate, tokens: float) -> dict[str, Any]:
    """One layout for a program: bytes, seconds, FLOPs."""
    p, train, stage = estimate.config.parallel, estimate.config.train, estimate.largest_stage
    hours = estimate.gpu_hours(tokens)
    return {
        "layout": {
            **{name: getattr(p, name) for name in ("tensor", "context", "expert", "pipe", "zero", "sequence")},
            "data": estimate.replicas,
            "micro_batch": train.micro_batch,
            "recompute": train.recompute,
            "recompute_every": train.recompute_every,
            "chunk_tokens": train.chunk_tokens,
            "offload": train.offload,
        },
        "cache_bytes_per_token": cache_by_mode(estimate),
        "memory_bytes": {part: round(stage.memory.get(part, 0)) for part in PARTS},
        "memory_total": round(stage.bytes),
        "host_memory_bytes": round(estimate.host),
        "fits": estimate.fits,
        "parameters": estimate.parameters,
        "model_flops": estimate.model_flops,
        "executed_flops": estimate.flops(stage),
        "communication_bytes": estimate.communication(stage),
        "seconds": estimate.seconds,
        "step_seconds": estimate.step_seconds,
        "tokens_per_second": estimate.tokens_per_second,
        "mfu": estimate.mfu,
        "gpu_hours": hours,
        "dollars": hours * estimate.cluster.dollars_per_gpu_hour,
    }
