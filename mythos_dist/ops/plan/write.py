"""A planned layout as a config file that trains."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mythos_dist.config.load import dump_settings
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.ops.plan.estimate import Estimate
from mythos_dist.ops.plan.memory import PARTS
from mythos_dist.units import count

BEGIN, END = "# planned: begin", "# planned: end"  # `planned_lines` stand between them


def planned_lines(found: Estimate, command: str, measured: Any = None) -> list[str]:
    """The plan, and what a dry run of the same rank has measured, as comments of a config; a test makes them anew."""
    stage, p, usable = found.fullest, found.config.parallel, found.cluster.usable / 1e9
    lines = [
        f"# {command}",
        f"# {found.world_size} x {found.cluster.name}: {count(found.replicas, 'replica')} of "
        f"{count(p.pipe * p.tensor, 'rank')}",
        f"# memory, plan: {_memory(stage.memory)} GB of {usable:.1f}",
    ]
    if measured:
        m = measured.micro_batches
        lines += [
            f"# memory, dry run: {_memory(measured.memory)} GB",
            f"# {count(m, 'micro-batch', 'micro-batches')}: {found.flops(stage, m):.4e} FLOPs planned, "
            f"{measured.flops:.4e} in the dry run",
        ]
    lines.append(
        f"# step {found.step_seconds:.1f} s, {found.tokens_per_second:,.0f} tokens/s, MFU {found.mfu:.1%} (modelled)"
    )
    return [BEGIN, *lines, END]


def _memory(memory: Mapping[str, float]) -> str:
    parts = " + ".join(f"{part} {memory.get(part, 0) / 1e9:.1f}" for part in PARTS)
    return f"{parts} = {sum(memory.values()) / 1e9:.1f}"


def layout_settings(config: Config) -> dict[str, dict[str, Any]]:
    """The settings that a layout is made of, by section."""
    p, train = config.parallel, config.train
    parallel = {name: getattr(p, name) for name in ("tensor", "expert", "pipe", "sequence", "zero")}
    return {
        "train": {
            "seq_len": train.seq_len,
            "global_batch": train.global_batch,
            "micro_batch": train.micro_batch,
            "recompute": train.recompute,
        },
        "parallel": parallel,
    }


def write_config(found: Estimate, path: Path) -> None:
    """Write what differs from a config's defaults, with the plan above it. Raises UserError if the file is there."""
    config, default = found.config, Config()
    sections: dict[str, dict[str, Any]] = {}
    for field in dataclasses.fields(Config):
        of, plain = getattr(config, field.name), getattr(default, field.name)
        changed = {key: value for key, value in vars(of).items() if value != getattr(plain, key)}
        if changed:
            sections[field.name] = changed
    for name, settings in layout_settings(config).items():
        sections.setdefault(name, {}).update(settings)
    p = config.parallel
    fixed = f"tensor={p.tensor} expert={p.expert} pipe={p.pipe}"
    command = f"planned for {count(found.world_size, 'GPU')}; --fixed {fixed} gives it again"
    text = "\n".join(planned_lines(found, command)) + "\n# Set data.path and run.dir.\n"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text + dump_settings(sections))
    except FileExistsError:
        raise UserError(f"--write {path}: the file is there; give another name, or remove it") from None
    except OSError as error:
        raise UserError(f"--write {path}: {error.strerror}") from None
