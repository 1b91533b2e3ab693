"""What `tools/plan.py` prints: layouts as a table, the best one in detail, a dry run beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

from mythos_dist.ops.plan.estimate import Estimate
from mythos_dist.ops.plan.memory import PARTS
from mythos_dist.ops.plan.search import Found
from mythos_dist.units import count, short

_HEAD = (
    "tensor expert pipe data zero seq micro recompute | params grads optim saved  work  comm total GB | step s tokens/s"
    "   MFU bubble"
)


def table(estimates: Sequence[Estimate]) -> list[str]:
    """A line per layout."""
    return [_HEAD, *(_row(found) for found in estimates)]


def _row(found: Estimate) -> str:
    p, train, memory = found.config.parallel, found.config.train, found.fullest.memory
    parts = " ".join(f"{memory.get(part, 0) / 1e9:5.1f}" for part in PARTS)
    return (
        f"{p.tensor:6} {p.expert:6} {p.pipe:4} {found.replicas:4} {p.zero:4} {'yes' if p.sequence else 'no':>3} "
        f"{train.micro_batch:5} {train.recompute:>9} |  {parts} {found.fullest.bytes / 1e9:5.1f}    | "
        f"{found.step_seconds:6.1f} {short(found.tokens_per_second):>8} {found.mfu:5.1%} "
        f"{found.seconds['bubble'] / found.step_seconds:6.1%}"
    )


def details(found: Estimate, tokens: float) -> list[str]:
    """The figures of one layout: seconds by part, FLOPs, bytes by axis, what a number of tokens costs."""
    total = found.step_seconds
    parts = sorted(found.seconds.items(), key=lambda item: -item[1])
    stage = max(found.stages, key=lambda stage: found.flops(stage))
    hours = found.gpu_hours(tokens)
    dollars = hours * found.cluster.dollars_per_gpu_hour
    lines = [
        f"parameters      {found.parameters / 1e9:.3f} billion on the fullest rank",
        f"step            {total:.2f} s: " + ", ".join(f"{name} {s:.2f}" for name, s in parts if s >= total / 1000),
        f"FLOPs           {found.model_flops / found.world_size:.3e} of the model per GPU and step, "
        f"{found.flops(stage):.3e} executed ({count(found.micro_batches, 'micro-batch', 'micro-batches')})",
        *_bytes(found.communication(stage)),
        f"{short(tokens)} tokens ".ljust(16)
        + f"{hours:,.0f} GPU-hours, {hours / found.world_size / 24:,.1f} days"
        + (f", ${dollars:,.0f} at ${found.cluster.dollars_per_gpu_hour:.2f} per GPU-hour" if dollars else ""),
    ]
    return lines


def _bytes(communication: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Bytes per axis and step, a line per axis."""
    lines = []
    for axis, kinds in sorted(communication.items(), key=lambda item: -sum(item[1].values())):
        if (total := sum(kinds.values())) >= 1e6:
            each = ", ".join(f"{kind} {size / 1e9:.3f}" for kind, size in sorted(kinds.items()) if size >= 1e5)
            lines.append(f"over {axis} ".ljust(16) + f"{total / 1e9:.3f} GB per step and GPU: {each}")
    return lines


def advice(found: Found) -> list[str]:
    """Whether pipeline stages and a higher expert degree pay, and where the time goes."""
    best, lines = found.best[0], []
    by_pipe = {
        p: min(
            (e for e in found.best_by_pipe.values() if (e.config.parallel.pipe > 1) == p),
            default=None,
            key=lambda e: e.step_seconds,
        )
        for p in (False, True)
    }
    without, with_stages = by_pipe[False], by_pipe[True]
    if without and with_stages:
        ratio = with_stages.step_seconds / without.step_seconds
        p = with_stages.config.parallel
        lines.append(
            f"pipeline stages {'do not pay' if ratio > 1 else 'pay'}: the best layout with them (pipe {p.pipe}, tensor "
            f"{p.tensor}, expert {p.expert}) takes {ratio:.2f} times as long as the best without. Every stage holds "
            "the whole looped block."
        )
    elif without:
        lines.append(
            "pipeline stages do not pay: no layout with them was found that fits. Every stage holds the whole looped "
            "block."
        )
    elif with_stages:
        lines.append("only layouts with pipeline stages fit")
    degrees = sorted(found.best_by_expert.items())
    if len(degrees) > 1:
        most, mine = degrees[-1][0], best.config.parallel.expert
        ratio = found.best_by_expert[most].step_seconds / best.step_seconds
        if most > mine:
            lines.append(f"more experts per group do not pay: expert {most} takes {ratio:.3f} times as long as {mine}")
    return lines


def why_not(found: Found, smallest: int | None) -> list[str]:
    """Nothing fits: the layout that needs least, the part that is too large, the cluster that would do."""
    tightest = found.tightest
    if tightest is None:
        return ["no layout can be dealt out to these GPUs"]
    memory, cluster = tightest.fullest.memory, tightest.cluster
    part = max(memory, key=lambda name: memory[name])
    lines = [
        f"nothing fits: the least that a layout needs is {tightest.fullest.bytes / 1e9:.1f} GB of the "
        f"{cluster.usable / 1e9:.1f} GB that {cluster.name} leaves a run",
        f"what is too large: {part}, {memory[part] / 1e9:.1f} GB",
        f"the smallest cluster that would do: {count(smallest, 'GPU')}"
        if smallest
        else "no number of these GPUs would do",
    ]
    return [*lines, *table([tightest])]


def beside(found: Estimate, measured: Any) -> list[str]:
    """A plan and the dry run of the same rank and micro-batches, line by line."""
    stage = found.fullest
    planned = {part: stage.memory.get(part, 0.0) for part in PARTS}
    lines = [f"{'':26} {'plan':>16} {'dry run':>16}"]

    def line(name: str, plan: float, dry: float, form: str, unit: str) -> None:
        lines.append(f"{name:26} {plan:>16{form}} {dry:>16{form}} {unit}".rstrip())

    line("parameters of the rank", found.parameters, measured.parameters, ",", "")
    for part in PARTS:
        line(part, planned[part] / 1e9, measured.memory[part] / 1e9, ".3f", "GB")
    line("peak memory", sum(planned.values()) / 1e9, sum(measured.memory.values()) / 1e9, ".3f", "GB")
    m = measured.micro_batches
    line(
        f"FLOPs, {count(m, 'micro-batch', 'micro-batches')}",
        found.flops(stage, m) / 1e12,
        measured.flops / 1e12,
        ".3f",
        "T",
    )
    plan = found.communication(stage, m)
    for axis in sorted(plan.keys() | measured.communication.keys()):
        for kind in sorted(plan.get(axis, {}).keys() | measured.communication.get(axis, {}).keys()):
            there = measured.communication.get(axis, {}).get(kind, 0)
            line(f"{axis} {kind}", plan.get(axis, {}).get(kind, 0), there, ",", "bytes")
    return lines


def as_json(found: Estimate, tokens: float) -> dict[str, Any]:
    """One layout's figures for a program; bytes, seconds, FLOPs."""
    p, train = found.config.parallel, found.config.train
    return {
        "layout": {
            **{name: getattr(p, name) for name in ("tensor", "expert", "pipe", "zero", "sequence")},
            "data": found.replicas,
            "micro_batch": train.micro_batch,
            "recompute": train.recompute,
            "recompute_every": train.recompute_every,
        },
        "memory_bytes": {part: round(found.fullest.memory.get(part, 0)) for part in PARTS},
        "memory_total": round(found.fullest.bytes),
        "fits": found.fits,
        "parameters": found.parameters,
        "model_flops": found.model_flops,
        "executed_flops": found.flops(found.fullest),
        "communication_bytes": found.communication(found.fullest),
        "seconds": found.seconds,
        "step_seconds": found.step_seconds,
        "tokens_per_second": found.tokens_per_second,
        "mfu": found.mfu,
        "gpu_hours": found.gpu_hours(tokens),
        "dollars": found.gpu_hours(tokens) * found.cluster.dollars_per_gpu_hour,
    }
