"""FLOPs of the model: 2 per multiply-add of matrix multiplications, by the shapes of the weights; nothing else counts.

The FLOPs of the model do not depend on the layout, so that MFU compares layouts: no padding, no recomputation, the
causal half of attention, and three forward passes per training step (of no-grad loops one). The halting layer (one
column per loop) and readouts after each loop are left out. `executed_flops` is what one rank runs: padding,
recomputation and attention's second pass included. The ratio of the two is what padding and recomputation cost.
"""

# B batch, S sequence, D model, E experts, k experts per token.

import functools
from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple

from mythos_dist.config.schema import Config, MythosConfig
from mythos_dist.model.attention_sizes import attention_sizes
from mythos_dist.model.parameter_table import local_parameters
from mythos_dist.parallel.context import AttentionWork, attention_work, local_tokens
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.pipeline import LayerCosts, StageSpec, loops_with_grad, plan_loops, plan_stages


class _Matrices(NamedTuple):
    """Elements of a rank's weight matrices, padding included, by layer."""

    attention: int  # of one block, excluding the next three
    keys_values: int  # projections that loops with shared keys and values do not apply
    query_expansion: int  # from MLA's latents to queries, which selective recomputation repeats
    kv_expansion: int  # from MLA's latents to keys and values, likewise
    ffn: int  # of one dense block
    shared: int  # shared experts
    router: int
    lora: int  # as every rank gathers them: all of the rank r
    injection: int
    head: int
    expert_hidden: int  # width of one routed expert


@functools.lru_cache(maxsize=1024)
def _matrices(config: MythosConfig, tensor: int) -> _Matrices:
    matrices = [parameter for parameter in local_parameters(config, tensor) if len(parameter.shape) > 1]

    def elements(prefix: str) -> int:
        return sum(parameter.numel for parameter in matrices if parameter.name.startswith(prefix))

    shapes = {parameter.name: parameter.shape for parameter in matrices}
    block = "recurrent.block."  # the looped block's first layer; the others are as large

    def projections(names: tuple[str, ...]) -> int:
        return sum(elements(f"{block}attn.{name}.") for name in names)

    sizes = attention_sizes(config)
    query_expansion, kv_expansion = projections(sizes.query_expansions), projections(sizes.kv_expansions)
    keys_values = projections(sizes.kv_projections)
    lora = [shapes[name] for name in ("recurrent.lora.down", "recurrent.lora.B") if name in shapes]
    return _Matrices(
        attention=elements(f"{block}attn.") - query_expansion - kv_expansion - keys_values,
        keys_values=keys_values,
        query_expansion=query_expansion,
        kv_expansion=kv_expansion,
        ffn=elements("prelude.0.ffn." if config.prelude_layers else "coda.0.ffn."),
        shared=elements(f"{block}ffn.shared."),
        router=elements(f"{block}ffn.router."),
        lora=tensor * sum(prod(shape[-2:]) for shape in lora),  # lora=per_loop: one loop's matrix of (T, r, D)
        injection=elements("recurrent.injection."),
        head=elements("embed." if config.tie_embeddings else "unembed."),
        expert_hidden=shapes[f"{block}ffn.experts.w1"][1],
    )


@dataclass(frozen=True)
class LayerFlops:
    """Forward FLOPs of a layer; each is in one field."""

    matmuls: float = 0.0  # of weights, that only `recompute: loop` repeats
    attention: float = 0.0  # scores, and their matrix multiplication with the values
    attention_recomputed: float = 0.0  # MLA's expansions, which `recompute: selective` repeats
    ffn_hidden: float = 0.0  # FFNs and experts, which `recompute: selective` and layers that work in chunks repeat
    expansion: float = 0.0  # with context parallelism: of all ranks' keys and values, again in the backward pass

    def __add__(self, other: "LayerFlops") -> "LayerFlops":
        return LayerFlops(
            self.matmuls + other.matmuls,
            self.attention + other.attention,
            self.attention_recomputed + other.attention_recomputed,
            self.ffn_hidden + other.ffn_hidden,
            self.expansion + other.expansion,
        )

    def __mul__(self, times: float) -> "LayerFlops":
        return LayerFlops(
            self.matmuls * times,
            self.attention * times,
            self.attention_recomputed * times,
            self.ffn_hidden * times,
            self.expansion * times,
        )

    @property
    def forward(self) -> float:
        return self.matmuls + self.attention + self.attention_recomputed + self.ffn_hidden + self.expansion

    def training_flops(self, recompute: str, in_chunks: bool = False) -> float:
        """Forward, recomputation and backward: 2.5 forward passes for attention (Dao 2023), 2 for the rest."""
        selective = self.attention + self.attention_recomputed + self.ffn_hidden + self.expansion
        recomputed = {"none": 0.0, "selective": selective, "loop": self.forward}[recompute]
        if in_chunks and recompute != "selective":
            recomputed += self.ffn_hidden
        of_weights = self.matmuls + self.attention_recomputed + self.ffn_hidden
        backward = 2 * of_weights + 2.5 * self.attention + 3 * self.expansion
        return self.forward + recomputed + backward


@dataclass(frozen=True)
class _Layers:
    """Forward FLOPs of each layer. The defaults give the model's FLOPs per token; a rank's sizes, those it executes."""

    config: MythosConfig
    seq_len: int
    expert_pairs: float  # (token, expert) pairs that the routed experts compute
    tokens: float = 1.0
    local_tokens: float = 1.0  # in router, depth LoRA and halting: tokens / tensor with sequence parallelism
    tensor: int = 1
    kernels_pad: bool = False
    alignment: int = 1  # elements to whose multiple grouped GEMMs pad widths
    halting: bool = False
    context: AttentionWork | None = None  # what a rank of a context axis computes

    @functools.cached_property
    def matrices(self) -> _Matrices:
        return _matrices(self.config, self.tensor)

    def attention(self) -> LayerFlops:
        """Attention that is given the keys and values: excluding `keys_values`."""
        c = self.config
        # Kernels pad keys and values to the same width (model/attend.py).
        channels = 2 * c.widest_head if self.kernels_pad else attention_sizes(c).pair_channels
        m, query_key_pairs = self.matrices, self.tokens * (self.seq_len + 1) / 2
        if self.context is not None:
            query_key_pairs = self.context.pairs
        scores = 2.0 * query_key_pairs * (c.n_heads // self.tensor) * channels
        matmuls, recomputed = 2.0 * self.tokens * m.attention, 2.0 * self.tokens * m.query_expansion
        if self.context is not None:
            return LayerFlops(matmuls, scores, recomputed, expansion=2.0 * self.context.expanded * m.kv_expansion)
        return LayerFlops(matmuls, scores, recomputed + 2.0 * self.tokens * m.kv_expansion)

    def keys_values(self) -> LayerFlops:
        return LayerFlops(2.0 * self.tokens * self.matrices.keys_values)

    def dense_block(self) -> LayerFlops:
        return self.attention() + self.keys_values() + LayerFlops(ffn_hidden=2.0 * self.tokens * self.matrices.ffn)

    def loop(self) -> LayerFlops:
        """A loop that uses the keys and values of another one: all layers of the block, depth LoRA, halting."""
        per_token = self.matrices.lora + (self.config.dim if self.halting else 0)
        return self._loop_layer() * self.config.loop_layers + LayerFlops(2.0 * self.local_tokens * per_token)

    def loop_keys_values(self) -> LayerFlops:
        """The keys and values of a loop that computes its own, in all layers of the block."""
        return self.keys_values() * self.config.loop_layers

    def _loop_layer(self) -> LayerFlops:
        c, m = self.config, self.matrices
        hidden, dim = (ceil(width / self.alignment) * self.alignment for width in (m.expert_hidden, c.dim))
        experts = LayerFlops(ffn_hidden=2.0 * 3 * self.expert_pairs * dim * hidden + 2.0 * self.tokens * m.shared)
        return self.attention() + experts + LayerFlops(2.0 * self.local_tokens * m.router)

    def injection(self) -> LayerFlops:
        """Parcae's matrix, once for all loops."""
        return LayerFlops(2.0 * self.tokens * self.matrices.injection)

    def head(self) -> float:
        return 2.0 * self.tokens * self.matrices.head


def forward_flops_per_token(c: MythosConfig, seq_len: int, n_loops: int) -> float:
    """The model's forward FLOPs per token of a sequence of seq_len tokens without document boundaries."""
    layers = _Layers(c, seq_len, expert_pairs=c.n_experts_per_tok)
    once = (c.prelude_layers + c.coda_layers) * layers.dense_block().forward + layers.injection().forward
    compute_kv = ceil(n_loops / c.kv_loops)
    return once + n_loops * layers.loop().forward + compute_kv * layers.loop_keys_values().forward + layers.head()


def attention_share(c: MythosConfig, seq_len: int, n_loops: int) -> float:
    """The share of `forward_flops_per_token` that grows with the length: scores, and their product with the values."""
    blocks = c.prelude_layers + c.coda_layers + n_loops * c.loop_layers
    score_flops = _Layers(c, seq_len, expert_pairs=c.n_experts_per_tok).attention().attention
    return blocks * score_flops / forward_flops_per_token(c, seq_len, n_loops)


@functools.lru_cache(maxsize=1024)  # a run asks in every step, the planner for every layout
def train_flops_per_token(c: MythosConfig, seq_len: int, n_loops: int, no_grad: int = 0) -> float:
    """The model's FLOPs per token of forward and backward: three times the forward, of the `no_grad` loops once."""
    with_grad = forward_flops_per_token(c, seq_len, n_loops - no_grad)
    return 3.0 * with_grad + (forward_flops_per_token(c, seq_len, n_loops) - with_grad)


def stage_costs(config: Config) -> LayerCosts:
    """FLOPs per token of a training step, recomputed loops included, to balance pipeline stages by."""
    return _stage_costs(config.model, config.train.seq_len, config.train.recompute == "loop")


@functools.lru_cache(maxsize=1024)  # the planner asks for the same model at thousands of layouts
def _stage_costs(c: MythosConfig, seq_len: int, recomputed: bool) -> LayerCosts:
    layers = _Layers(c, seq_len, expert_pairs=c.n_experts_per_tok)
    loop = layers.loop().forward + layers.loop_keys_values().forward / c.kv_loops  # the mean of a group of loops
    return LayerCosts(
        block=3 * layers.dense_block().forward,
        loop=(4 if recomputed else 3) * loop,
        no_grad_loop=loop,
        head=3 * layers.head(),
    )


def stage_specs(config: Config) -> tuple[StageSpec, ...]:
    """The layers of each pipeline stage, balanced for the mean number of loops."""
    return _stage_specs(config.model, config.loops.mean_of(config.model), config.parallel.pipe, stage_costs(config))


@functools.lru_cache(maxsize=1024)
def _stage_specs(model: MythosConfig, n_loops: int, stages: int, costs: LayerCosts) -> tuple[StageSpec, ...]:
    # Cached: for 1t in many stages `plan_stages` takes tens of milliseconds.
    return tuple(plan_stages(model, n_loops, stages, costs))


def stage_loops(config: Config, n_loops: int, no_grad: int) -> list[range]:
    """The loops that each stage runs in a step of `n_loops` loops, the first `no_grad` of them without gradient."""
    return plan_loops(stage_specs(config), n_loops, no_grad, stage_costs(config))


def loops_computing_kv(config: Config, loops: range) -> set[int]:
    """Those of `loops` that compute keys and values: all, where sequences have loops of their own."""
    return {t for t in loops if config.loops.per == "sequence" or t % config.model.kv_loops == 0}


def executed_flops(
    config: Config, mesh: Mesh, stage: StageSpec, loops: range, no_grad: int, expert_pairs: int
) -> float:
    """FLOPs of one micro-batch, forward and backward, on a rank whose stage runs the loops `loops` of a mean step.

    The first `no_grad` loops of the step have no gradient. expert_pairs: (token, expert) pairs per loop that this
    rank's experts compute. Conventions are those of `ops.plan.meter`, which measures the same FLOPs.
    """
    train, recompute = config.train, config.train.recompute
    tokens = train.micro_batch * local_tokens(train.seq_len, mesh)
    layers = _Layers(
        config.model,
        train.seq_len,
        expert_pairs,
        tokens,
        local_tokens=tokens // mesh.tensor.size if mesh.sequence else tokens,
        tensor=mesh.tensor.size,
        kernels_pad=True,
        alignment=16 // (4 if train.dtype == "fp32" else 2),  # model/grouped.py: 16 bytes
        halting=config.act.mode_of(config.model) != "off",
        context=attention_work(train.micro_batch, train.seq_len, mesh) if mesh.context.size > 1 else None,
    )
    readouts = config.loops.readouts(config.loops.mean_of(config.model), no_grad)
    blocks = len(stage.prelude) + len(stage.coda) * readouts
    in_chunks = config.chunk_size > 0
    total = blocks * layers.dense_block().training_flops("selective" if recompute == "selective" else "none", in_chunks)
    if stage.has_loops and len(loops):
        total += layers.injection().training_flops("none")
    with_grad, compute_kv = loops_with_grad(loops, no_grad), loops_computing_kv(config, loops)
    for t in loops:
        loop = layers.loop() + layers.loop_keys_values() if t in compute_kv else layers.loop()
        total += loop.training_flops(recompute, in_chunks) if t in with_grad else loop.forward
    if stage.is_last:
        # All three matmuls run in the forward pass, and the teacher's again for each readout that is trained towards
        # its output (parallel/tensor.py).
        total += layers.head() * (3 * readouts + (readouts - 1 if config.loops.teacher else 0))
    return total
