"""DeepSpeed around the model: build the engine, train a step, evaluate, at any layout.

One `train_step` = a forward and a backward pass per micro-batch, the optimizer step, then one update of the router's
bias from the token counts of the global batch. Every rank calls the same collectives in the same order.
With one stage `DeepSpeedEngine` runs the passes, with several `PipelineEngine` does.

Importing this module imports DeepSpeed, which selects its accelerator then: the process group comes first
(`parallel/process.py`), and `loop.py` imports this module in a function.

Decisions: PARALLEL-15.
"""

import contextlib
import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mythos_dist.checkpoint.manifest import LocalShards
from mythos_dist.config.deepspeed import deepspeed_config
from mythos_dist.config.schema import Config
from mythos_dist.data.stream import MicroBatch
from mythos_dist.model.experts import Experts
from mythos_dist.model.flops import stage_loops, stage_specs
from mythos_dist.model.loops import Loops
from mythos_dist.model.mythos import IGNORED, Losses, Mythos, labels_by_loop
from mythos_dist.model.parameter_groups import count_elements
from mythos_dist.model.recompute import Recompute
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.pipeline import loops_with_grad
from mythos_dist.parallel.process import device
from mythos_dist.parallel.ranges import named_range
from mythos_dist.parallel.traffic import Traffic
from mythos_dist.train.average import WeightAverage, add_averages
from mythos_dist.train.deepspeed_patches import (
    fix_gradient_norm,
    import_muon,
    mark_experts,
    mpu_of,
    register_expert_groups,
    release,
)
from mythos_dist.train.evaluation import HeldOut
from mythos_dist.train.metrics import StepResult
from mythos_dist.train.optimizer import build_optimizer
from mythos_dist.train.pipeline_stage import Pipeline, StageInput, StageLayer, reduce_tied_weights_identically
from mythos_dist.train.schedule import StepLoops, learning_rate, loops_at, phase_at, state_seed, step_seed
from mythos_dist.train.zero_state import (
    copy_masters_to_parameters,
    init_moments,
    local_shards_of,
    optimizer_state,
    set_optimizer_state,
)


class PassInputs(NamedTuple):
    """The inputs of a forward pass."""

    batch: MicroBatch
    labels: Tensor  # (B, S) or (B, T, S)
    loops: Loops
    label_counts: Tensor | None = None  # (R,), what the losses of this pass are divided by; None: its own labels
    document_mask: bool = False  # restrict attention to documents, whatever data.document_mask is


class Engine:
    """A model under DeepSpeed."""

    def __init__(self, config: Config, mesh: Mesh):
        """Build model, optimizer and DeepSpeed's engine. The process group exists."""
        self.config = config
        self.mesh = mesh
        self.traffic = Traffic(mesh) if config.run.count_communication else None
        self.stages = stage_specs(config)
        self.model = self._build_model()
        import_muon()
        register_expert_groups(mesh)
        mark_experts(self.model, mesh)
        self.optimizer = build_optimizer(self.model, config, mesh)
        self.stage = StageLayer(self.model, self.optimizer.param_groups) if mesh.pipe.size > 1 else None
        module = self.model
        if self.stage:
            # With a readout per loop, what stages send depends on the number of loops.
            dynamic_shape = config.loops.objective == "per_loop"
            module = Pipeline(self.stage, self.stages, mesh, dynamic_shape)
        self.ds_engine: Any
        self.ds_engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self.optimizer,
            config=deepspeed_config(config, mesh.data.size, count_elements(config, mesh)),
            mpu=None if self.stage else mpu_of(mesh),
        )
        if self.stage:
            reduce_tied_weights_identically(self.ds_engine)
        fix_gradient_norm(self.ds_engine.optimizer, mesh)
        init_moments(self.ds_engine.optimizer)
        self.norm_limit = math.inf  # of the current step: it is skipped if the gradient norm is larger
        # Not engine.get_global_grad_norm(), which is set after the optimizer's step.
        self.optimizer.skip = lambda: float(self.ds_engine.optimizer._global_grad_norm) > self.norm_limit
        self.average = WeightAverage(config.average, self.local_shards)

    def close(self) -> None:
        """This engine is not used again: its memory is freed with it."""
        for layer in self.model.modules():
            if isinstance(layer, Experts):
                layer.start_pass(0)  # the sums of the last pass refer to its graph, and that to the weights
        release(self.ds_engine)

    def _build_model(self) -> Mythos:
        config, train = self.config, self.config.train
        model = Mythos(
            config.model,
            act=config.act,
            experts=config.experts,
            recompute=Recompute(train.recompute, train.recompute_every, train.offload == "saved"),
            attention=train.attention,
            teacher=config.loops.teacher,
            fixed_point=config.loops.fixed_point,
            seed=config.run.seed,
            mesh=self.mesh,
            stage=self.stages[self.mesh.pipe.rank],
            chunk_tokens=config.chunk_size,
        ).to(device())
        if train.compile:
            model.compile_blocks()
        return model

    @functools.cached_property
    def local_shards(self) -> LocalShards:
        """What this rank holds of the run's tensors, to save and to load."""
        shards = local_shards_of(self.model, self.ds_engine.optimizer, self.mesh)
        if self.config.average.kind != "off":
            add_averages(shards)
        return shards

    def optimizer_state(self) -> dict[str, Any]:
        """State that is equal on every rank: steps taken and skipped, fp16's loss scale, snapshots in the average."""
        average = {"average_samples": self.average.snapshots} if self.average.snapshots else {}
        return optimizer_state(self.ds_engine) | average

    def after_load(self, optimizer_state: dict[str, Any], step: int, average_samples: int = 0) -> None:
        """Resume after step `step`, when `local_shards` were filled. Every rank calls this."""
        set_optimizer_state(self.ds_engine, optimizer_state, step)
        copy_masters_to_parameters(self.ds_engine.optimizer)
        self.average.snapshots = average_samples

    def train_step(self, micro_batches: Iterable[MicroBatch], step: int, norm_limit: float = math.inf) -> StepResult:
        """Optimizer step `step` (1-based) of the schedule on this replica's micro-batches.

        The step is skipped, and nothing changes, if gradients are not finite or their norm is above `norm_limit`.
        """
        config, engine = self.config, self.ds_engine
        loops = loops_at(config, step)
        torch.manual_seed(step_seed(config.run.seed, step, self.mesh))
        lr = learning_rate(config.optim, step, config.train.steps)
        matrix_lr = learning_rate(replace(config.optim, lr=config.optim.matrix_lr), step, config.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = matrix_lr if "matrix_exchange" in group else lr
        # DeepSpeed counts micro-batches over the run, and a step would end wherever that count is divisible.
        engine.micro_steps = 0
        # To it the ranks of the context axis are replicas too.
        engine.set_train_batch_size(config.train.batch_size_at(step) * self.mesh.context.size)
        engine.train()
        skipped_before = engine.skipped_steps
        self.norm_limit = norm_limit
        passes = self._train_inputs(micro_batches, loops, step)
        with self.traffic or contextlib.nullcontext():
            total, counts = self._train_passes(passes, loops)
        self.sum_over_ranks(total, counts)
        skipped = engine.skipped_steps > skipped_before or self.optimizer.skip()
        if not skipped:
            self.model.update_router_bias(counts)
        grad_norm = engine.get_global_grad_norm()
        assert grad_norm is not None, "every ZeRO optimizer of DeepSpeed measures it"
        loss, objective = (total / (self.mesh.data_context.size * engine.gradient_accumulation_steps())).tolist()
        return StepResult(
            loss=loss,
            objective=objective,
            grad_norm=float(grad_norm),
            lr=lr,
            phase=phase_at(config.optim, step, config.train.steps),
            n_loops=loops.n_loops,
            backprop=loops.n_loops - loops.no_grad_loops,
            mean_loops=float(np.mean(loops.depths)) if loops.depths else loops.n_loops,
            expert_counts=counts.cpu(),
            skipped=skipped,
            communication=self.traffic.total_over_ranks() if self.traffic else None,
        )

    def _train_inputs(self, micro_batches: Iterable[MicroBatch], loops: StepLoops, step: int) -> list[PassInputs]:
        """The inputs of a step's passes on this replica."""
        readouts = self.config.loops.objective == "per_loop"
        position = self.mesh.data.rank * self.config.train.batch_size_at(step) // self.mesh.data.size
        passes = []
        for batch in micro_batches:
            positions = range(position, position + len(batch.labels))
            loops_of_batch = self._loops_of(loops, step, positions, readouts)
            passes.append(PassInputs(batch, batch.labels.to(device()), loops_of_batch))
            position = positions.stop
        label_counts = self._label_counts(passes, self.config.loops.readouts(loops.n_loops, loops.no_grad_loops))
        return [one._replace(label_counts=label_counts) for one in passes]

    def _train_passes(self, passes: list[PassInputs], loops: StepLoops) -> tuple[Tensor, Tensor]:
        """Forward and backward passes and the optimizer's step.

        Returns this rank's sums over the micro-batches: (cross entropy, objective), on the last stage, and the token
        counts (n_loops, loop_layers * E) of the loops that this stage has run.
        """
        model = self.config.model
        experts = model.loop_layers * model.n_experts
        counts = torch.zeros(loops.n_loops, experts, dtype=torch.int64, device=device())
        if self.stage:
            loop_range = self._enqueue(passes)
            self.ds_engine.train_batch(iter(_tokens(passes)))
            for stage_counts in self.stage.counts:
                counts[loop_range.start : loop_range.stop] += stage_counts
            losses = self.stage.losses
        else:
            losses = []
            for one in passes:
                with named_range("forward"):
                    loss = self._forward(one)
                with named_range("backward"):
                    self.ds_engine.backward(loss["objective"])
                with named_range("optimizer"):
                    self.ds_engine.step()  # DeepSpeed steps the optimizer after the last micro-batch only
                counts += loss["expert_counts"]
                losses.append(loss)
        total = torch.zeros(2, dtype=torch.float64, device=device())
        for loss in losses:
            total += torch.stack([loss["cross_entropy"], loss["objective"].detach()])
        return total, counts

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[tuple[MicroBatch, Tensor]], n_loops: int | None = None) -> HeldOut:
        """Loss and accuracy over all replicas, with `n_loops` loops; None: the mean of training.

        micro_batches: each with a mask (B,) of the samples to evaluate; the same number of them on every rank.
        """
        passes = []
        for i, (batch, mask) in enumerate(micro_batches):
            labels = torch.where(mask.unsqueeze(1), batch.final_labels, IGNORED)
            passes.append(PassInputs(batch, labels, self._eval_loops(i, len(mask), n_loops)))
        total = torch.zeros(3, dtype=torch.float64, device=device())  # summed cross entropy, correct tokens, tokens
        for loss in self._eval_passes(passes):
            total += torch.stack([loss["token_losses"].double().sum(), loss["correct"].sum(), loss["tokens"]])
        self.sum_over_ranks(total)
        return HeldOut(float(total[0] / total[2]), float(total[1] / total[2]))

    @torch.no_grad()
    def score_tokens(
        self, micro_batches: Iterable[tuple[MicroBatch, Tensor]], size: int, n_loops: int | None = None
    ) -> Tensor:
        """The log-probability of labels, in nats, and whether each has the highest logit: (2, size) float64, on every
        rank. Attention is restricted to the documents of a micro-batch.

        micro_batches: each with the column of every label in the result, (B, S) int64, -1: none; the same number of
        them on every rank.
        """
        passes, columns = [], []
        for i, (batch, column) in enumerate(micro_batches):
            loops = self._eval_loops(i, len(column), n_loops)
            passes.append(PassInputs(batch, batch.final_labels, loops, document_mask=True))
            columns.append(column.to(device()))
        total = torch.zeros(2, size, dtype=torch.float64, device=device())
        # Only the last pipeline stage has losses.
        for column, loss in zip(columns, self._eval_passes(passes), strict=False):
            scored = column >= 0
            total[0, column[scored]] = -loss["token_losses"][scored].double()
            total[1, column[scored]] = loss["correct"][scored].double()
        self.sum_over_ranks(total)
        return total

    def _eval_loops(self, index: int, size: int, n_loops: int | None) -> Loops:
        """The loops of this replica's micro-batch `index`, of `size` sequences, in an evaluation."""
        loops = StepLoops(n_loops or self.config.loops.mean_of(self.config.model), 0)
        first = (index * self.mesh.data.size + self.mesh.data.rank) * size
        return self._loops_of(loops, 0, range(first, first + size))

    def _eval_passes(self, passes: list[PassInputs]) -> list[Losses]:
        """The losses of passes without gradient; with pipeline stages, on the last one only."""
        self.ds_engine.eval()
        if not self.stage:
            return [self._forward(one) for one in passes]
        self._enqueue(passes)
        self.ds_engine.eval_batch(iter(_tokens(passes)), num_micro_batches=len(passes))
        return self.stage.losses

    def evaluate_average(self, micro_batches: Iterable[tuple[MicroBatch, Tensor]]) -> HeldOut:
        """As `evaluate`, of the averaged weights. Nothing has changed afterwards, to the bit."""
        self._swap_average()
        result = self.evaluate(micro_batches)
        self._swap_average()
        return result

    def _swap_average(self) -> None:
        self.average.swap()
        copy_masters_to_parameters(self.ds_engine.optimizer)

    def _label_counts(self, passes: list[PassInputs], readouts: int) -> Tensor | None:
        """(R,) fp32: the mean number of labels of a pass, by readout, over the passes of all replicas. None: every pass
        has B * S labels.

        Each loss is a sum divided by it, so that a step's loss is the mean over the labels of the global batch, however
        unequally they are spread over micro-batches and replicas. Only stored targets and loss masks leave labels out
        (`IGNORED`).
        """
        if passes[0].labels.dim() == 2:
            return None
        total = torch.zeros(readouts, dtype=torch.float64, device=device())
        for one in passes:
            total += (labels_by_loop(one.labels, one.loops, readouts) != IGNORED).sum((1, 2))
        self.sum_over_ranks(total)
        copies = self.mesh.pipe.size * self.mesh.context.size  # of each label
        return ((total / copies).clamp(min=1) / (len(passes) * self.mesh.data.size)).float()

    def sum_over_ranks(self, *tensors: Tensor) -> None:
        """Sum over replicas, stages and the context axis, in place. The ranks of one tensor group have equal values,
        which count once."""
        for tensor in tensors:
            if self.mesh.tensor.rank:
                tensor.zero_()
            dist.all_reduce(tensor)

    def _loops_of(self, step_loops: StepLoops, step: int, positions: range, readouts: bool = False) -> Loops:
        """The loops of sequences at `positions` of step `step`'s global batch, or of the held-out samples (step 0)."""
        n_loops, no_grad_loops, depths = step_loops
        seeds = None
        if self.config.model.initial_state == "random":
            seeds = torch.tensor([state_seed(self.config.run.seed, step, position) for position in positions])
        own = torch.tensor(depths[positions.start : positions.stop], device=device()) if depths else None
        return Loops(n_loops, no_grad_loops, own, seeds, readouts)

    def _forward(self, one: PassInputs) -> Losses:
        ids, labels, documents = self._to_device(one)
        return self.ds_engine(
            ids, labels=labels, document_ids=documents, loops=one.loops, label_counts=one.label_counts
        )

    def _to_device(self, one: PassInputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """Token ids, labels, document ids."""
        batch, to = one.batch, device()
        documents = batch.document_ids.to(to) if one.document_mask or self.config.data.document_mask else None
        return batch.input_ids.to(to), one.labels.to(to), documents

    def _enqueue(self, passes: list[PassInputs]) -> range:
        """Enqueue the micro-batches for this pipeline stage. Returns the loops that it will run."""
        assert self.stage is not None
        loops = passes[0].loops
        loop_ranges = stage_loops(self.config, loops.n_loops, loops.no_grad_loops)
        loop_range = loop_ranges[self.mesh.pipe.rank]
        readouts = 0  # by earlier stages: one per loop with gradient
        if loops.readouts:
            for earlier in loop_ranges[: self.mesh.pipe.rank]:
                readouts += len(loops_with_grad(earlier, loops.no_grad_loops))
        self.stage.counts, self.stage.losses = [], []
        for one in passes:
            self.stage.inputs.append(
                StageInput(*self._to_device(one), one.label_counts, loop_range, readouts, one.loops)
            )
        return loop_range


def _tokens(passes: list[PassInputs]) -> list[tuple[Tensor, Tensor]]:
    """What PipelineEngine reads on its first and last stage; the stage layers have their inputs already."""
    return [(one.batch.input_ids, one.batch.labels) for one in passes]
