"""The optimizer's parameter groups: what decays, what does not, and experts that are spread over ranks."""

import torch
from torch import nn

from mythos_dist.config.schema import OptimConfig
from mythos_dist.parallel.mesh import SINGLE, Mesh
from mythos_dist.parallel.tensor import expert_group_name

# Not decayed: norms, injection, halting, biases, embeddings (the depth LoRA's scale is one too).
_NO_DECAY = ("norm.weight", "injection.", "act.", "bias", "embed.", "lora.scale")


def parameter_groups(model: nn.Module, optim: OptimConfig, mesh: Mesh = SINGLE) -> list[dict]:
    """AdamW's groups: matrices decay, everything that `_NO_DECAY` names does not; DeepSpeed wants experts that are
    spread over ranks in groups of their own.

    DeepSpeed adds up one gradient norm per group over all stages of a pipeline, so every stage has the same groups in
    the same order: where a stage holds nothing of a group, a single zero that never gets a gradient stands in.
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
            groups["keep" if any(part in name for part in _NO_DECAY) else "decay"]["params"].append(parameter)
    if not experts:
        del groups["experts"]
    for name, group in groups.items():
        if mesh.pipe.size > 1 and not group["params"]:
            groups[name] = {
                "weight_decay": 0.0,
                "params": [nn.Parameter(torch.zeros(1, device=next(model.parameters()).device))],
            }
    return [group for group in groups.values() if group["params"]]
