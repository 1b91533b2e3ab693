"""What one rank holds, in closed form: a planner asks for tens of thousands of layouts, and building a model takes
tens of milliseconds even on the meta device.

Names, order and cuts are those of model/; tests hold every number against the real model. The trap: padding counts.
A cut dimension gives every rank of the axis ceil(size / axis) numbers, so all of them hold the same, also where the
last has little but zeros; and the parts of all ranks are more than the whole.
"""

# E experts, r rank of the depth LoRA.

import functools
from collections.abc import Iterable
from math import ceil, prod
from typing import NamedTuple

from mythos_dist.config.schema import MythosConfig, OptimConfig
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.pipeline import GROUP_ALIGNMENT, StageSpec


class Weight(NamedTuple):
    """One parameter as a rank holds it."""

    name: str
    numel: int  # in this rank's memory, padding included
    cut: bool  # over the tensor axis: the parameter's `tensor_model_parallel`
    spread: bool  # over the expert axis: the parameter's `allreduce` is False


class _Whole(NamedTuple):
    """One parameter of the whole model."""

    name: str
    shape: tuple[int, ...]
    tensor: int | None = None  # the dimension that is cut over the tensor axis
    expert: int | None = None  # and over the expert axis


@functools.lru_cache(maxsize=4096)
def weights_of(model: MythosConfig, tensor: int, expert: int, part: StageSpec) -> list[Weight]:
    """The parameters of a rank that holds `part` on axes of `tensor` and `expert` ranks, in the order of
    `Mythos(...).named_parameters()`. The list is kept for the next caller: do not change it."""
    return [_held(whole, tensor, expert) for whole in _whole(model, part)]


def total_parameters(model: MythosConfig) -> int:
    """Of the whole model; the embedding counts once, though it is the head as well."""
    return sum(weight.numel for weight in weights_of(model, 1, 1, StageSpec.full(model)))


class Group(NamedTuple):
    """One of the optimizer's parameter groups."""

    spread: bool  # holds experts that are spread over ranks
    sizes: list[int]  # numbers in each parameter that gets a gradient
    numel: int  # in all of it: a pipeline's groups are filled up


def group_sizes(weights: Iterable[Weight], mesh: Mesh) -> list[Group]:
    """`model.parameter_groups` of these weights, which says why pipelines fill groups up."""
    sizes: dict[str, list[int]] = {"decay": [], "keep": []} | ({"experts": []} if mesh.expert.size > 1 else {})
    for weight in weights:
        decays = OptimConfig.decays(weight.name)
        sizes["experts" if weight.spread else "decay" if decays else "keep"].append(weight.numel)
    groups = []
    for name, held in sizes.items():
        spread, numel = name == "experts" and len(held) > 0, sum(held)
        if mesh.pipe.size > 1:
            whole = GROUP_ALIGNMENT * (mesh.expert_data.size if spread else mesh.data.size)
            numel = max(1, ceil(numel / whole)) * whole
        if numel > 0:
            groups.append(Group(spread, held, numel))
    return groups


def _held(whole: _Whole, tensor: int, expert: int) -> Weight:
    """parallel/tensor.py: shard_parameter."""
    name, shape, cut, spread = whole
    local = list(shape)
    for dim, ranks in ((cut, tensor), (spread, expert)):
        if dim is not None:
            local[dim] = ceil(local[dim] / ranks)
    return Weight(name, prod(local), cut is not None and tensor > 1, spread is not None and expert > 1)


def _whole(c: MythosConfig, part: StageSpec) -> list[_Whole]:
    """model/mythos.py: what a pipeline stage has."""
    found = [_Whole("embed.weight", (c.vocab_size, c.dim), 0)] * (part.first or part.last)
    for i in part.prelude:
        found += _dense_block(c, f"prelude.{i}.")
    if part.has_loops:
        found += _recurrent(c, "recurrent.")
    for i in part.coda:
        found += _dense_block(c, f"coda.{i}.")
    return found + [_Whole("norm.weight", (c.dim,))] * part.last


def _dense_block(c: MythosConfig, at: str) -> list[_Whole]:
    """model/block.py."""
    return _attention(c, at) + _ffn(c.dim, c.ffn_dim, f"{at}ffn.")


def _attention(c: MythosConfig, at: str) -> list[_Whole]:
    """model/attention.py, between the block's two norms."""
    if c.attn_type == "mla":
        layers = [
            _Whole("q_down.weight", (c.q_lora_rank, c.dim), 0),
            _Whole("q_norm.weight", (c.q_lora_rank,)),
            _Whole("q_up.weight", (c.n_heads * c.head_dim, c.q_lora_rank), 0),
            _Whole("kv_down.weight", (c.kv_lora_rank + c.qk_rope_head_dim, c.dim), 0),
            _Whole("kv_norm.weight", (c.kv_lora_rank,)),
            _Whole("kv_up.weight", (c.n_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank), 0),
            _Whole("wo.weight", (c.dim, c.n_heads * c.v_head_dim), 1),
        ]
    else:
        layers = [
            _Whole("wq.weight", (c.dim, c.dim), 0),
            _Whole("wk.weight", (c.n_kv_heads * c.head_dim, c.dim), 0),
            _Whole("wv.weight", (c.n_kv_heads * c.head_dim, c.dim), 0),
            _Whole("wo.weight", (c.dim, c.dim), 1),
        ]
    if c.qk_norm:
        layers.append(_Whole("qk_norm.weight", (c.head_dim,)))
    layers = [whole._replace(name=f"{at}attn.{whole.name}") for whole in layers]
    return [_Whole(f"{at}attn_norm.weight", (c.dim,)), *layers, _Whole(f"{at}ffn_norm.weight", (c.dim,))]


def _ffn(dim: int, hidden: int, at: str) -> list[_Whole]:
    """model/moe.py: a dense SwiGLU."""
    return [
        _Whole(f"{at}gate.weight", (hidden, dim), 0),
        _Whole(f"{at}up.weight", (hidden, dim), 0),
        _Whole(f"{at}down.weight", (dim, hidden), 1),
    ]


def _recurrent(c: MythosConfig, at: str) -> list[_Whole]:
    """model/recurrence.py: norm, block with the mixture of experts, depth LoRA, injection, halting."""
    E, r = c.n_experts, c.lora_rank
    experts = [_Whole(f"{at}block.ffn.experts.{w}", (E, c.expert_dim, c.dim), 1, 0) for w in ("w1", "w2", "w3")]
    shared = _ffn(c.dim, c.shared_dim, f"{at}block.ffn.shared.") if c.shared_dim else []
    T = c.max_loop_iters
    lora = {
        "none": [],
        "shared": [_Whole("down", (r, c.dim), 0), _Whole("scale", (T, r), 1), _Whole("B", (r, c.dim), 0)],
        "per_loop": [_Whole("down", (T, r, c.dim), 1), _Whole("B", (T, r, c.dim), 1)],
    }[c.lora]
    injection = [_Whole("injection.log_A", (c.dim,)), _Whole("injection.log_dt", (1,)), _Whole("injection.B", (c.dim,))]
    if c.injection == "parcae":
        injection = [
            _Whole("e_norm.weight", (c.dim,)),
            _Whole("injection.log_A", (c.dim,)),
            _Whole("injection.delta", (c.dim,)),
            _Whole("injection.B.weight", (c.dim, c.dim), 1),
        ]
    halting = [_Whole(f"{at}act.halt.weight", (1, c.dim)), _Whole(f"{at}act.halt.bias", (1,))]
    return [
        _Whole(f"{at}norm.weight", (c.dim,)),
        *_attention(c, f"{at}block."),
        _Whole(f"{at}block.ffn.router.weight", (E, c.dim)),
        *experts,
        *shared,
        *(whole._replace(name=f"{at}lora.{whole.name}") for whole in lora),
        *(whole._replace(name=f"{at}{whole.name}") for whole in injection),
        *halting,
    ]
