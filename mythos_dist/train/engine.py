"""DeepSpeed around the model: build the engine, run one step, measure the held-out loss, at any layout.

One `train_step` = `accumulation` forward and backward passes, the optimizer step, then the router's bias, moved once
by the token counts of the whole global batch. Every rank passes the same collectives in the same order.
With one stage `DeepSpeedEngine` runs the passes, with several `PipelineEngine` does.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.checkpoint.state import LocalShard, RankState
from mythos_dist.config.deepspeed import deepspeed_config
from mythos_dist.config.schema import Config
from mythos_dist.data.stream import MicroBatch
from mythos_dist.model.flops import stage_costs
from mythos_dist.model.loop_recorder import LoopRecorder
from mythos_dist.model.loops import Loops
from mythos_dist.model.mythos import IGNORED, Losses, Mythos
from mythos_dist.model.parameter_groups import parameter_groups
from mythos_dist.model.recompute import Recompute
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.pipeline import loops_with_grad, plan_loops, plan_stages
from mythos_dist.parallel.process import device
from mythos_dist.parallel.tensor import shard_of
from mythos_dist.parallel.traffic import Totals, Traffic
from mythos_dist.train.depth import HeldOut, LoopProbe
from mythos_dist.train.schedule import StepLoops, learning_rate, loops_at, state_seed, step_seed


@dataclass
class StepResult:
    """What a step has measured; equal on all ranks."""

    loss: float  # cross entropy, mean over the global batch's tokens, nats
    objective: float  # what was differentiated: loss plus auxiliary losses
    grad_norm: float  # global, before clipping
    lr: float
    n_loops: int
    backprop: int  # loops that gradient flows through
    mean_loops: float  # of the sequences, where each has its own number
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
        self.parts = plan_stages(config.model, config.loops.mean_of(config.model), mesh.pipe.size, self.costs)
        train, o = config.train, config.optim
        self.model = Mythos(
            config.model,
            act=config.act,
            experts=config.experts,
            recompute=Recompute(train.recompute, train.recompute_every),
            attention=train.attention,
            seed=config.run.seed,
            mesh=mesh,
            stage=self.parts[mesh.pipe.rank],
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
        readouts = config.loops.objective == "per_loop"  # as many as a step has loops
        self.stage = StageLayer(self.model, groups) if mesh.pipe.size > 1 else None
        self.deepspeed: Any
        self.deepspeed, *_ = deepspeed.initialize(
            model=Pipeline(self.stage, self.parts, mesh, readouts) if self.stage else self.model,
            optimizer=self.optimizer,
            config=deepspeed_config(config, mesh.data.size),
            mpu=None if self.stage else mpu_of(mesh),
        )
        if self.stage:
            reduce_tied_weights_alike(self.deepspeed)
        mend_gradient_norm(self.deepspeed.optimizer, mesh)
        start_moments(self.deepspeed.optimizer)

    @functools.cached_property
    def state(self) -> RankState:
        """Views of what this rank holds of parameters (the fp32 master copies), moments and buffers."""
        from mythos_dist.train.deepspeed_seam import partition_of

        state, mesh, stage = {}, self.mesh, self.model.stage
        for name, parameter in self.model.named_parameters():
            if partition := partition_of(self.deepspeed.optimizer, parameter):
                place = shard_of(parameter)
                # A pipeline's stages share weights, and the ranks of a tensor line hold some of them whole.
                writes = not getattr(parameter, "ds_pipe_replicated", False) and (
                    mesh.tensor.rank == 0 or getattr(parameter, "tensor_model_parallel", False)
                )
                shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
                piece = Piece(shape, place.start, partition.first, partition.last)
                state[name] = LocalShard(piece, place.full_shape, partition.values, writes)
        for name, buffer in self.model.named_buffers():  # the router's bias
            shape = tuple(buffer.shape)
            writes = stage.starts_loops and mesh.data.rank == 0 and mesh.tensor.rank == 0
            state[name] = LocalShard(Piece.full(shape), shape, {"buffer": buffer.view(-1)}, writes)
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
            total, counts = self._passes(list(micro_batches), loops, step)
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
            mean_loops=float(np.mean(loops.depths)) if loops.depths else loops.n_loops,
            expert_counts=counts.cpu(),
            skipped=skipped,
            communication=self.traffic.total_over_ranks() if self.traffic else None,
        )

    def _passes(self, micro_batches: list[MicroBatch], loops: StepLoops, step: int) -> tuple[Tensor, Tensor]:
        """Forward, backward and the optimizer's step. This rank's sums over the micro-batches: (cross entropy,
        objective), from the last stage; and counts (n_loops, E), each loop's from the stage that ran it."""
        total = torch.zeros(2, dtype=torch.float64, device=device())
        counts = torch.zeros(loops.n_loops, self.config.model.n_experts, dtype=torch.int64, device=device())
        readouts = self.config.loops.objective == "per_loop"
        first = self.mesh.data.rank * self.config.train.global_batch // self.mesh.data.size
        work = []
        for i, batch in enumerate(micro_batches):
            positions = range(first + i * len(batch.labels), first + (i + 1) * len(batch.labels))
            work.append((batch, batch.labels, self._loops_of(loops, step, positions, readouts)))
        if self.stage:
            turns = self._hand_out(work)
            self.deepspeed.train_batch(iter(self._tokens(micro_batches)))
            for found in self.stage.counts:
                counts[turns.start : turns.stop] += found
            losses = self.stage.losses
        else:
            losses = []
            for one in work:
                found = self._forward(*one)
                self.deepspeed.backward(found["objective"])
                self.deepspeed.step()  # DeepSpeed steps the optimizer behind the last micro-batch only
                counts += found["expert_counts"]
                losses.append(found)
        for found in losses:
            total += torch.stack([found["cross_entropy"], found["objective"].detach()])
        return total, counts

    @torch.no_grad()
    def evaluate(self, passes: Iterable[tuple[MicroBatch, Tensor]], n_loops: int | None = None) -> HeldOut:
        """Over the samples that count, on all replicas, with `n_loops` loops; None: the mean of training.

        passes: micro-batches with a mask (B,) of the samples that count; as many on every rank.
        """
        self.deepspeed.eval()
        loops = StepLoops(n_loops or self.config.loops.mean_of(self.config.model), 0)
        work = []
        for i, (batch, counts) in enumerate(passes):
            labels = torch.where(counts.unsqueeze(1), batch.final_labels, IGNORED)
            first = (i * self.mesh.data.size + self.mesh.data.rank) * len(counts)
            work.append((batch, labels, self._loops_of(loops, 0, range(first, first + len(counts)))))
        if self.stage:
            self._hand_out(work)
            tokens = iter(self._tokens([batch for batch, *_ in work]))
            self.deepspeed.eval_batch(tokens, num_micro_batches=len(work))
            losses = self.stage.losses
        else:
            losses = [self._forward(*one) for one in work]
        total = torch.zeros(3, dtype=torch.float64, device=device())  # summed cross entropy, correct tokens, tokens
        for found in losses:
            tokens = found["tokens"].double()
            total += torch.stack([found["cross_entropy"].double() * tokens, found["correct"].sum(), tokens])
        (total,) = self._sum_over_ranks(total)
        return HeldOut(float(total[0] / total[2]), float(total[1] / total[2]))

    def probe_loops(self, batch: MicroBatch) -> LoopProbe:
        """Measure each loop of a forward pass over one micro-batch per replica, with the mean number of loops."""
        n_loops, recurrent = self.config.loops.mean_of(self.config.model), getattr(self.model, "recurrent", None)
        passes, watch = [(batch, torch.ones(len(batch.labels), dtype=torch.bool))], LoopRecorder(self.mesh)
        one = self.evaluate(passes, 1)
        try:
            if recurrent is not None:
                recurrent.recorder = watch
            found = self.evaluate(passes, n_loops)
        finally:
            if recurrent is not None:
                recurrent.recorder = None
        rows = torch.zeros(n_loops + 1, len(LoopRecorder.COLUMNS), device=device())
        for t, row in watch.rows.items():
            rows[t] = row
        if n_loops - 1 in watch.rows and watch.rho is not None:  # on the stage that ran the last loop
            rows[n_loops, :3] = torch.stack([torch.ones_like(watch.rho), watch.gains[-1], watch.rho])
        (rows,) = self._sum_over_ranks(rows)
        means = (rows[:-1] / rows[:-1, :1]).T.tolist()
        gain, rho = (rows[-1, 1:3] / rows[-1, 0]).tolist()
        return LoopProbe(n_loops, found.loss, one.loss, dict(zip(LoopRecorder.COLUMNS, means, strict=True)), gain, rho)

    def _sum_over_ranks(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """Over replicas and stages: the ranks of one tensor line have found the same."""
        for found in sums:
            if self.mesh.tensor.rank:
                found.zero_()
            dist.all_reduce(found)
        return sums

    def _loops_of(self, step_loops: StepLoops, step: int, positions: range, readouts: bool = False) -> Loops:
        """The loops of sequences at `positions` of step `step`'s global batch, or of the held-out samples (step 0)."""
        n_loops, frozen, depths = step_loops
        seeds = None
        if self.config.model.initial_state == "random":
            seeds = torch.tensor([state_seed(self.config.run.seed, step, position) for position in positions])
        own = torch.tensor(depths[positions.start : positions.stop], device=device()) if depths else None
        return Loops(n_loops, frozen, own, seeds, readouts)

    def _forward(self, batch: MicroBatch, labels: Tensor, loops: Loops) -> Losses:
        ids, labels, documents = self._move(batch, labels)
        return self.deepspeed(ids, labels=labels, document_ids=documents, loops=loops)

    def _move(self, batch: MicroBatch, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        to = device()
        documents = batch.document_ids.to(to) if self.config.data.document_mask else None
        return batch.input_ids.to(to), labels.to(to), documents

    def _hand_out(self, work: list[tuple[MicroBatch, Tensor, Loops]]) -> range:
        """Put micro-batches with labels and loops before this pipeline stage; returns the loops that it will run."""
        from mythos_dist.train.deepspeed_seam import Work

        assert self.stage is not None
        n_loops, frozen, *_, readouts = work[0][2]
        stages = plan_loops(tuple(self.parts), n_loops, frozen, self.costs)
        turns, before = stages[self.mesh.pipe.rank], stages[: self.mesh.pipe.rank]
        read = sum(len(loops_with_grad(each, frozen)) for each in before) if readouts else 0
        self.stage.counts, self.stage.losses = [], []
        for batch, labels, loops in work:
            self.stage.work.append(Work(*self._move(batch, labels), turns, read, loops))
        return turns

    @staticmethod
    def _tokens(batches: list[MicroBatch]) -> list[tuple[Tensor, Tensor]]:
        """What PipelineEngine wants on its first and last stage; ours have their work already."""
        return [(batch.input_ids, batch.labels) for batch in batches]
