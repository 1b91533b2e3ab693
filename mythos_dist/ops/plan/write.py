"""A planned layout as a config file that trains."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mythos_dist.config.dump import dump_settings
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.files import make_folders, write_atomically
from mythos_dist.ops.plan.estimate import Estimate
from mythos_dist.ops.plan.memory import PARTS
from mythos_dist.units import count

BEGIN, END = "# planned: begin", "# planned: end"  # around `planned_lines`


def planned_lines(estimate: Estimate, command: str, measured: Any = None) -> list[str]:
    """The plan, and the dry run of the same rank, as comments of a config; a test generates them again."""
    stage, usable = estimate.largest_stage, estimate.cluster.usable / 1e9
    lines = [
        f"# {command}",
        f"# {estimate.world_size} x {estimate.cluster.name}: {count(estimate.replicas, 'replica')} of "
        f"{count(estimate.config.parallel.ranks_per_replica, 'rank')}",
        f"# memory, plan: {_memory(stage.memory)} GB of {usable:.1f}",
    ]
    if estimate.host:
        lines.append(f"# host memory, plan: {estimate.host / 1e9:.1f} GB per GPU of saved hidden states")
    if measured:
        m = measured.micro_batches
        lines += [
            f"# memory, dry run: {_memory(measured.memory)} GB",
            f"# {count(m, 'micro-batch', 'micro-batches')}: {estimate.flops(stage, m):.4e} FLOPs planned, "
            f"{measured.flops:.4e} in the dry run",
        ]
    seconds, rate = estimate.step_seconds, estimate.tokens_per_second
    lines.append(f"# step {seconds:.1f} s, {rate:,.0f} tokens/s, MFU {estimate.mfu:.1%} (modeled)")
    return [BEGIN, *lines, END]


def _memory(memory: Mapping[str, float]) -> str:
    parts = " + ".join(f"{part} {memory.get(part, 0) / 1e9:.1f}" for part in PARTS)
    return f"{parts} = {sum(memory.values()) / 1e9:.1f}"


def layout_settings(config: Config) -> dict[str, dict[str, Any]]:
    """The settings that define a layout, by section."""
    p, train = config.parallel, config.train
    axes = ["tensor", *(["context"] if p.context > 1 else []), "expert", "pipe", "sequence", "zero"]
    return {
        "train": {name: getattr(train, name) for name in ("seq_len", "global_batch", "micro_batch", "recompute")},
        "parallel": {name: getattr(p, name) for name in axes},
    }


def write_config(estimate: Estimate, path: Path) -> None:
    """Write what differs from a config's defaults, with the plan above it. Raises UserError if the file exists."""
    config, default = estimate.config, Config()
    sections: dict[str, dict[str, Any]] = {}
    for field in dataclasses.fields(Config):
        section, defaults = getattr(config, field.name), getattr(default, field.name)
        changed = {key: value for key, value in vars(section).items() if value != getattr(defaults, key)}
        if changed:
            sections[field.name] = changed
    for name, settings in layout_settings(config).items():
        sections.setdefault(name, {}).update(settings)
    p = config.parallel
    fixed = f"tensor={p.tensor}{f' context={p.context}' if p.context > 1 else ''} expert={p.expert} pipe={p.pipe}"
    command = f"planned for {count(estimate.world_size, 'GPU')}; reproduce with --fixed {fixed}"
    text = "\n".join(planned_lines(estimate, command)) + "\n# Set data.path and run.dir.\n"
    if os.path.lexists(path):
        raise UserError(f"--write {path}: the file exists; give another name, or delete it")
    try:
        make_folders(path.parent)
        write_atomically(path, text + dump_settings(sections))
    except OSError as error:
        raise UserError(f"--write {path}: {error.strerror}") from None
