"""Convert OpenMythos' parameter names and shapes to ours and back, without arithmetic.

Four differences: two of our depth LoRA's weights lack `.weight`; the two query up-projections of MLA become one (per
head nope, then rope); routed experts are stacked (E, F, D) with `down` transposed; shared experts are concatenated
along their hidden width.
"""

import torch
from torch import Tensor

from mythos_dist.config.schema import BY_MODE, MythosConfig
from mythos_dist.errors import UserError

_FFN = "recurrent.block.ffn."
_OURS = {f"recurrent.lora.{leaf}.weight": f"recurrent.lora.{leaf}" for leaf in ("down", "scale")}
_STACKED = {"gate": "w1", "up": "w3", "down": "w2"}  # routed experts
_LOOPS = {key: value for key, value in BY_MODE["reference"].items() if key != "init"}
# Rotary tables, and the tied embedding, which transformers calls lm_head.
NOT_PARAMETERS = ("freqs_cis", "freqs_cis_mla", "head.weight", "lm_head.weight")


def unsupported_loop_settings(config: MythosConfig) -> list[str]:
    """The model's settings that OpenMythos does not support, as `model.key=value`."""
    return [f"model.{key}={_yaml(getattr(config, key))}" for key in _LOOPS if getattr(config, key) != _LOOPS[key]]


def check_loop_settings(config: MythosConfig) -> None:
    """Raises UserError if this model computes something other than OpenMythos with the same weights."""
    if unsupported := unsupported_loop_settings(config):
        train = BY_MODE["train"]
        needed = [key for key, value in _LOOPS.items() if value != train[key] or value != getattr(config, key)]
        supported = " ".join(f"model.{key}={_yaml(_LOOPS[key])}" for key in needed)
        raise UserError(
            f"OpenMythos' weights do not work with {', '.join(unsupported)}; set {supported} to train from them, "
            "or model.mode=reference for OpenMythos' results"
        )


def _yaml(value: bool | int | float | str) -> str:
    if isinstance(value, float):
        return f"{value:.1e}"  # YAML 1.1 takes 1e-06 for a text
    return str(value).lower() if isinstance(value, bool) else str(value)


def from_open_mythos(state: dict[str, Tensor], config: MythosConfig) -> dict[str, Tensor]:
    """OpenMythos' state dict (or gradients under the same names) -> ours. A subset works if it has all the tensors that
    one of ours is built from.

    Raises UserError if one is missing.
    """
    rest = {_OURS.get(name, name): value for name, value in state.items() if name not in NOT_PARAMETERS}
    ours: dict[str, Tensor] = {}
    try:
        for name in [n for n in rest if n.endswith("q_up_nope.weight")]:
            rope_name = name.replace("q_up_nope", "q_up_rope")
            parts = [rest.pop(n).unflatten(0, (config.n_heads, -1)) for n in (name, rope_name)]
            ours[name.replace("q_up_nope", "q_up")] = torch.cat(parts, dim=1).flatten(0, 1)
        for leaf, stacked in _STACKED.items():
            routed = _all_of("routed_experts", leaf, config.n_experts, rest)
            if routed:
                ours[f"{_FFN}experts.{stacked}"] = torch.stack([w.T if leaf == "down" else w for w in routed])
            shared = _all_of("shared_experts", leaf, config.n_shared_experts, rest)
            if shared:
                ours[f"{_FFN}shared.{leaf}.weight"] = torch.cat(shared, dim=1 if leaf == "down" else 0)
    except KeyError as error:
        raise UserError(
            f"the OpenMythos weights lack {error}; set `model.*` to the config that they were trained with"
        ) from None
    if f"{_FFN}router_bias" in rest:
        ours[f"{_FFN}router.bias"] = rest.pop(f"{_FFN}router_bias")
    return ours | rest


def open_mythos_shapes(name: str, shape: tuple[int, ...], config: MythosConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of OpenMythos' parameters for one of our tensors, without the head."""
    theirs = to_open_mythos({name: torch.empty(shape, device="meta")}, config)
    return {their: tuple(part.shape) for their, part in theirs.items() if their not in NOT_PARAMETERS}


def _all_of(what: str, leaf: str, number: int, state: dict[str, Tensor]) -> list[Tensor]:
    """Pop the weights of `number` experts from `state`; [] if it has none of them, KeyError if only some."""
    if not any(name.startswith(f"{_FFN}{what}.") and name.endswith(f".{leaf}.weight") for name in state):
        return []
    return [state.pop(f"{_FFN}{what}.{i}.{leaf}.weight") for i in range(number)]


def to_open_mythos(state: dict[str, Tensor], config: MythosConfig) -> dict[str, Tensor]:
    """The inverse of `from_open_mythos`, for all of our tensors or some; without rotary tables, with the embedding also
    as head."""
    names = {ours: name for name, ours in _OURS.items()}
    theirs = {names.get(name, name): value for name, value in state.items()}
    for name in [n for n in state if n.endswith("q_up.weight")]:
        heads = theirs.pop(name).unflatten(0, (config.n_heads, -1))
        nope, rope = heads.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=1)
        theirs[name.replace("q_up", "q_up_nope")] = nope.flatten(0, 1)
        theirs[name.replace("q_up", "q_up_rope")] = rope.flatten(0, 1)
    width = config.expert_dim * config.n_experts_per_tok
    for leaf, stacked in _STACKED.items():
        if (name := f"{_FFN}experts.{stacked}") in theirs:
            for e, w in enumerate(theirs.pop(name)):
                theirs[f"{_FFN}routed_experts.{e}.{leaf}.weight"] = w.T if leaf == "down" else w
        if (name := f"{_FFN}shared.{leaf}.weight") in theirs:
            for i, w in enumerate(theirs.pop(name).split(width, dim=1 if leaf == "down" else 0)):
                theirs[f"{_FFN}shared_experts.{i}.{leaf}.weight"] = w
    if (name := f"{_FFN}router.bias") in theirs:
        theirs[f"{_FFN}router_bias"] = theirs.pop(name)
    if "embed.weight" in theirs:
        theirs["head.weight"] = theirs["embed.weight"]
    return theirs
