"""DeepSpeed around the model: build the engine, run one step, measure the held-out loss, at any layout.

One `train_step` = `accumulation` forward and backward passes, the optimizer step, then the router's bias, moved once
by the token counts of the whole global batch. Every rank passes the same collectives in the same order.
With one stage `DeepSpeedEngine` runs the passes, with several `PipelineEngine` does.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.checkpoint.state import Held, State
from mythos_dist.config.deepspeed import deepspeed_config
from mythos_dist.config.schema import Config
from mythos_dist.data.stream import MicroBatch
from mythos_dist.model.mythos import IGNORED, Losses, Mythos
from mythos_dist.model.parameter_groups import parameter_groups
from mythos_dist.model.recompute import Recompute
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.pipeline import plan_loops, plan_parts
from mythos_dist.parallel.process import device
from mythos_dist.parallel.tensor import slice_of
from mythos_dist.parallel.traffic import Totals, Traffic
from mythos_dist.plan.cost import stage_costs
from mythos_dist.train.schedule import Loops, learning_rate, loops_at, step_seed


@dataclass
class StepResult:
    """What a step has measured; equal on all ranks."""

    loss: float  # cross entropy, mean over the global batch's tokens, nats
    objective: float  # what was differentiated: loss plus auxiliary losses
    grad_norm: float  # global, before clipping
    lr: float
    n_loops: int
    backprop: int  # loops that gradient flows through
    expert_counts: Tensor  # (n_loops, E) int64 on the CPU, of the global batch
    skipped: bool  # fp16: gradients overflowed, parameters stayed
    communication: Totals | None  # bytes of all ranks' messages, by axis and kind; None: not counted


class LimitedAdamW(torch.optim.AdamW):
    """AdamW that leaves everything as it is when told to: DeepSpeed knows the gradients' norm when it calls it.

    The norm is the same number on every rank, so all ranks skip or none does.
    """

    skip: Callable[[], bool] = staticmethod(lambda: False)

    def step(self, closure: Any = None) -> Any:
        """As AdamW's, unless `skip()`."""
        return None if self.skip() else super().step(closure)


class Engine:
    """A model under DeepSpeed, and the two things a run does with it: `train_step` and `evaluate`."""

    def __init__(self, config: Config, mesh: Mesh):
        """Build model, optimizer and DeepSpeed's engine; the process group must be there."""
        import deepspeed

        from mythos_dist.train.deepspeed_seam import (
            Pipeline,
            StageLayer,
            import_muon,
            make_experts_known,
            mend_gradient_norm,
            mpu_of,
            reduce_tied_weights_alike,
            register_experts,
            start_moments,
        )

        self.config = config
        self.mesh = mesh
        self.traffic = Traffic(mesh) if config.run.count_communication else None
        self.costs = stage_costs(config)
        self.parts = plan_parts(config.model, config.loops.mean_of(config.model), mesh.pipe.size, self.costs)
        train, o = config.train, config.optim
        self.model = Mythos(
            config.model,
            experts=config.experts,
            recompute=Recompute(train.recompute, train.recompute_every),
            attention=train.attention,
            seed=config.run.seed,
            mesh=mesh,
            part=self.parts[mesh.pipe.rank],
        ).to(device())
        if train.compile:
            self.model.compile_blocks()
        import_muon()
        register_experts(mesh)
        make_experts_known(self.model, mesh)
        groups = parameter_groups(self.model, o, mesh)
        self.optimizer = LimitedAdamW(
            groups,
            lr=o.lr,
            betas=(o.beta1, o.beta2),
            eps=o.eps,
            fused=True,  # one pass over the numbers: on a CPU an eighth of the time of the default
        )
        self.stage = StageLayer(self.model, groups) if mesh.pipe.size > 1 else None
        self.deepspeed: Any
        self.deepspeed, *_ = deepspeed.initialize(
            model=Pipeline(self.stage, self.parts, mesh) if self.stage else self.model,
            optimizer=self.optimizer,
            config=deepspeed_config(config, mesh.data.size),
            mpu=None if self.stage else mpu_of(mesh),
        )
        if self.stage:
            reduce_tied_weights_alike(self.deepspeed)
        mend_gradient_norm(self.deepspeed.optimizer, mesh)
        start_moments(self.deepspeed.optimizer)

    @functools.cached_property
    def state(self) -> State:
        """Views of what this rank holds of parameters (the fp32 master copies), moments and buffers."""
        from mythos_dist.train.deepspeed_seam import partition_of

        state, mesh, part = {}, self.mesh, self.model.part
        for name, parameter in self.model.named_parameters():
            if partition := partition_of(self.deepspeed.optimizer, parameter):
                place = slice_of(parameter)
                # A pipeline's stages share weights, and the ranks of a tensor line hold some of them whole.
                writes = not getattr(parameter, "ds_pipe_replicated", False) and (
                    mesh.tensor.rank == 0 or getattr(parameter, "tensor_model_parallel", False)
                )
                shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
                piece = Piece(shape, place.start, partition.first, partition.last)
                state[name] = Held(piece, place.whole, partition.values, writes)
        for name, buffer in self.model.named_buffers():  # the router's bias
            shape = tuple(buffer.shape)
            writes = part.loops_start and mesh.data.rank == 0 and mesh.tensor.rank == 0
            state[name] = Held(Piece.whole(shape), shape, {"buffer": buffer.view(-1)}, writes)
        return state

    def optimizer_state(self) -> dict[str, Any]:
        """Steps taken and skipped, fp16's loss scale: the same on every rank."""
        from mythos_dist.train.deepspeed_seam import optimizer_state

        return optimizer_state(self.deepspeed)

    def after_load(self, optimizer_state: dict[str, Any], step: int) -> None:
        """Go on behind step `step` with a `state` that was filled. Every rank calls this."""
        from mythos_dist.train.deepspeed_seam import set_optimizer_state, spread_masters

        set_optimizer_state(self.deepspeed, optimizer_state, step)
        spread_masters(self.deepspeed.optimizer)

    def train_step(self, micro_batches: Iterable[MicroBatch], step: int, norm_limit: float = math.inf) -> StepResult:
        """Optimizer step `step` (1-based) on this replica's micro-batches.

        It is skipped, and nothing changes, if gradients are not finite or their norm is above `norm_limit`.
        """
        config, engine = self.config, self.deepspeed
        loops = loops_at(config, step)
        torch.manual_seed(step_seed(config.run.seed, step, self.mesh))
        lr = learning_rate(config.optim, step, config.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        engine.train()
        skipped_before = engine.skipped_steps
        # The engine itself learns of the norm after the optimizer only.
        self.optimizer.skip = lambda: float(engine.optimizer._global_grad_norm) > norm_limit
        with self.traffic or contextlib.nullcontext():
            total, counts = self._passes(list(micro_batches), loops)
        self._sum_over_ranks(total, counts)
        skipped = engine.skipped_steps > skipped_before or self.optimizer.skip()
        if not skipped:
            self.model.update_router_bias(counts)
        grad_norm = engine.get_global_grad_norm()
        assert grad_norm is not None, "DeepSpeed's ZeRO optimizers all measure it"
        loss, objective = (total / (self.mesh.data.size * engine.gradient_accumulation_steps())).tolist()
        return StepResult(
            loss=loss,
            objective=objective,
            grad_norm=float(grad_norm),
            lr=lr,
            n_loops=loops.n_loops,
            backprop=loops.n_loops - loops.frozen,
            expert_counts=counts.cpu(),
            skipped=skipped,
            communication=self.traffic.of_all_ranks() if self.traffic else None,
        )

    def _passes(self, micro_batches: list[MicroBatch], loops: Loops) -> tuple[Tensor, Tensor]:
        """Forward, backward and the optimizer's step. This rank's sums over the micro-batches: (cross entropy,
        objective), from the last stage; and counts (n_loops, E), each loop's from the stage that ran it."""
        total = torch.zeros(2, dtype=torch.float64, device=device())
        counts = torch.zeros(loops.n_loops, self.config.model.n_experts, dtype=torch.int64, device=device())
        if self.stage:
            turns = self._hand_out(((batch, batch.labels) for batch in micro_batches), loops)
            self.deepspeed.train_batch(iter(self._tokens(micro_batches)))
            for found in self.stage.counts:
                counts[turns.start : turns.stop] += found
            losses = self.stage.losses
        else:
            losses = []
            for batch in micro_batches:
                found = self._forward(batch, batch.labels, loops)
                self.deepspeed.backward(found["objective"])
                self.deepspeed.step()  # DeepSpeed steps the optimizer behind the last micro-batch only
                counts += found["expert_counts"]
                losses.append(found)
        for found in losses:
            total += torch.stack([found["cross_entropy"], found["objective"].detach()])
        return total, counts

    @torch.no_grad()
    def evaluate(self, passes: Iterator[tuple[MicroBatch, Tensor]]) -> float:
        """Mean cross entropy in nats over the samples that count, on all replicas.

        passes: micro-batches with a mask (B,) of the samples that count; as many on every rank.
        """
        self.deepspeed.eval()
        loops = Loops(self.config.loops.mean_of(self.config.model), 0)
        work = [(batch, torch.where(counts.unsqueeze(1), batch.labels, IGNORED)) for batch, counts in passes]
        if self.stage:
            self._hand_out(work, loops)
            tokens = iter(self._tokens([batch for batch, _ in work]))
            self.deepspeed.eval_batch(tokens, num_micro_batches=len(work))
            losses = self.stage.losses
        else:
            losses = [self._forward(batch, labels, loops) for batch, labels in work]
        total = torch.zeros(2, dtype=torch.float64, device=device())  # summed cross entropy, tokens
        for found in losses:
            total += torch.stack([found["cross_entropy"].double() * found["tokens"], found["tokens"].double()])
        (total,) = self._sum_over_ranks(total)
        return float(total[0] / total[1])

    def _sum_over_ranks(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """Over replicas and stages: the ranks of one tensor line have found the same."""
        for found in sums:
            if self.mesh.tensor.rank:
                found.zero_()
            dist.all_reduce(found)
        return sums

    def _forward(self, batch: MicroBatch, labels: Tensor, loops: Loops) -> Losses:
        ids, labels, documents = self._move(batch, labels)
        return self.deepspeed(
            ids, loops.n_loops, labels=labels, document_ids=documents, backprop=loops.n_loops - loops.frozen
        )

    def _move(self, batch: MicroBatch, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        to = device()
        documents = batch.document_ids.to(to) if self.config.data.document_mask else None
        return batch.input_ids.to(to), labels.to(to), documents

    def _hand_out(self, work: Iterable[tuple[MicroBatch, Tensor]], loops: Loops) -> range:
        """Put micro-batches and labels before this pipeline stage; returns the loops that it will run."""
        from mythos_dist.train.deepspeed_seam import Work

        assert self.stage is not None
        turns = plan_loops(tuple(self.parts), *loops, self.costs)[self.mesh.pipe.rank]
        self.stage.counts, self.stage.losses = [], []
        for batch, labels in work:
            self.stage.work.append(Work(*self._move(batch, labels), turns, *loops))
        return turns

    @staticmethod
    def _tokens(batches: list[MicroBatch]) -> list[tuple[Tensor, Tensor]]:
        """What PipelineEngine wants on its first and last stage; ours have their work already."""
        return [(batch.input_ids, batch.labels) for batch in batches]
