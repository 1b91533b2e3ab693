"""The Recurrent-Depth Transformer: embedding, prelude, one looped block, coda, norm, and the embedding again as head.

`Mythos(config)` is a plain module on one process. `mode: reference` gives OpenMythos 0.5.0's numbers at equal weights
(`load_open_mythos`); `mode: train` differs only in the halting mass of the last loop and in a router bias that moves.
A mesh makes it hold this rank's slices, a `Part` this pipeline stage's layers; names stay those of the whole model.
"""

# B batch, S sequence (S' of it on this rank: S / tensor with sequence parallelism, else S), D model, V vocabulary,
# E experts.

from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from mythos_dist.config.check import model_problems
from mythos_dist.config.schema import ExpertsConfig, MythosConfig
from mythos_dist.errors import UserError
from mythos_dist.model.attend import choose_kernel
from mythos_dist.model.attention import Context, KVCache, build_context
from mythos_dist.model.block import DenseBlock
from mythos_dist.model.init import init_parameters
from mythos_dist.model.norm import Norm
from mythos_dist.model.recompute import Recompute
from mythos_dist.model.recurrence import Carry, Recurrent
from mythos_dist.parallel.collectives import sum_over
from mythos_dist.parallel.mesh import SINGLE, Mesh
from mythos_dist.parallel.pipeline import Part
from mythos_dist.parallel.tensor import IGNORED, Embedding, whole_on_every_rank


class Losses(TypedDict):
    """What a training pass returns. A plain dict of tensors: DeepSpeed's ZeRO-3 hooks walk through it."""

    objective: Tensor  # (): what is differentiated, cross entropy plus auxiliary losses
    cross_entropy: Tensor  # (): mean over the tokens that count, in nats, detached
    tokens: Tensor  # (): how many labels count
    expert_counts: Tensor  # (n_loops, E) int64: (token, expert) pairs per loop and expert


class Mythos(nn.Module):
    """The whole model, or what one rank holds of it. Raises UserError when the config cannot be built."""

    def __init__(
        self,
        config: MythosConfig,
        *,
        experts: ExpertsConfig | None = None,
        recompute: Recompute | None = None,
        attention: Literal["auto", "flash_attn", "sdpa"] = "auto",
        seed: int = 0,
        mesh: Mesh = SINGLE,
        part: Part | None = None,
    ):
        super().__init__()
        if problems := model_problems(config):
            raise UserError(problems)
        experts = experts or ExpertsConfig()
        recompute = recompute or Recompute()
        self.config = config
        self.attention = attention
        self.mesh = mesh
        self.part = part = part or Part.whole(config)
        self.auxiliary_losses = experts.z_loss > 0 or experts.sequence_balance_loss > 0
        selective = recompute.kind == "selective"
        if part.first or part.last:
            self.embed = Embedding(config.vocab_size, config.dim, mesh)
        self.prelude = nn.ModuleDict({str(i): DenseBlock(config, mesh, selective) for i in part.prelude})
        if part.loops:
            self.recurrent = Recurrent(config, experts, recompute, mesh)
        self.coda = nn.ModuleDict({str(i): DenseBlock(config, mesh, selective) for i in part.coda})
        if part.last:
            self.norm = whole_on_every_rank(Norm(config.dim), mesh)
        init_parameters(self, seed)

    def forward(
        self,
        input_ids: Tensor,
        n_loops: int | None = None,
        *,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        backprop: int | None = None,
    ) -> Tensor | Losses:
        """input_ids (B, S) -> logits (B, S, V); with labels (B, S), the `Losses` of predicting them.

        n_loops: turns of the recurrent block, by default `max_loop_iters`, and any number from 1 on.
        document_ids: (B, S), equal within a document; attention then stays inside documents.
        cache: keys and values of the tokens before these; this call adds its own.
        backprop: gradient flows through the last so many loops only; None: through all.
        Raises UserError when the tokens go beyond the context or n_loops is below 1.
        """
        config = self.config
        n_loops = config.max_loop_iters if n_loops is None else n_loops
        end = input_ids.shape[1] + (cache.tokens if cache is not None else 0)
        if end > config.max_seq_len:
            raise UserError(
                f"a sequence of {end} tokens is longer than the context model.max_seq_len={config.max_seq_len}"
            )
        if n_loops < 1:
            raise UserError(f"n_loops={n_loops} must be at least 1")

        context = self.context(input_ids, document_ids, cache)
        frozen = 0 if backprop is None else max(0, n_loops - backprop)
        (x, auxiliary), counts = self.run((input_ids,), range(n_loops), n_loops, frozen, context)
        if cache is not None:
            cache.tokens = end
        if labels is None:
            return self.embed.whole_logits(self.embed(x, as_head=True))
        return self.losses(x, labels, auxiliary, counts)

    def context(self, input_ids: Tensor, document_ids: Tensor | None = None, cache: KVCache | None = None) -> Context:
        """What the layers share in a pass over input_ids (B, S); see `forward` for the other arguments."""
        dtype = next(self.parameters()).dtype
        kernel = choose_kernel(self.attention, input_ids.device, dtype, self.config)
        return build_context(self.config, input_ids.shape, input_ids.device, document_ids, cache, kernel)

    def run(
        self, state: tuple[Tensor, ...], turns: range, n_loops: int, frozen: int, context: Context
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Run the layers that this rank holds, and of the `n_loops` loops those of `turns`.

        state: before the first layer (input_ids,); in the prelude (x,), x (B, S', D); between loops a `Carry`; in the
        coda, and behind the last norm, (x, auxiliary losses).
        Returns the state behind this rank's layers and the counts (len(turns), E).
        """
        part = self.part
        state = tuple(state)
        counts = torch.zeros(0, self.config.n_experts, dtype=torch.int64, device=state[0].device)
        if part.first:
            state = (self.embed(state[0]),)
        for i, block in self.prelude.items():
            state = (block(state[0], context, f"prelude.{i}"),)
        if part.loops:
            carry = Carry.start(*state) if part.loops_start else Carry(*state)
            carry, counts = self.recurrent(carry, turns, n_loops, context, frozen)
            state = (carry.mixed.to(carry.e.dtype), carry.loss) if part.loops_end else tuple(carry)
        for i, block in self.coda.items():
            x, auxiliary = state[0], state[-1]
            state = (block(x, context, f"coda.{i}"), auxiliary)
        if part.last:
            x, auxiliary = state[0], state[-1]
            state = (self.norm(x), auxiliary)
        return state, counts

    def arrives(self, batch: int, seq_len: int) -> list[tuple[torch.Size, torch.dtype]]:
        """Shapes and dtypes of the state that the stage before this one hands on for (batch, seq_len) tokens."""
        tokens = seq_len // self.mesh.tensor.size if self.mesh.sequence else seq_len
        shape, dtype = torch.Size([batch, tokens, self.config.dim]), next(self.parameters()).dtype
        x, loss = (shape, dtype), (torch.Size([1]), torch.float32)
        if self.part.behind_loops:
            return [x, loss]
        if not self.part.loops or self.part.loops_start:
            return [x]
        return [x, x, (shape, torch.float32), (shape[:2], torch.float32), loss]  # a Carry

    def losses(self, x: Tensor, labels: Tensor, auxiliary: Tensor, counts: Tensor) -> Losses:
        """x (B, S', D) behind the last norm, labels (B, S), this rank's auxiliary losses (1,), counts (n_loops, E)."""
        tokens = (labels != IGNORED).sum()
        cross_entropy = self.embed(x, labels=labels) / tokens.clamp(min=1)
        auxiliary = auxiliary.squeeze()
        if self.mesh.sequence and self.auxiliary_losses:
            auxiliary = sum_over(auxiliary, self.mesh.tensor)
        return Losses(
            objective=cross_entropy + auxiliary,
            cross_entropy=cross_entropy.detach(),
            tokens=tokens,
            expert_counts=counts,
        )

    def compile_blocks(self) -> None:
        """Let `torch.compile` take each block; names and state stay."""
        loops = [self.recurrent.block] if self.part.loops else []
        for block in [*self.prelude.values(), *loops, *self.coda.values()]:
            block.compile()

    def update_router_bias(self, counts: Tensor) -> None:
        """Call once after an optimizer step with the counts (n_loops, E) of its global batch; reference mode stays."""
        if self.config.mode == "train" and self.part.loops:
            self.recurrent.block.ffn.router.update_bias(counts.view(-1, self.config.n_experts).sum(0))

    def load_open_mythos(self, state_dict: dict[str, Tensor]) -> None:
        """Take the weights of an `open_mythos.OpenMythos` with the same config.

        Raises UserError when names or shapes are those of another config.
        """
        from mythos_dist.model.open_mythos import from_open_mythos

        try:
            self.load_state_dict(from_open_mythos(state_dict, self.config))
        except RuntimeError as error:
            raise UserError(
                f"the OpenMythos weights do not fit `model.*`; set it to the config they were made with: "
                f"{' '.join(str(error).split())}"
            ) from None

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int | None = None, **settings) -> Tensor:
        """Continue prompts (B, S); see `mythos_dist.model.generate.generate` for the settings."""
        from mythos_dist.model.generate import generate

        return generate(self, input_ids, max_new_tokens, **settings)
