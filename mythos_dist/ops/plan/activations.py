"""Bytes of the tensors that layers create and autograd saves, per layer and micro-batch; `memory.py` sums them up."""

# B batch, S sequence, N = B * S tokens, n of them in norms and residuals (N / tensor with sequence parallelism),
# D model, H heads here, d and v channels of a query and a value head, F hidden width here, R rows received over the
# expert axis, M (row, expert) pairs received, b bytes of an element.

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mythos_dist.config.schema import Config
from mythos_dist.ops.plan.pieces import piece_sizes
from mythos_dist.ops.plan.routing import ExpertRows
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

    def __init__(self, config: Config, mesh: Mesh, rows: ExpertRows, piece_rows: ExpertRows):
        """rows: of the expert axis in a loop. piece_rows: those of the largest piece, if layers work in pieces."""
        c, t = config.model, mesh.tensor.size
        self.config, self.c, self.t, self.mesh = config, c, t, mesh
        self.rows, self.piece_rows = rows, piece_rows
        self.b = ITEM_BYTES[config.train.dtype]
        self.N = config.train.micro_batch * local_tokens(config.train.seq_len, mesh)
        self.n = self.N // t if mesh.sequence else self.N
        self.x = self.N * c.dim * self.b  # full residual stream
        self.residual = self.n * c.dim * self.b  # this rank's part of it
        self.heads = c.n_heads // t
        self.kv_heads = self.heads if c.n_kv_heads % t else c.n_kv_heads // t
        self.shared_hidden = ceil(c.shared_dim / t)
        self.ffn_hidden = ceil(c.ffn_dim / t)
        self.expert_hidden = ceil(c.expert_dim / t)
        self.local_experts = c.n_experts // mesh.expert.size
        self.slots = min(c.n_experts_per_tok, self.local_experts)  # experts here that a token can choose
        self.selective = config.train.recompute == "selective"
        self.in_pieces = config.piece_tokens > 0
        self.piece_tokens = piece_sizes(config, mesh)[0]  # of the largest piece, over the tensor group

    def layer_input(self) -> Saved:
        """A full, normed x (model/block.py); gathered with sequence parallelism."""
        return Saved(gathered=self.x) if self.mesh.sequence else Saved(self.x)

    def attention(self) -> Saved:
        """model/attention.py, from the normed x to the input of `wo`."""
        return self.layer_input() + Saved(self._heads(self.selective))

    def recomputed_attention(self) -> float:
        """Bytes that its backward pass adds, if it is recomputed; with `attention_gradients`."""
        again = self._heads(False) - self._heads(True)
        if self.mesh.context.size > 1:  # `context_exchange` has the gradients
            return again
        return again + self.attention_gradients()

    def attention_gradients(self) -> float:
        """Bytes of the gradients of queries, keys, values, output in its backward pass."""
        c, H, width = self.c, self.heads, max(self.c.head_dim, self.c.v_head_dim)
        if c.attn_type == "gqa":
            return self.N * 2 * (H + self.kv_heads) * c.head_dim * self.b
        unpadded = H * c.v_head_dim if c.v_head_dim < c.head_dim else 0  # the output, which is not needed again
        return self.N * (4 * H * width - unpadded) * self.b

    def _heads(self, selective: bool) -> float:
        return self._gqa(selective) if self.c.attn_type == "gqa" else self._mla(selective)

    def _gqa(self, selective: bool) -> float:
        c, b, H = self.c, self.b, self.heads
        elements = 2 * (H + self.kv_heads) * c.head_dim  # queries, keys, values, output
        if selective:
            return self.N * elements * b
        normed = (H + self.kv_heads) * (c.head_dim * b + 4) if c.qk_norm else 0
        return self.N * (elements * b + 4 * H + normed)

    def _mla(self, selective: bool) -> float:
        c, N, b, H, d, v = self.c, self.N, self.b, self.heads, self.c.head_dim, self.c.v_head_dim
        latents = ceil(c.q_lora_rank / self.t) * self.t + self._kv_latent
        if selective:
            return N * (latents + H * v) * b
        normed = c.q_lora_rank + c.kv_lora_rank
        values = d if v < d else c.qk_nope_head_dim + v  # padded, or a view of the product
        if self.mesh.context.size > 1:  # queries, output, output unpadded; entries instead of keys and values
            heads = H * (2 * max(d, v) + (v if v < d else 0)) * b + 4 * H + (H * (d * b + 4) if c.qk_norm else 0)
            return N * ((latents + normed + self._kv_latent) * b + heads + 8)
        per_head = 3 * max(d, v) + values + (v if v < d else 0)  # queries, keys, output, values, output unpadded
        heads = H * per_head * b + 4 * H  # and the log-sum-exp
        if c.qk_norm:
            heads += 2 * H * (d * b + 4)  # queries and keys before their norms
        return N * ((latents + normed) * b + heads + 8)

    def context_exchange(self) -> tuple[float, float]:
        """Bytes in the backward pass of attention over the context axis (model/context_attention.py): gathered entries,
        and everything else, in which the gradients of entries are as large."""
        if self.mesh.context.size == 1:
            return 0.0, 0.0
        c, b, H = self.c, self.b, self.heads
        work = attention_work(self.config.train.micro_batch, self.config.train.seq_len, self.mesh)
        width = max(c.head_dim, c.v_head_dim) if c.attn_type == "mla" else c.head_dim
        entry = c.kv_lora_rank + c.qk_rope_head_dim if c.attn_type == "mla" else 2 * self.kv_heads * c.head_dim
        gathered = float(work.gathered * entry * b)
        # Of a piece: keys, keys before their norm, values; gradients in fp32, and those of a block. Of queries: the
        # gradient of the output, gradients in fp32, and those of a block.
        piece = work.piece * H * width * (4 * b + 8 + (b if c.qk_norm and c.attn_type == "mla" else 0))
        return gathered, gathered + piece + self.N * H * width * (4 + 2 * b)

    def shared_kv(self) -> float:
        """Bytes of the keys and values that loops share, of all layers of the block, once per group of loops; 0 if
        every loop has its own."""
        return self._shared_kv_of_layer() * self.c.loop_layers

    def _shared_kv_of_layer(self) -> float:
        if self.c.kv_loops == 1:
            return 0
        c = self.c
        width = 2 * self.kv_heads * c.head_dim if c.attn_type == "gqa" else self._kv_latent
        return self.N * width * self.b

    def _attention_of_loop(self) -> Saved:
        """Without what loops share. GQA without selective recomputation: rotated keys are of each loop."""
        c, shared = self.c, self._shared_kv_of_layer()
        if c.attn_type == "gqa" and not self.selective:
            shared *= (1 + c.qk_norm) / 2  # values, and keys before their norm
        return self.attention() + Saved(-shared)

    @property
    def _kv_latent(self) -> int:
        """MLA: channels of the latent of keys and values, padding included."""
        return ceil((self.c.kv_lora_rank + self.c.qk_rope_head_dim) / self.t) * self.t

    def dense_block(self) -> Saved:
        """model/block.py: both norms' inputs, attention, an FFN's input and its gate and up."""
        norms_and_attention = Saved(2 * self.residual) + self.attention()
        if self.in_pieces:
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

    def piece_experts(self) -> Saved:
        """What the backward pass recomputes of one piece in the routed experts: as `_experts`."""
        M, R = self.piece_rows.pairs, self.piece_rows.received
        width = self.c.dim + (2 * self.slots if self.t == 1 else 0)
        received = R * width * self.b if self.mesh.expert.size > 1 else 0
        return Saved(M * (2 * self.expert_hidden * self.b + 16 + self.b) + R * (24 + 21 * self.slots), received)

    def mixture(self) -> Saved:
        """model/moe.py: the router works in fp32; then routed and shared experts."""
        c, k = self.c, self.c.n_experts_per_tok
        if self.in_pieces:  # the normed tokens; logits, choices and weights; tokens of sent rows; the router's weight
            routing = self.n * (12 * k + 4 * c.n_experts) + 8 * self.rows.sent
            return Saved(self.residual + routing + 4 * c.n_experts * c.dim)
        router = 4 * (self.n * (c.dim + c.n_experts) + c.n_experts * c.dim)
        shared = 0 if self.selective else 2 * self.shared_gate()
        return Saved(router) + self.layer_input() + self._experts() + Saved(shared)

    def loop(self) -> Saved:
        """model/recurrence.py: h + e, norms' inputs, the block's output, the new h, and h in fp32 for the mean; without
        `shared_kv`. Without injection h is the block's input, and its output is h, which only a depth LoRA changes."""
        states = 5 if self.c.injection != "none" else 3 if self.c.lora != "none" else 2
        if self.c.state_norm:  # its input, for which recomputation stops before h, and a value per token
            states += (self.config.train.recompute != "loop") + 4 / (self.b * self.c.dim)
        states = (states - 2) * self.residual + self.mixed  # the layers have two of them
        lora = 2 * ceil(self.c.lora_rank / self.t) * self.t * (self.c.dim + self.n) * self.b
        return Saved(states + lora) + self.loop_layer() * self.c.loop_layers

    def loop_layer(self) -> Saved:
        """A layer of the looped block: both norms' inputs, attention and mixture; without `shared_kv`."""
        return Saved(2 * self.residual) + self._attention_of_loop() + self.mixture()

    def injection(self) -> Saved:
        """model/injection.py, once for all loops: e; or with Parcae's the input of e's norm, this rank's channels of
        e, their product."""
        if self.c.injection != "parcae":
            return Saved(self.residual if self.c.injection == "reference" else 0)
        return Saved(2 * self.residual + self.N * ceil(self.c.dim / self.t) * self.b)

    @property
    def output(self) -> float:
        """The loops' output in fp32."""
        return 4 * self.n * self.c.dim

    @property
    def mixed(self) -> float:
        """The output so far, of each loop; act.mode=off has none."""
        return 0 if self.config.act.mode_of(self.c) == "off" else self.output

    def carry(self) -> float:
        """The input of a loop: h, the weighted sum of states in fp32, the halting mass."""
        return self.residual + self.mixed + 8 * self.n

    def moved(self) -> list[float]:
        """Of that, the tensors that train.offload=saved moves to host memory: not the halting mass."""
        sums_states = self.config.act.mode_of(self.c) != "ponder" or self.config.loops.objective != "per_loop"
        return [self.residual, self.mixed] if self.mixed and sums_states else [self.residual]
