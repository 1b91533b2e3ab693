"""DeepSpeed around the model: build the engine, run one step, measure the held-out loss.

One `train_step` = `accumulation` forward and backward passes, the optimizer step, then the router's bias, moved once
by the token counts of the whole global batch. Every rank passes the same collectives in the same order.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mythos_dist.config.deepspeed import deepspeed_config
from mythos_dist.config.schema import Config, OptimConfig
from mythos_dist.data.stream import MicroBatch
from mythos_dist.model.mythos import IGNORED, Losses, Mythos
from mythos_dist.parallel.process import device
from mythos_dist.train.schedule import learning_rate, loops_at, step_seed

# Not decayed: norms, injection, halting, biases, embeddings (the depth LoRA's scale is one too).
_NO_DECAY = ("norm.weight", "injection.", "act.", "bias", "embed.", "lora.scale.")


@dataclass
class StepResult:
    """What a step has measured; equal on all ranks."""

    loss: float  # cross entropy, mean over the global batch's tokens, nats
    objective: float  # what was differentiated: loss plus auxiliary losses
    grad_norm: float  # global, before clipping
    lr: float
    n_loops: int
    expert_counts: Tensor  # (n_loops, E) int64 on the CPU, of the global batch
    skipped: bool  # fp16: gradients overflowed, parameters stayed


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict]:
    """AdamW's groups: matrices decay, everything that `_NO_DECAY` names does not."""
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        (keep if any(part in name for part in _NO_DECAY) else decay).append(parameter)
    return [{"params": decay, "weight_decay": optim.weight_decay}, {"params": keep, "weight_decay": 0.0}]


class Engine:
    """A model under DeepSpeed, and the two things a run does with it: `train_step` and `evaluate`."""

    def __init__(self, config: Config):
        """Build model, optimizer and DeepSpeed's engine; the process group must be there."""
        import deepspeed

        self.config = config
        self.num_replicas = dist.get_world_size()
        self.model = Mythos(
            config.model, experts=config.experts, recompute=config.train.recompute, seed=config.run.seed
        ).to(device())
        o = config.optim
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, o),
            lr=o.lr,
            betas=(o.beta1, o.beta2),
            eps=o.eps,
            fused=True,  # one pass over the numbers: on a CPU an eighth of the time of the default
        )
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=deepspeed_config(config, self.num_replicas)
        )

    def train_step(self, micro_batches: Iterable[MicroBatch], step: int) -> StepResult:
        """Optimizer step `step` (1-based) on this replica's micro-batches."""
        config, engine = self.config, self.deepspeed
        n_loops = loops_at(config, step)
        torch.manual_seed(step_seed(config.run.seed, step, dist.get_rank()))
        lr = learning_rate(config.optim, step, config.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        engine.train()
        skipped_before = engine.skipped_steps
        total = torch.zeros(2, device=device())  # cross entropy, objective
        counts = torch.zeros(n_loops, config.model.n_experts, dtype=torch.int64, device=device())
        accumulation = engine.gradient_accumulation_steps()
        for batch in micro_batches:
            losses = self._forward(batch, batch.labels, n_loops)
            engine.backward(losses["objective"])
            engine.step()  # DeepSpeed steps the optimizer behind the last micro-batch only
            total += torch.stack([losses["cross_entropy"], losses["objective"].detach()]).float() / accumulation
            counts += losses["expert_counts"]
        dist.all_reduce(total)
        dist.all_reduce(counts)
        skipped = engine.skipped_steps > skipped_before
        if not skipped:
            self.model.update_router_bias(counts)
        grad_norm = engine.get_global_grad_norm()
        assert grad_norm is not None, "DeepSpeed's ZeRO optimizers all measure it"
        loss, objective = (total / self.num_replicas).tolist()
        return StepResult(
            loss=loss,
            objective=objective,
            grad_norm=float(grad_norm),
            lr=lr,
            n_loops=n_loops,
            expert_counts=counts.cpu(),
            skipped=skipped,
        )

    @torch.no_grad()
    def evaluate(self, passes: Iterator[tuple[MicroBatch, Tensor]]) -> float:
        """Mean cross entropy in nats over the samples that count, on all replicas.

        passes: micro-batches with a mask (B,) of the samples that count; as many on every rank.
        """
        self.deepspeed.eval()
        total = torch.zeros(2, dtype=torch.float64, device=device())  # summed cross entropy, tokens
        for batch, counts in passes:
            labels = torch.where(counts.unsqueeze(1), batch.labels, IGNORED)
            losses = self._forward(batch, labels, loops_at(self.config, 0))
            total += torch.stack([losses["cross_entropy"].double() * losses["tokens"], losses["tokens"].double()])
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def _forward(self, batch: MicroBatch, labels: Tensor, n_loops: int) -> Losses:
        to = device()
        document_ids = batch.document_ids.to(to) if self.config.data.document_mask else None
        return self.deepspeed(batch.input_ids.to(to), n_loops, labels=labels.to(to), document_ids=document_ids)
