"""The optimizer's parameter groups: with weight decay, without, and experts that are sharded over ranks."""

import torch
from torch import nn

from mythos_dist.config.schema import OptimConfig
from mythos_dist.parallel.mesh import SINGLE, Mesh
from mythos_dist.parallel.pipeline import GROUP_ALIGNMENT
from mythos_dist.parallel.tensor import expert_group_name


def parameter_groups(model: nn.Module, optim: OptimConfig, mesh: Mesh = SINGLE) -> list[dict]:
    """AdamW's groups: the parameters that `OptimConfig.decays` names, the others, and the experts if they are sharded
    over ranks, which DeepSpeed requires in a group of their own.

    DeepSpeed sums one gradient norm per group over all pipeline stages, so every stage has the same groups in the same
    order. Stages that hold the same weights must also update them bit for bit alike, though ZeRO places different
    parameters beside them: on CPUs Adam rounds the last elements of a tensor, which do not fill a vector register,
    differently from the others. So in a pipeline each group is padded with zeros that never get a gradient.
    """
    experts = {"moe": True, "name": expert_group_name(mesh.expert)} if mesh.expert.size > 1 else {}
    groups = {
        "decay": {"weight_decay": optim.weight_decay, "params": []},
        "keep": {"weight_decay": 0.0, "params": []},
    }
    if experts:
        groups["experts"] = {"weight_decay": optim.weight_decay, "params": [], **experts}
    for name, parameter in model.named_parameters():
        if not getattr(parameter, "allreduce", True):
            groups["experts"]["params"].append(parameter)
        else:
            groups["decay" if optim.decays(name) else "keep"]["params"].append(parameter)
    if mesh.pipe.size > 1:
        device = next(model.parameters()).device
        for name, group in groups.items():
            sharded = name == "experts" and len(group["params"]) > 0
            if not group["params"]:  # a stage without experts: padding only, which is no group of experts for DeepSpeed
                groups[name] = group = {"weight_decay": 0.0, "params": []}
            multiple = GROUP_ALIGNMENT * (mesh.expert_data.size if sharded else mesh.data.size)
            elements = sum(parameter.numel() for parameter in group["params"])
            missing = -elements % multiple if elements else multiple
            if missing:
                padding = nn.Parameter(torch.zeros(missing, device=device))
                if sharded:
                    padding.allreduce, padding.group_name = False, experts["name"]  # type: ignore[attr-defined]
                group["params"].append(padding)
    return [group for group in groups.values() if group["params"]]
