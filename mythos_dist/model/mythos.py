"""The Recurrent-Depth Transformer: embedding, prelude, one looped block, coda, norm, and the embedding again as head.

`Mythos(config)` is a plain module on one process. `mode: reference` gives OpenMythos 0.5.0's numbers at equal weights
(`load_open_mythos`); `mode: train` differs only in the halting mass of the last loop and in a router bias that moves.
"""

# B batch, S sequence, D model, V vocabulary, E experts.

from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_dist.config.schema import ExpertsConfig, MythosConfig, model_problems
from mythos_dist.errors import UserError
from mythos_dist.model.attention import KVCache, build_context
from mythos_dist.model.block import DenseBlock
from mythos_dist.model.init import init_parameters
from mythos_dist.model.recurrence import Recurrent

IGNORED = -100  # a label that does not count (PyTorch's own default)


class Losses(TypedDict):
    """What a training pass returns. A plain dict of tensors: DeepSpeed's ZeRO-3 hooks walk through it."""

    objective: Tensor  # (): what is differentiated, cross entropy plus auxiliary losses
    cross_entropy: Tensor  # (): mean over the tokens that count, in nats, detached
    tokens: Tensor  # (): how many labels count
    expert_counts: Tensor  # (n_loops, E) int64: rows per loop and expert


class Embedding(nn.Module):
    """One table (V, D) for both ends of the model; both go through `forward`, where ZeRO-3 gathers the parameter."""

    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, x: Tensor, as_head: bool = False) -> Tensor:
        """ids (B, S) -> (B, S, D); as head: states (B, S, D) -> logits (B, S, V)."""
        return F.linear(x, self.weight) if as_head else F.embedding(x, self.weight)


class Mythos(nn.Module):
    """The whole model. Raises UserError when the config cannot be built."""

    def __init__(
        self, config: MythosConfig, *, experts: ExpertsConfig | None = None, recompute: str = "none", seed: int = 0
    ):
        super().__init__()
        if problems := model_problems(config):
            raise UserError(problems)
        experts = experts or ExpertsConfig()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.dim)
        self.prelude = nn.ModuleList(DenseBlock(config) for _ in range(config.prelude_layers))
        self.recurrent = Recurrent(config, experts, recompute)
        self.coda = nn.ModuleList(DenseBlock(config) for _ in range(config.coda_layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        init_parameters(self, seed)

    def forward(
        self,
        input_ids: Tensor,
        n_loops: int | None = None,
        *,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor | Losses:
        """input_ids (B, S) -> logits (B, S, V); with labels (B, S), the `Losses` of predicting them.

        n_loops: turns of the recurrent block, by default `max_loop_iters`, and any number from 1 on.
        document_ids: (B, S), equal within a document; attention then stays inside documents.
        cache: keys and values of the tokens before these; this call adds its own.
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

        context = build_context(config, input_ids.shape, input_ids.device, document_ids, cache)
        x = self.embed(input_ids)
        for i, block in enumerate(self.prelude):
            x = block(x, context, f"prelude.{i}")
        x, stats = self.recurrent(x, n_loops, context)
        for i, block in enumerate(self.coda):
            x = block(x, context, f"coda.{i}")
        logits = self.embed(self.norm(x), as_head=True)
        if cache is not None:
            cache.tokens = end
        if labels is None:
            return logits
        summed = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        tokens = (labels != IGNORED).sum()
        cross_entropy = summed / tokens.clamp(min=1)
        return Losses(
            objective=cross_entropy + stats.loss,
            cross_entropy=cross_entropy.detach(),
            tokens=tokens,
            expert_counts=stats.counts,
        )

    def update_router_bias(self, counts: Tensor) -> None:
        """Call once after an optimizer step with the counts (n_loops, E) of its global batch; reference mode stays."""
        if self.config.mode == "train":
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
