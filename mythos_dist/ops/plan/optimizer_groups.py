"""The optimizer's parameter groups of one rank, as sizes: what `model.parameter_groups` builds for a model."""

from collections.abc import Iterable
from math import ceil
from typing import NamedTuple

from mythos_dist.config.schema import OptimConfig
from mythos_dist.model.parameter_table import LocalParameter
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.pipeline import GROUP_ALIGNMENT


class GroupSize(NamedTuple):
    """One parameter group."""

    expert_sharded: bool
    sizes: list[int]  # elements of each parameter that gets a gradient
    numel: int  # elements of the group, which pipelines pad


def group_sizes(parameters: Iterable[LocalParameter], mesh: Mesh) -> list[GroupSize]:
    """The groups of these parameters; `model.parameter_groups` says why pipelines pad them."""
    sizes: dict[str, list[int]] = {"decay": [], "no_decay": [], "experts": []}
    for parameter in parameters:
        if parameter.expert_sharded:
            sizes["experts"].append(parameter.numel)
        elif OptimConfig.decays(parameter.name):
            sizes["decay"].append(parameter.numel)
        else:
            sizes["no_decay"].append(parameter.numel)
    if mesh.expert.size == 1:
        del sizes["experts"]
    groups = []
    for name, numels in sizes.items():
        expert_sharded = name == "experts" and len(numels) > 0  # pipelines: an empty group of experts has no experts
        numel = sum(numels)
        if mesh.pipe.size > 1:
            multiple = GROUP_ALIGNMENT * (mesh.expert_data.size if expert_sharded else mesh.data.size)
            numel = max(1, ceil(numel / multiple)) * multiple
        if numel > 0:
            groups.append(GroupSize(expert_sharded, numels, numel))
    return groups
