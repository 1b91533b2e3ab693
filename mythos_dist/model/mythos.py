"""The Recurrent-Depth Transformer: embedding, prelude, one looped block, coda, norm, head (by default the embedding).

`Mythos(config)` is a plain module on one process. `mode: reference` gives OpenMythos 0.5.0's outputs for equal weights
(`load_open_mythos`); in `mode: train` the router bias is updated, and `act.*` and `model.*` configure the loops.
With a mesh it holds this rank's shards, with a `StageSpec` this pipeline stage's layers, under the full model's names.

Decisions: MODEL-14.
"""

# B batch, S sequence (S' of it on this rank, with context and sequence parallelism a part), D model, V vocabulary,
# E experts, R readouts: 1, or the loops with gradient (loops.objective=per_loop), T rows of labels: one for each loop
# (ShardManifest.targets).

from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from mythos_dist.config.schema import ActConfig, ExpertsConfig, MythosConfig
from mythos_dist.errors import UserError
from mythos_dist.model.activations import Activations, TensorSpecs, has_auxiliary_losses, stage_input_shapes
from mythos_dist.model.attend import choose_kernel
from mythos_dist.model.attention import PassContext, build_context
from mythos_dist.model.block import DenseBlock
from mythos_dist.model.init import init_parameters
from mythos_dist.model.inputs import check_arguments, check_tokens, resolve_n_loops, type_problem
from mythos_dist.model.kv_cache import KVCache
from mythos_dist.model.loops import Loops
from mythos_dist.model.norm import Norm
from mythos_dist.model.recompute import Recompute
from mythos_dist.model.recurrence import Recurrent
from mythos_dist.model.shared_kv import shared_kv_shape
from mythos_dist.parallel.collectives import all_gather, all_reduce
from mythos_dist.parallel.context import ContextShard, context_shard, local_tokens
from mythos_dist.parallel.mesh import SINGLE, Mesh
from mythos_dist.parallel.pipeline import StageSpec
from mythos_dist.parallel.ranges import in_range
from mythos_dist.parallel.tensor import IGNORED, Embedding, replicated


class Losses(TypedDict):
    """Output of a training pass. A plain dict of tensors, because DeepSpeed's ZeRO-3 hooks traverse dicts."""

    # (): the loss to differentiate, cross entropy of all readouts plus auxiliary losses. With context parallelism each
    # rank has its tokens' part times the number of ranks: their mean is the loss, as is that of replicas
    objective: Tensor
    # (): of the last readout, in nats, detached: mean over labels that are not ignored, or divided by `label_counts`;
    # on the ranks of the context axis as `objective`
    cross_entropy: Tensor
    tokens: Tensor  # (): labels that are not ignored, of this rank's tokens
    # (B, S) fp32, detached: cross entropies of the last readout, 0 for ignored labels and other ranks' tokens
    token_losses: Tensor
    correct: Tensor  # (B, S) bool: whether the last readout's highest logit is the label's; on this rank's tokens
    # (n_loops, loop_layers * E) int64: (token, expert) pairs per loop and expert, of the first layer's experts first
    expert_counts: Tensor


class Mythos(nn.Module):
    """The model, or one rank's shard of it. Raises UserError if the config cannot be built.

    >>> import torch
    >>> from mythos_dist import Mythos, MythosConfig
    >>> config = MythosConfig(vocab_size=100, dim=32, n_heads=4, attn_type="gqa", expert_dim=16, n_experts=8)
    >>> model = Mythos(config, seed=1)
    >>> tokens = torch.randint(100, (2, 5))
    >>> model(tokens, n_loops=3).shape
    torch.Size([2, 5, 100])
    >>> losses = model(tokens, n_loops=3, labels=tokens.roll(-1, 1))
    >>> losses["objective"].backward()
    """

    def __init__(
        self,
        config: MythosConfig,
        *,
        act: ActConfig | None = None,
        experts: ExpertsConfig | None = None,
        recompute: Recompute | None = None,
        attention: Literal["auto", "flash_attn", "sdpa"] = "auto",
        teacher: float = 0.0,
        fixed_point: float = 0.0,
        seed: int = 0,
        mesh: Mesh = SINGLE,
        stage: StageSpec | None = None,
        chunk_tokens: int = 0,
    ):
        """teacher: weight of the last loop's distribution as a target of earlier readouts (`loops.teacher`).
        fixed_point: weight of a penalty on what the last loop changes (`loops.fixed_point`).
        chunk_tokens: tokens that FFNs, experts and head work on at a time; 0: all (model/chunks.py)."""
        super().__init__()
        act = act or ActConfig()
        experts = experts or ExpertsConfig()
        check_arguments(config, act, experts, attention)
        recompute = recompute or Recompute()
        self.config = config
        self.attention = attention
        self.teacher = teacher
        self.mesh = mesh
        self.stage = stage = stage or StageSpec.full(config)
        self.auxiliary_losses = has_auxiliary_losses(experts, act, fixed_point)
        selective = recompute.kind == "selective"
        if stage.holds_embedding(config):
            self.embed = Embedding(config.vocab_size, config.dim, mesh, chunk_tokens)
        self.prelude = nn.ModuleDict({str(i): DenseBlock(config, mesh, selective, chunk_tokens) for i in stage.prelude})
        if stage.has_loops:
            self.recurrent = Recurrent(config, act, experts, recompute, mesh, chunk_tokens, fixed_point)
        self.coda = nn.ModuleDict({str(i): DenseBlock(config, mesh, selective, chunk_tokens) for i in stage.coda})
        if stage.is_last:
            self.norm = replicated(Norm(config.dim, config.norm_eps), mesh)
            if not config.tie_embeddings:
                self.unembed = Embedding(config.vocab_size, config.dim, mesh, chunk_tokens)
        init_parameters(self, seed, config)

    def forward(
        self,
        input_ids: Tensor,
        n_loops: int | None = None,
        *,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        backprop: int | None = None,
        loops: Loops | None = None,
        label_counts: Tensor | None = None,
    ) -> Tensor | Losses:
        """input_ids (B, S) -> logits (B, S, V); with labels (B, S), the `Losses` of predicting them.

        n_loops: applications of the recurrent block, 1 to 512; default `max_loop_iters`.
        labels: also (B, T, S), a row for each loop, the last row for all further loops; see `losses`.
        document_ids: (B, S), equal within a document; attention is then restricted to documents.
        cache: keys and values of each row's previous tokens, which may differ in number; this call appends its own.
        backprop: gradient flows through the last N loops only; None: through all.
        loops: replaces n_loops and backprop; has all options of loops.
        label_counts: see `losses`.
        On a mesh each rank of a replica gets all of this, and computes its part. With context parallelism logits are
        those of this rank's tokens.
        Raises UserError for tokens beyond the context; without `loops` also for ids outside the vocabulary, shapes
        that do not match, and n_loops outside 1 to 512 (model/inputs.py).
        """
        config = self.config
        if loops is None:
            check_tokens(input_ids, labels, document_ids, config)
            loops = Loops(*resolve_n_loops(n_loops, backprop, config))
        end = input_ids.shape[1] + (cache.tokens if cache is not None else 0)
        if end > config.max_seq_len:
            raise UserError(
                f"a sequence of {end} tokens is longer than the context model.max_seq_len={config.max_seq_len}"
            )

        context = self.context(input_ids, document_ids, cache)
        ids = input_ids if context.shard is None else context.shard.local(input_ids)
        activations, counts = self.run(Activations(ids), range(loops.n_loops), loops, context)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        if labels is None:
            return self.head.gather_logits(self.head.logits(activations.h))
        return self.losses(activations, labels, loops, counts, label_counts, context.shard)

    @property
    def head(self) -> Embedding:
        """The table of the output head."""
        return self.embed if self.config.tie_embeddings else self.unembed

    def context(
        self, input_ids: Tensor, document_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> PassContext:
        """What all layers share in a pass over input_ids (B, S), of all ranks; see `forward` for the arguments."""
        dtype = next(self.parameters()).dtype
        kernel = choose_kernel(self.attention, input_ids.device, dtype, self.config)
        shard = context_shard(input_ids.shape, self.mesh, input_ids.device, document_ids)
        return build_context(self.config, input_ids.shape, input_ids.device, document_ids, cache, kernel, shard)

    def run(
        self, activations: Activations, loop_range: range, loops: Loops, context: PassContext
    ) -> tuple[Activations, Tensor]:
        """Run the layers that this rank holds; of all loops of the pass, those of `loop_range`.

        activations: the output of the previous stage; on the first stage `Activations` of this rank's input ids.
        Returns the activations after this rank's layers and the counts (len(loop_range), loop_layers * E).
        """
        stage = self.stage
        counts = torch.zeros(
            0, self.config.loop_layers * self.config.n_experts, dtype=torch.int64, device=activations.h.device
        )
        if stage.is_first:
            activations = Activations(self.embed.lookup(activations.h))
        for i, block in self.prelude.items():
            activations = Activations(block(activations.h, context, f"prelude.{i}"))
        if stage.has_loops:
            if stage.starts_loops:
                activations = self.recurrent.start(activations.h, loops, context)
            activations, counts = self.recurrent(activations, loop_range, loops, context)
            if stage.ends_loops:
                activations = self.recurrent.finish(activations)
        if self.coda and activations.readout_weights is not None:
            context = context.repeated(len(activations.readout_weights))
        for i, block in self.coda.items():
            activations = activations._replace(h=block(activations.h, context, f"coda.{i}"))
        if stage.is_last:
            activations = activations._replace(h=self.norm(activations.h))
        return activations, counts

    def input_shapes(self, batch: int, seq_len: int, readouts: int = 0) -> TensorSpecs:
        """Shapes and dtypes of the activations that this pipeline stage receives for (batch, seq_len) tokens.

        readouts: the number of readouts by earlier stages.
        """
        seq_len = local_tokens(seq_len, self.mesh)
        tokens = seq_len // self.mesh.tensor.size if self.mesh.sequence else seq_len
        shape = torch.Size([batch, tokens, self.config.dim])
        kv_shape = shared_kv_shape(self.config, batch, seq_len, self.mesh.tensor.size)
        return stage_input_shapes(self.stage, shape, next(self.parameters()).dtype, readouts, kv_shape)

    @in_range("head")
    def losses(
        self,
        activations: Activations,
        labels: Tensor,
        loops: Loops,
        counts: Tensor,
        label_counts: Tensor | None = None,
        shard: ContextShard | None = None,
    ) -> Losses:
        """activations: the output of `run` after the last norm. counts (n_loops, loop_layers * E).

        labels (B, S), or (B, T, S): row t for loop t of each sequence, the last row for all further loops. The
        objective is the sum over readouts of weight times mean loss, which includes what the last one teaches the
        others; the reported loss is the last readout's.
        label_counts: what the sums over labels are divided by, float (R,) by readout, for means over several passes;
        None: the number of labels of this pass.
        shard: this rank's tokens, of those that `labels` are of; None: all.
        """
        if shard is not None:
            labels = shard.local(labels)
        weights = activations.readout_weights  # (R, B, S') or None
        targets = labels_by_loop(labels, loops, 1 if weights is None else weights.shape[0])
        final = targets[-1]
        tokens = (targets != IGNORED).sum((1, 2))  # (R,)
        if label_counts is None:
            label_counts = all_reduce(tokens, self.mesh.context).clamp(min=1)
        if weights is not None:
            if self.mesh.sequence:
                weights = all_gather(weights, self.mesh.tensor, 2, partial=False)
            # Not 1 / label_counts: weights near 1 keep fp16 gradients from underflowing.
            weights = (weights * (label_counts[-1] / label_counts).view(-1, 1, 1)).flatten(0, 1)
        head = self.head.loss(activations.h, targets.flatten(0, 1), weights, len(targets), self.teacher)
        B = final.shape[0]
        aux_loss = activations.aux_loss.squeeze()
        if self.mesh.sequence and self.auxiliary_losses:
            aux_loss = all_reduce(aux_loss, self.mesh.tensor)
        token_losses, correct = head.losses[-B:], head.correct[-B:]
        # DeepSpeed takes the mean over all ranks of data x context; this is the one place that undoes it over context.
        ranks = self.mesh.context.size
        return Losses(
            objective=(head.total / label_counts[-1] + aux_loss) * ranks,
            cross_entropy=token_losses.sum() / label_counts[-1] * ranks,
            tokens=tokens[-1],
            token_losses=token_losses if shard is None else shard.full(token_losses),
            correct=correct if shard is None else shard.full(correct),
            expert_counts=counts,
        )

    def compile_blocks(self) -> None:
        """Compile each block with `torch.compile`, in place."""
        loops = self.recurrent.layers if self.stage.has_loops else []
        for block in [*self.prelude.values(), *loops, *self.coda.values()]:
            block.compile()

    def update_router_bias(self, counts: Tensor) -> None:
        """Call once per optimizer step with `Losses.expert_counts` of the global batch. No-op in reference mode."""
        if self.config.mode != "train" or not self.stage.has_loops:
            return
        by_layer = counts.view(-1, self.config.loop_layers, self.config.n_experts).sum(0)
        for layer, load in zip(self.recurrent.layers, by_layer, strict=True):
            layer.ffn.router.update_bias(load)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "Mythos":
        """The model of an export in any format (`mythos export`), or of a folder that the class for
        transformers has saved, in eval mode. Raises UserError if it cannot be read, or is another model's.

        >>> from mythos_dist import Mythos
        >>> model = Mythos.from_pretrained("exported")
        >>> model.training
        False
        """
        from mythos_dist.model.pretrained import load_pretrained

        return load_pretrained(Path(folder).expanduser(), dtype, device)

    def load_open_mythos(self, state_dict: dict[str, Tensor]) -> None:
        """Load the weights of an `open_mythos.OpenMythos` with the same config.

        Raises UserError if names or shapes do not match this config, or OpenMythos does not support its loops. With
        the package open-mythos: `model.load_open_mythos(open_mythos.OpenMythos(config).state_dict())`.
        """
        from mythos_dist.model.open_mythos import check_loop_settings, from_open_mythos

        check_loop_settings(self.config)
        try:
            self.load_state_dict(from_open_mythos(state_dict, self.config))
        except RuntimeError as error:
            raise UserError(
                f"the OpenMythos weights do not fit `model.*`; set it to the config that they were trained with: "
                f"{' '.join(str(error).split())}"
            ) from None

    def generate(self, input_ids: Tensor, max_new_tokens: int | None = None, **settings) -> Tensor:
        """Continue prompts (B, S) by up to max_new_tokens: (B, S + new) int64.

        settings: fields of `Sampling`, and those of `mythos_dist.generate.batch.generate`. Raises UserError for invalid
        ones.

        >>> import torch
        >>> from mythos_dist import Mythos
        >>> model = Mythos.from_pretrained("exported")
        >>> model.generate(torch.tensor([[1, 2, 3]]), 4, temperature=0, n_loops=2).shape
        torch.Size([1, 7])
        """
        from mythos_dist.generate.batch import generate

        if problem := type_problem("input_ids", input_ids, 2):
            raise UserError(problem)
        return generate(self, input_ids, max_new_tokens, **settings)


def labels_by_loop(labels: Tensor, loops: Loops, readouts: int) -> Tensor:
    """labels (B, S) or (B, T, S) -> (R, B, S): those of the last R loops."""
    if labels.dim() == 2:
        return labels.expand(readouts, *labels.shape)
    B, T, _ = labels.shape
    rows = []
    for t in range(loops.n_loops - readouts, loops.n_loops):
        row = torch.as_tensor(loops.own_index(t), device=labels.device).expand(B).clamp(max=T - 1)
        rows.append(labels[torch.arange(B, device=labels.device), row])
    return torch.stack(rows)
