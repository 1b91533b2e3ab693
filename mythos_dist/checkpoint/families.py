"""Models of transformers that a looped model can begin with: their config.json as our settings, their tensors as ours.

A family is a `model_type`. What a config asks for and this model does not compute is a problem with its name: a
retrofit must never compute something else than the original.
The trap: transformers rotates channel i with channel i + d / 2 of a head, we rotate neighbors. So the rows of the
projections to queries and keys, their biases and norms are reordered; products do not change.
"""

# E experts, F hidden width, D model, d channels of a head.

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mythos_dist.model.rope import from_hugging_face

# What transformers takes where config.json is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
}  # fmt: skip
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FAMILIES = tuple(_DEFAULTS)
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_MIXTURES = ("mixtral", "qwen3_moe")
_NORMED_QUERIES = ("qwen3", "qwen3_moe")


class TensorSources(NamedTuple):
    """Which of their tensors one of ours is built from, and how."""

    names: tuple[str, ...]
    convert: Callable[[list[Tensor]], Tensor]


@dataclass
class PretrainedModel:
    """A config.json of a supported family."""

    kind: str
    values: dict[str, Any]
    problems: list[str] = field(default_factory=list)  # what this model does not compute

    @property
    def num_layers(self) -> int:
        return self.values["num_hidden_layers"]

    @property
    def head_dim(self) -> int:
        return self.values.get("head_dim") or self.values["hidden_size"] // self.values["num_attention_heads"]

    def is_mixture(self, layer: int) -> bool:
        """Whether the FFN of a layer is a mixture of experts."""
        if self.kind not in _MIXTURES:
            return False
        dense = self.values.get("mlp_only_layers") or []
        return layer not in dense and (layer + 1) % (self.values.get("decoder_sparse_step") or 1) == 0

    def settings(self) -> dict[str, Any]:
        """The fields of `MythosConfig` that the layers have, all but numbers of layers and experts."""
        v = self.values
        own = self.head_dim * v["num_attention_heads"] != v["hidden_size"]
        return {
            "vocab_size": v["vocab_size"],
            "dim": v["hidden_size"],
            "n_heads": v["num_attention_heads"],
            "n_kv_heads": v.get("num_key_value_heads") or v["num_attention_heads"],
            "gqa_head_dim": self.head_dim if own else 0,
            "max_seq_len": self._max_seq_len(),
            "attn_type": "gqa",
            "dense_dim": v["intermediate_size"],
            "norm_eps": v["rms_norm_eps"],
            "rope_theta": self._rope()["rope_theta"],
            "rope_scaling": self._rope_scaling(),
            "qkv_bias": self.kind == "qwen2",
            "qk_norm": self.kind in _NORMED_QUERIES,
            "key_norm_weight": self.kind in _NORMED_QUERIES,
            "tie_embeddings": bool(v["tie_word_embeddings"]),
        }

    def mixture_settings(self) -> dict[str, Any]:
        """The `MythosConfig` fields of a mixture of experts."""
        v = self.values
        qwen = self.kind == "qwen3_moe"
        return {
            "n_experts": v["num_experts" if qwen else "num_local_experts"],
            "n_experts_per_tok": v["num_experts_per_tok"],
            "n_shared_experts": 0,
            "expert_dim": v["moe_intermediate_size" if qwen else "intermediate_size"],
        }

    def _rope(self) -> dict[str, Any]:
        """With `rope_theta`; transformers 5 writes `rope_parameters`, earlier ones two settings."""
        v = self.values
        return {"rope_theta": v["rope_theta"], **(v.get("rope_scaling") or {}), **(v.get("rope_parameters") or {})}

    def _rope_type(self) -> str:
        return self._rope().get("rope_type") or self._rope().get("type") or "default"

    def _rope_scaling(self) -> dict[str, Any] | None:
        if self._rope_type() == "default":
            return None
        names = {"type", "rope_theta", "finetuned"}
        given = {"rope_type": self._rope_type(), **self._rope()}
        return from_hugging_face({name: value for name, value in given.items() if name not in names})

    def _max_seq_len(self) -> int:
        rope = self._rope()
        if self._rope_type() == "yarn" and rope.get("original_max_position_embeddings"):
            return round(rope["factor"] * rope["original_max_position_embeddings"])
        return self.values["max_position_embeddings"]

    def find_problems(self) -> Iterator[str]:
        """What these layers compute and ours do not."""
        v = self.values
        if v["hidden_act"] != "silu":
            yield f"hidden_act={v['hidden_act']!r}: FFNs here are SwiGLU (silu)"
        for key in ("attention_bias", "mlp_bias", "quantization_config"):
            if v.get(key):
                yield f"{key}={str(v[key])[:60]}: not supported"
        rope_type = self._rope_type()
        if rope_type not in ("default", "yarn", "llama3"):
            yield f"rope_type={rope_type!r}: rotary positions are supported as default, yarn or llama3"
        elif rope_type == "yarn" and not self._rope().get("original_max_position_embeddings"):
            yield "rope_type='yarn' without original_max_position_embeddings: not supported"
        if self._rope().get("partial_rotary_factor", v.get("partial_rotary_factor", 1)) != 1:
            yield "partial_rotary_factor: all channels of a head are rotary here"
        slides = v.get("sliding_window") if v.get("use_sliding_window", "qwen" not in self.kind) else None
        if slides and slides < self._max_seq_len():
            yield f"sliding_window={slides}, shorter than the context of {self._max_seq_len()}: attention here is full"
        if self.kind == "qwen3_moe" and not v.get("norm_topk_prob"):
            yield "norm_topk_prob=false: the weights of a token's experts sum to 1 here"


def parse_model(content: dict[str, Any]) -> PretrainedModel | list[str]:
    """A parsed config.json, with all its problems; a list of problems if it is of no supported family."""
    kind = content.get("model_type")
    if kind not in _DEFAULTS:
        return [f"model_type={kind!r:.60} is not supported; supported: {', '.join(FAMILIES)}"]
    defaults = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}
    values = {**defaults, **_DEFAULTS[kind], **content}
    if missing := [name for name in _REQUIRED if type(values.get(name)) is not int or values[name] < 1]:
        return [f"{', '.join(missing)}: missing in config.json, or no number"]
    model = PretrainedModel(kind, values)
    try:
        model.problems = list(model.find_problems())
        model.settings()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return [f"config.json cannot be read ({type(error).__name__}: {error})"]
    return model


def model_sources(model: PretrainedModel) -> dict[str, TensorSources]:
    """The sources of the tensors outside of layers."""
    names = {"embed.weight": EMBEDDING, "norm.weight": "model.norm.weight"}
    if not model.values["tie_word_embeddings"]:
        names["unembed.weight"] = HEAD
    return {ours: _as_it_is(theirs) for ours, theirs in names.items()}


def layer_sources(model: PretrainedModel, layer: int, ours: str, looped: bool) -> dict[str, TensorSources]:
    """The sources of the tensors of layer number `layer`, which is named `ours` here; a looped one has experts: a dense
    FFN becomes one expert, of which upcycling makes several."""
    theirs, sources = f"model.layers.{layer}.", {}
    for norm, name in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
        sources[f"{ours}.{norm}.weight"] = _as_it_is(f"{theirs}{name}.weight")
    for letter in "qkvo":
        for leaf in ("weight", "bias") if model.kind == "qwen2" and letter != "o" else ("weight",):
            name = f"{theirs}self_attn.{letter}_proj.{leaf}"
            source = _interleave_halves(name, model.head_dim) if letter in "qk" else _as_it_is(name)
            sources[f"{ours}.attn.w{letter}.{leaf}"] = source
    if model.kind in _NORMED_QUERIES:
        for norm, name in (("qk_norm", "q_norm"), ("k_norm", "k_norm")):
            theirs_norm = f"{theirs}self_attn.{name}.weight"
            sources[f"{ours}.attn.{norm}.weight"] = _interleave_halves(theirs_norm, model.head_dim)
    if model.is_mixture(layer):
        return sources | _mixture_sources(model, theirs, ours)
    for own, name in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
        full = f"{theirs}mlp.{name}.weight"
        if looped:
            sources[f"{ours}.ffn.experts.{_STACKED[own]}"] = _stacked([full], own)
        else:
            sources[f"{ours}.ffn.{own}.weight"] = _as_it_is(full)
    return sources


_STACKED = {"gate": "w1", "up": "w3", "down": "w2"}


def _mixture_sources(model: PretrainedModel, theirs: str, ours: str) -> dict[str, TensorSources]:
    part = "block_sparse_moe" if model.kind == "mixtral" else "mlp"
    names = _STACKED if model.kind == "mixtral" else {own: f"{own}_proj" for own in _STACKED}
    sources = {f"{ours}.ffn.router.weight": _as_it_is(f"{theirs}{part}.gate.weight")}
    experts = range(model.mixture_settings()["n_experts"])
    for own, name in names.items():
        every = [f"{theirs}{part}.experts.{e}.{name}.weight" for e in experts]
        sources[f"{ours}.ffn.experts.{_STACKED[own]}"] = _stacked(every, own)
    return sources


def _as_it_is(name: str) -> TensorSources:
    return TensorSources((name,), lambda parts: parts[0])


def _interleave_halves(name: str, head_dim: int) -> TensorSources:
    """Rows (heads * d, ...) in transformers' half-split rotary order -> in our interleaved pairs."""

    def convert(parts: list[Tensor]) -> Tensor:
        (rows,) = parts
        return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(rows.shape)

    return TensorSources((name,), convert)


def _stacked(names: list[str], own: str) -> TensorSources:
    """Matrices of experts -> (E, F, D)."""
    return TensorSources(tuple(names), lambda parts: torch.stack([part.T if own == "down" else part for part in parts]))
