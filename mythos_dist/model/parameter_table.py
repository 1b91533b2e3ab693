"""Names, shapes and shard axes of the model's parameters, read from one model on the meta device.

Building a model takes tens of milliseconds, and the planner compares thousands of layouts. So a model is built once per
`MythosConfig`, unsharded, and what a rank of any layout holds follows from the axes that `shard_parameter` records.
The trap: padding counts. A sharded dim gives every rank of the axis ceil(size / axis) elements, so all of them hold the
same number, and the shards of all ranks together are larger than the parameter.
"""

import functools
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import nn

from mythos_dist.config.schema import Config, MythosConfig
from mythos_dist.model.mythos import Mythos
from mythos_dist.parallel.pipeline import StageSpec
from mythos_dist.parallel.tensor import shard_of


class ParameterSpec(NamedTuple):
    """One parameter of the unsharded model."""

    name: str
    shape: tuple[int, ...]
    shard_axes: dict[int, str]  # the axis that a dim is sharded over, by dim
    gradient_sum: str | None  # when its gradient is all-reduced over the tensor axis; see parallel.tensor.replicated


class LocalParameter(NamedTuple):
    """One parameter as a rank holds it."""

    name: str
    shape: tuple[int, ...]  # padding included
    numel: int
    full_shape: tuple[int, ...]
    shard_axes: dict[int, str]
    expert_sharded: bool  # the parameter's `allreduce` is False
    gradient_sum: str | None


@functools.lru_cache(maxsize=64)
def parameter_specs(config: MythosConfig) -> tuple[ParameterSpec, ...]:
    """All parameters, in the order of `Mythos(config).named_parameters()`."""
    with torch.device("meta"):
        model = Mythos(config)
    return tuple(
        ParameterSpec(
            name,
            tuple(parameter.shape),
            getattr(parameter, "shard_axes", {}),
            getattr(parameter, "gradient_sum", None),
        )
        for name, parameter in model.named_parameters()
    )


@functools.lru_cache(maxsize=4096)
def local_parameters(
    config: MythosConfig, tensor: int = 1, expert: int = 1, stage: StageSpec | None = None
) -> tuple[LocalParameter, ...]:
    """The parameters of a rank of pipeline stage `stage` (None: all layers) on axes of `tensor` and `expert` ranks."""
    sizes = {"tensor": tensor, "expert": expert}
    held = []
    for spec in parameter_specs(config):
        if stage is not None and not _is_on_stage(spec.name, stage, config):
            continue
        shape = list(spec.shape)
        for dim, axis in spec.shard_axes.items():
            shape[dim] = ceil(shape[dim] / sizes[axis])
        expert_sharded = expert > 1 and "expert" in spec.shard_axes.values()
        held.append(
            LocalParameter(
                spec.name,
                tuple(shape),
                prod(shape),
                spec.shape,
                spec.shard_axes,
                expert_sharded,
                spec.gradient_sum,
            )
        )
    return tuple(held)


def local_parameter(name: str, parameter: nn.Parameter) -> LocalParameter:
    """The same of a parameter that exists, before DeepSpeed has changed it."""
    return LocalParameter(
        name,
        tuple(parameter.shape),
        parameter.numel(),
        shard_of(parameter).full_shape,
        getattr(parameter, "shard_axes", {}),
        not getattr(parameter, "allreduce", True),
        getattr(parameter, "gradient_sum", None),
    )


def _is_on_stage(name: str, stage: StageSpec, config: MythosConfig) -> bool:
    layer, _, rest = name.partition(".")
    if layer == "embed":
        return stage.holds_embedding(config)
    if layer == "recurrent":
        return stage.has_loops
    if layer in ("norm", "unembed"):
        return stage.is_last
    blocks = {"prelude": stage.prelude, "coda": stage.coda}[layer]
    return int(rest.partition(".")[0]) in blocks


def state_bytes(config: Config, name: str) -> int:
    """Bytes per element of a parameter's fp32 weights, moments (two of Adam, one of Muon) and average."""
    return (8 if config.optim.uses_muon(name) else 12) + (4 if config.average.kind != "off" else 0)


def checkpoint_bytes(config: Config) -> int:
    """Size of a checkpoint's tensors."""
    return sum(parameter.numel * state_bytes(config, parameter.name) for parameter in local_parameters(config.model))


def count_parameters(config: MythosConfig) -> int:
    """Parameters of the whole model; an embedding that is the head as well counts once."""
    return sum(parameter.numel for parameter in local_parameters(config))
