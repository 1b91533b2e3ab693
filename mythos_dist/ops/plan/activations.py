"""Bytes of the tensors that layers create and autograd saves, per layer and micro-batch; `memory.py` sums them up."""

# B batch, S sequence, N = B * S tokens, n of them in norms and residuals (N / tensor with sequence parallelism),
# D model, H heads here, F hidden width here, R rows received over the expert axis, M (row, expert) pairs received,
# b bytes of an element.

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mythos_dist.config.schema import Config
from mythos_dist.model.attention_sizes import attention_sizes
from mythos_dist.ops.plan.chunks import ExpertRows, chunk_sizes
from mythos_dist.parallel.context import attention_work, local_tokens
from mythos_dist.parallel.mesh import Mesh

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Saved:
    """Bytes that autograd saves of some layers: outputs of collectives, and the rest."""

    work: float = 0
    gathered: float = 0

    def __add__(self, other: Saved) -> Saved:
        return Saved(self.work + other.work, self.gathered + other.gathered)

    def __mul__(self, times: float) -> Saved:
        return Saved(self.work * times, self.gathered * times)

    @property
    def total(self) -> float:
        return self.work + self.gathered


class LayerActivations:
    """Bytes by layer for one micro-batch on one rank."""

    def __init__(self, config: Config, mesh: Mesh, rows: ExpertRows, chunk_rows: ExpertRows):
        """rows: of the expert axis in a loop. chunk_rows: those of the largest chunk, if layers work in chunks."""
        c, t = config.model, mesh.tensor.size
        self.config, self.c, self.t, self.mesh = config, c, t, mesh
        self.rows, self.chunk_rows = rows, chunk_rows
        self.b = ITEM_BYTES[config.train.dtype]
        self.N = config.train.micro_batch * local_tokens(config.train.seq_len, mesh)
        self.n = self.N // t if mesh.sequence else self.N
        self.x = self.N * c.dim * self.b  # full residual stream
        self.residual = self.n * c.dim * self.b  # this rank's part of it
        self.sizes = attention_sizes(c, t, self.b)
        self.in_context = mesh.context.size > 1
        self.shared_hidden = ceil(c.shared_dim / t)
        self.ffn_hidden = ceil(c.ffn_dim / t)
        self.expert_hidden = ceil(c.expert_dim / t)
        self.local_experts = c.n_experts // mesh.expert.size
        self.slots = min(c.n_experts_per_tok, self.local_experts)  # experts here that a token can choose
        self.selective = config.train.recompute == "selective"
        self.in_chunks = config.chunk_size > 0
        self.chunk_size = chunk_sizes(config, mesh)[0]  # of the largest chunk, over the tensor group

    def layer_input(self) -> Saved:
        """A full, normed x (model/block.py); gathered with sequence parallelism."""
        return Saved(gathered=self.x) if self.mesh.sequence else Saved(self.x)

    def attention(self) -> Saved:
        """From the normed x to the input of `wo`."""
        return self.layer_input() + Saved(self.N * self.sizes.saved(self.selective, self.in_context))

    def recomputed_attention(self) -> float:
        """Bytes that its backward pass adds, if it is recomputed; with `attention_gradients`."""
        again = self.N * (self.sizes.saved(False, self.in_context) - self.sizes.saved(True, self.in_context))
        return again if self.in_context else again + self.attention_gradients()  # `context_exchange` has the gradients

    def attention_gradients(self) -> float:
        """Bytes of the gradients of queries, keys, values, output in its backward pass."""
        return self.N * self.sizes.gradients()

    def context_exchange(self) -> tuple[float, float]:
        """Bytes in the backward pass of attention over the context axis (model/context_attention.py): gathered entries,
        and everything else, in which the gradients of entries are as large."""
        if not self.in_context:
            return 0.0, 0.0
        b, H, width = self.b, self.sizes.heads, self.c.widest_head
        work = attention_work(self.config.train.micro_batch, self.config.train.seq_len, self.mesh)
        gathered = float(work.gathered * self.sizes.kv_width * b)
        # Of a tile: keys, keys before their norm, values; gradients in fp32, and those of a block. Of queries: the
        # gradient of the output, gradients in fp32, and those of a block.
        tile = work.tile * H * width * (4 * b + 8 + (b if self.sizes.norms_expanded_keys else 0))
        return gathered, gathered + tile + self.N * H * width * (4 + 2 * b)

    def shared_kv(self) -> float:
        """Bytes of the keys and values that loops share, of all layers of the block, once per group of loops; 0 if
        every loop has its own."""
        return self.N * self.sizes.shared() * self.c.loop_layers if self.c.kv_loops > 1 else 0

    def dense_block(self) -> Saved:
        """model/block.py: both norms' inputs, attention, an FFN's input and its gate and up."""
        norms_and_attention = Saved(2 * self.residual) + self.attention()
        if self.in_chunks:
            return norms_and_attention + Saved(self.residual)
        hidden = 0 if self.selective else 2 * self.N * self.ffn_hidden * self.b
        return norms_and_attention + self.layer_input() + Saved(hidden)

    def shared_gate(self) -> float:
        """One hidden tensor of the shared experts."""
        return self.N * self.shared_hidden * self.b

    def _received_rows(self) -> Saved:
        """parallel/expert.py: the rows received; none without an expert axis."""
        if self.mesh.expert.size == 1:
            return Saved()
        width = self.c.dim + (2 * self.slots if self.t == 1 else 0)
        return Saved(gathered=self.rows.received * width * self.b)

    def _experts(self) -> Saved:
        """model/grouped.py: rows, gate and up of every pair, and the indices of rows."""
        M, R = self.rows.pairs, self.rows.received
        hidden = 0 if self.selective else 2 * M * self.expert_hidden * self.b
        # Indices of rows and pairs, 8 bytes each; of received rows, also each slot's order, position and weight.
        return self._received_rows() + Saved(hidden + M * (16 + self.b) + R * (24 + 21 * self.slots))

    def chunk_experts(self) -> Saved:
        """What the backward pass recomputes of one chunk in the routed experts: as `_experts`."""
        M, R = self.chunk_rows.pairs, self.chunk_rows.received
        width = self.c.dim + (2 * self.slots if self.t == 1 else 0)
        received = R * width * self.b if self.mesh.expert.size > 1 else 0
        return Saved(M * (2 * self.expert_hidden * self.b + 16 + self.b) + R * (24 + 21 * self.slots), received)

    def moe(self) -> Saved:
        """model/moe.py: the router works in fp32; then routed and shared experts."""
        c, k = self.c, self.c.n_experts_per_tok
        if self.in_chunks:  # the normed tokens; logits, choices and weights; tokens of sent rows; the router's weight
            routing = self.n * (12 * k + 4 * c.n_experts) + 8 * self.rows.sent
            return Saved(self.residual + routing + 4 * c.n_experts * c.dim)
        router = 4 * (self.n * (c.dim + c.n_experts) + c.n_experts * c.dim)
        shared = 0 if self.selective else 2 * self.shared_gate()
        return Saved(router) + self.layer_input() + self._experts() + Saved(shared)

    def loop(self) -> Saved:
        """model/recurrence.py: h + e, norms' inputs, the block's output, the new h, and h in fp32 for the output
        so far; without `shared_kv`. Without injection h is the block's input, and its output is h, which only a depth
        LoRA changes; with that of differences the input is another tensor."""
        if self.c.injection in ("reference", "parcae"):
            states = 5.0
        else:
            keeps_h = self.c.injection == "difference" and self.config.train.recompute != "loop"  # which has it anyway
            states = 2.0 + (self.c.lora != "none") + keeps_h
        if self.c.state_norm:  # its input, for which recomputation stops before h, and a value per token
            states += (self.config.train.recompute != "loop") + 4 / (self.b * self.c.dim)
        states = (states - 2) * self.residual + self.output_so_far  # the layers have two of them
        lora = 2 * ceil(self.c.lora_rank / self.t) * self.t * (self.c.dim + self.n) * self.b
        return Saved(states + lora) + self.loop_layer() * self.c.loop_layers

    def loop_layer(self) -> Saved:
        """A layer of the looped block: both norms' inputs, attention and MoE; without `shared_kv`."""
        if self.c.kv_loops == 1:
            attention = self.attention()
        else:
            saved = self.sizes.saved_by_loop(self.selective, self.in_context)
            attention = self.layer_input() + Saved(self.N * saved)
        return Saved(2 * self.residual) + attention + self.moe()

    def injection(self) -> Saved:
        """model/injection.py, once for all loops: e; or with Parcae's the input of e's norm, this rank's channels of
        e, their product."""
        if self.c.injection != "parcae":
            return Saved(self.residual if self.c.injection != "none" else 0)
        return Saved(2 * self.residual + self.N * ceil(self.c.dim / self.t) * self.b)

    @property
    def output(self) -> float:
        """The loops' output in fp32."""
        return 4 * self.n * self.c.dim

    @property
    def output_so_far(self) -> float:
        """The output so far, of each loop; act.mode=off has none."""
        return 0 if self.config.act.mode_of(self.c) == "off" else self.output

    def carry(self) -> float:
        """The input of a loop: h, the output so far in fp32, the cumulative halting probability."""
        return self.residual + self.output_so_far + 8 * self.n

    def moved(self) -> list[float]:
        """Bytes of each tensor of `carry` that train.offload=saved moves to host memory: all but the cumulative halting
        probability."""
        sums_states = self.config.act.mode_of(self.c) != "ponder" or self.config.loops.objective != "per_loop"
        return [self.residual, self.output_so_far] if self.output_so_far and sums_states else [self.residual]
