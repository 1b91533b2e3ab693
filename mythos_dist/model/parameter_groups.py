"""The optimizer's parameter groups: matrices, all other parameters, and experts that are sharded over ranks.

DeepSpeed requires sharded experts in a group of their own. It sums one gradient norm per group over all pipeline
stages, so every stage has the same groups in the same order. Stages that hold the same weights must also update them
bit for bit alike, though ZeRO places different parameters beside them: on CPUs Adam rounds the last elements of a
tensor, which do not fill a vector register, differently from the others. So in a pipeline each group is padded with
zeros that never get a gradient.
"""

from collections import Counter
from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import torch
from torch import nn

from mythos_dist.config.schema import Config, MythosConfig, OptimConfig
from mythos_dist.model.flops import stage_specs
from mythos_dist.model.parameter_table import LocalParameter, local_parameter, local_parameters
from mythos_dist.parallel.mesh import SINGLE, Mesh
from mythos_dist.parallel.pipeline import GROUP_ALIGNMENT, StageSpec
from mythos_dist.parallel.tensor import expert_group_name

_ALIGNMENT = 2  # of partitions in elements (DeepSpeed's nccl_start_alignment_factor)


class GroupSpec(NamedTuple):
    """One parameter group of a rank."""

    parameters: list[LocalParameter]
    decays: bool  # matrices: with weight decay, and by Muon if it is used
    expert_sharded: bool
    padding: int  # elements

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters) + self.padding

    def partition(self, replicas: int) -> int:
        """Elements of each replica in ZeRO-1 and 2; DeepSpeed pads the last one."""
        return ceil(self.numel / (_ALIGNMENT * replicas)) * _ALIGNMENT


def plan_groups(parameters: Sequence[LocalParameter], mesh: Mesh) -> list[GroupSpec]:
    """The groups of a rank's parameters."""
    matrices, others, experts = [], [], []
    for parameter in parameters:
        if parameter.expert_sharded:
            experts.append(parameter)
        else:
            (matrices if OptimConfig.decays(parameter.name) else others).append(parameter)
    members = [(matrices, True), (others, False)]
    if mesh.expert.size > 1:
        members.append((experts, True))
    groups = []
    for held, decays in members:
        expert_sharded = held is experts and len(held) > 0  # a stage without experts: a group of padding only
        numel, padding = sum(parameter.numel for parameter in held), 0
        if mesh.pipe.size > 1:
            multiple = GROUP_ALIGNMENT * (mesh.expert_data if expert_sharded else mesh.data_context).size
            padding = -numel % multiple if numel else multiple
        if numel + padding:
            groups.append(GroupSpec(held, decays, expert_sharded, padding))
    return groups


class KeptGradients(NamedTuple):
    """What ZeRO-2 keeps on the replica that keeps most."""

    elements: int
    replica: int  # index on the data axis


def kept_gradients(groups: Sequence[GroupSpec], mesh: Mesh) -> KeptGradients:
    """ZeRO-2 keeps the gradient of each parameter of which a part is in a rank's partition, completely
    (zero/stage_1_and_2.py, copy_grads_in_partition). This is for the first context rank of each replica, as all plans
    are; another context rank may keep one parameter more."""
    changes: Counter[int] = Counter()  # of the elements that are kept, from a replica on
    context = mesh.context.size
    for group in groups:
        alike = mesh.expert.size if group.expert_sharded else 1  # neighboring ranks with the same partition
        size, first = group.partition(mesh.data_context.size // alike), 0
        for parameter in group.parameters:
            begin, end = first // size * alike, ((first + parameter.numel - 1) // size + 1) * alike
            first += parameter.numel
            changes[-(-begin // context)] += parameter.numel
            changes[-(-end // context)] -= parameter.numel
    kept, most = 0, KeptGradients(0, 0)
    for replica, change in sorted(changes.items()):
        kept += change
        if kept > most.elements:
            most = KeptGradients(kept, replica)
    return most


def rank_groups(config: MythosConfig, mesh: Mesh, stage: StageSpec) -> list[GroupSpec]:
    """The groups of a rank of pipeline stage `stage`."""
    return plan_groups(local_parameters(config, mesh.tensor.size, mesh.expert.size, stage), mesh)


def count_elements(config: Config, mesh: Mesh) -> int:
    """Elements of all groups of the rank with this `mesh`."""
    return sum(group.numel for group in rank_groups(config.model, mesh, stage_specs(config)[mesh.pipe.rank]))


def parameter_groups(model: nn.Module, optim: OptimConfig, mesh: Mesh = SINGLE) -> list[dict]:
    """The groups of a model as torch's optimizers take them; those of Muon have `muon_spec`, a `GroupSpec`."""
    named = dict(model.named_parameters())
    groups = []
    for spec in plan_groups([local_parameter(name, value) for name, value in named.items()], mesh):
        group = {
            "params": [named[parameter.name] for parameter in spec.parameters],
            "weight_decay": optim.weight_decay if spec.decays else 0.0,
        }
        if spec.padding:
            padding = nn.Parameter(torch.zeros(spec.padding, device=next(model.parameters()).device))
            if spec.expert_sharded:
                padding.allreduce, padding.group_name = False, expert_group_name(mesh.expert)  # type: ignore[attr-defined]
            group["params"].append(padding)
        if spec.expert_sharded:
            group |= {"moe": True, "name": expert_group_name(mesh.expert)}
        if spec.decays and optim.name == "muon":
            group["muon_spec"] = spec
        groups.append(group)
    return groups
