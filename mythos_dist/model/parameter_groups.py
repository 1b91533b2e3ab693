"""The optimizer's parameter groups: what decays, what does not, and experts that are spread over ranks."""

import torch
from torch import nn

from mythos_dist.config.schema import OptimConfig
from mythos_dist.parallel.mesh import SINGLE, Mesh
from mythos_dist.parallel.pipeline import GROUP_ALIGNMENT
from mythos_dist.parallel.tensor import expert_group_name


def parameter_groups(model: nn.Module, optim: OptimConfig, mesh: Mesh = SINGLE) -> list[dict]:
    """AdamW's groups: what `OptimConfig.decays` names, and what it does not; DeepSpeed wants experts that are spread
    over ranks in groups of their own.

    DeepSpeed adds up one gradient norm per group over all stages of a pipeline, so every stage has the same groups in
    the same order. And stages that hold the same weights must step them alike, to the last bit, though ZeRO lays
    different ones beside them: on CPUs Adam rounds the last few numbers of a tensor otherwise than those that fill a
    register. So in a pipeline each group is filled up, with zeros that never get a gradient.
    """
    experts = {"moe": True, "name": expert_group_name(mesh.expert)} if mesh.expert.size > 1 else {}
    groups = {
        "decay": {"weight_decay": optim.weight_decay, "params": []},
        "keep": {"weight_decay": 0.0, "params": []},
        "experts": {"weight_decay": optim.weight_decay, "params": [], **experts},
    }
    for name, parameter in model.named_parameters():
        if not getattr(parameter, "allreduce", True):
            groups["experts"]["params"].append(parameter)
        else:
            groups["decay" if optim.decays(name) else "keep"]["params"].append(parameter)
    if not experts:
        del groups["experts"]
    if mesh.pipe.size > 1:
        device = next(model.parameters()).device
        for name, group in groups.items():
            spread = name == "experts" and len(group["params"]) > 0
            if not group["params"]:  # no group of experts for DeepSpeed, where this stage has none
                groups[name] = group = {"weight_decay": 0.0, "params": []}
            whole = GROUP_ALIGNMENT * (mesh.expert_data.size if spread else mesh.data.size)
            numbers = sum(parameter.numel() for parameter in group["params"])
            if missing := -numbers % whole or whole * (numbers == 0):
                filling = nn.Parameter(torch.zeros(missing, device=device))
                if spread:
                    filling.allreduce, filling.group_name = False, experts["name"]  # type: ignore[attr-defined]
                group["params"].append(filling)
    return [group for group in groups.values() if group["params"]]
