"""FLOPs that one rank really executes in a step: padding, recomputation and attention's second pass included.

`model.flops` has the model's FLOPs, which layouts share; the ratio of the two is what padding and recomputation cost.
Conventions are those of `plan.meter`, which counts the same numbers: 2 per multiply-add of a matrix product, the
causal half of attention, 2.5 forward passes for its backward (Dao 2023). The head's three products run on the way
forward.
"""

# Letters as in plan/memory.py.

from dataclasses import dataclass
from math import ceil

from mythos_dist.config.schema import Config
from mythos_dist.ops.plan.routing import Routed
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.pipeline import StageSpec, loops_with_grad


@dataclass(frozen=True)
class Layer:
    """Forward FLOPs of a layer; `selective` recomputation repeats attention and the inner products."""

    products: float = 0.0
    attention: float = 0.0
    inner: float = 0.0

    def __add__(self, other: "Layer") -> "Layer":
        return Layer(self.products + other.products, self.attention + other.attention, self.inner + other.inner)

    @property
    def forward(self) -> float:
        return self.products + self.attention + self.inner

    def step(self, recompute: str) -> float:
        """Forward, backward, and what is computed again."""
        again = self.attention + self.inner if recompute == "selective" else self.forward * (recompute == "loop")
        return self.forward + 2 * (self.products + self.inner) + 2.5 * self.attention + again


class _Layers:
    def __init__(self, config: Config, mesh: Mesh, routed: Routed):
        self.config, self.c, self.mesh, self.routed, self.t = config, config.model, mesh, routed, mesh.tensor.size
        self.N = config.train.micro_batch * config.train.seq_len
        self.n = self.N // self.t if mesh.sequence else self.N

    def cut(self, width: int) -> int:
        return ceil(width / self.t)

    def attention(self) -> Layer:
        """model/attention.py; keys and values are padded to the same width (model/attend.py)."""
        c, N, S = self.c, self.N, self.config.train.seq_len
        heads = c.n_heads // self.t
        scores = 4.0 * self.config.train.micro_batch * heads * S * (S + 1) / 2 * c.widest_head
        if c.attn_type == "gqa":
            keys = self.cut(c.n_kv_heads * c.head_dim)
            return Layer(2.0 * N * c.dim * (2 * self.cut(c.dim) + 2 * keys), scores)
        down = c.dim * (self.cut(c.q_lora_rank) + self.cut(c.kv_lora_rank + c.qk_rope_head_dim))
        up = c.q_lora_rank * self.cut(c.n_heads * c.head_dim)
        up += c.kv_lora_rank * self.cut(c.n_heads * (c.qk_nope_head_dim + c.v_head_dim))
        out = self.cut(c.n_heads * c.v_head_dim) * c.dim
        return Layer(2.0 * N * (down + out), scores, 2.0 * N * up)

    def ffn(self, hidden: int) -> Layer:
        """model/moe.py: SwiGLU."""
        return Layer(inner=2.0 * 3 * self.N * self.c.dim * self.cut(hidden))

    def block(self) -> Layer:
        return self.attention() + self.ffn(self.c.ffn_dim)

    def loop(self) -> Layer:
        """model/recurrence.py: attention, router, experts, depth LoRA, halting."""
        c, n = self.c, self.n
        align = 16 // (4 if self.config.train.dtype == "fp32" else 2)  # model/grouped.py: fill_to_16_bytes
        wide, dim = (ceil(size / align) * align for size in (self.cut(c.expert_dim), c.dim))
        experts = Layer(inner=2.0 * 3 * self.routed.pairs * dim * wide)
        shared = self.ffn(c.shared_dim) if c.shared_dim else Layer()
        halting = n * c.dim if self.config.act.mode_of(c) != "off" else 0
        lora = 2 * n * c.dim * self.cut(c.lora_rank) * self.t if c.lora != "none" else 0
        small = 2.0 * (n * c.dim * c.n_experts + lora + halting)
        return self.attention() + experts + shared + Layer(small)

    def injection(self) -> Layer:
        """Parcae's matrix, once for all loops."""
        c = self.c
        return Layer(2.0 * self.N * c.dim * self.cut(c.dim)) if c.injection == "parcae" else Layer()

    def head(self) -> float:
        return 3 * 2.0 * self.N * self.c.dim * self.cut(self.c.vocab_size)


def executed_flops(config: Config, mesh: Mesh, part: StageSpec, turns: range, frozen: int, routed: Routed) -> float:
    """Of one micro-batch, forward and backward, on a rank whose stage `part` runs the loops `turns` of a mean step."""
    layers, recompute = _Layers(config, mesh, routed), config.train.recompute
    readouts = config.loops.readouts(config.loops.mean_of(config.model), frozen)
    blocks = len(part.prelude) + len(part.coda) * readouts
    total = blocks * layers.block().step("selective" if recompute == "selective" else "none")
    total += layers.injection().step("none") if part.has_loops and len(turns) else 0.0
    loop, live = layers.loop(), len(loops_with_grad(turns, frozen))
    total += live * loop.step(recompute) + (len(turns) - live) * loop.forward
    return total + layers.head() * part.last * readouts
