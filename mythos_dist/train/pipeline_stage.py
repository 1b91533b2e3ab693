"""A pipeline stage for DeepSpeed: a PipelineModule with one layer per stage, and the gradients of tied weights.

DeepSpeed divides a list of layers; our stages are planned by `parallel/pipeline.py`, and each is one layer that runs
its loops of a micro-batch.

Decisions: PARALLEL-2, PARALLEL-3, PARALLEL-11.
"""

import contextlib
import io
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.schedule import ReduceTiedGrads
from torch import Tensor, nn

from mythos_dist.model.activations import Activations
from mythos_dist.model.loops import Loops
from mythos_dist.model.mythos import Losses, Mythos
from mythos_dist.parallel.mesh import Mesh, new_group
from mythos_dist.parallel.packing import pack, unpack
from mythos_dist.parallel.pipeline import StageSpec
from mythos_dist.train.deepspeed_patches import topology_of


class StageInput(NamedTuple):
    """One micro-batch, and the loops that this stage runs on it."""

    input_ids: Tensor  # (B, S)
    labels: Tensor  # (B, S) or (B, T, S)
    document_ids: Tensor | None  # (B, S)
    label_counts: Tensor | None  # (R,), see `Mythos.losses`
    loop_range: range  # of this stage
    readouts: int  # the number of readouts by earlier stages
    loops: Loops


class StageLayer(nn.Module):
    """A stage as the one layer that DeepSpeed runs: token ids or the previous stage's tensor -> the next one's.

    Every rank of a replica reads the replica's batches, so tokens, documents and labels are not sent between stages:
    `inputs` holds the next micro-batches, in order. `counts` and, on the last stage, `losses` collect the results.
    """

    def __init__(self, model: Mythos, groups: list[dict]):
        super().__init__()
        self.model = model
        # Optimizer groups without a parameter of this stage have a placeholder, which DeepSpeed has to see.
        own = {id(parameter) for parameter in model.parameters()}
        placeholders = [p for group in groups for p in group["params"] if id(p) not in own]
        self.placeholders = nn.ParameterList(placeholders)
        self.inputs: deque[StageInput] = deque()
        self.counts: list[Tensor] = []  # (loops of this stage, loop_layers * E)
        self.losses: list[Losses] = []

    def forward(self, received: Tensor) -> Tensor:
        """The flat tensor for the next stage; on the last stage the objective ()."""
        inputs, model = self.inputs.popleft(), self.model
        context = model.context(inputs.input_ids, inputs.document_ids)
        shard, (B, S) = context.shard, inputs.input_ids.shape
        if model.stage.is_first:
            activations = Activations(inputs.input_ids if shard is None else shard.local(inputs.input_ids))
        else:
            specs = model.input_shapes(B, S, inputs.readouts)
            activations = Activations.unflatten(unpack(received, list(specs.values())), specs)
        activations, counts = model.run(activations, inputs.loop_range, inputs.loops, context)
        self.counts.append(counts)
        if not model.stage.is_last:
            return pack(activations.flatten(), next(model.parameters()).dtype)
        losses = model.losses(activations, inputs.labels, inputs.loops, counts, inputs.label_counts, shard)
        self.losses.append(Losses(**{**losses, "objective": losses["objective"].detach()}))
        return losses["objective"]


class TiedWeight(NamedTuple):
    """A weight of which several stages hold a copy."""

    parameter: nn.Parameter
    group: dist.ProcessGroup  # all copies, in the replicas over which its gradient is averaged
    num_replicas: int


class Pipeline(PipelineModule):
    """DeepSpeed's pipeline with one layer per stage, and weights that several stages hold."""

    def __init__(self, layer: StageLayer, stages: Sequence[StageSpec], mesh: Mesh, dynamic_shape: bool):
        """dynamic_shape: the size of what stages send varies from step to step, so it is sent with it."""
        layers = [layer if i == mesh.pipe.rank else nn.Identity() for i in range(mesh.pipe.size)]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its random seeds
            super().__init__(layers, topology=topology_of(mesh), dynamic_shape=dynamic_shape)
        self.tied: list[TiedWeight] = []
        # All stages create the groups and reduce the weights in this order, or their collectives would not match.
        with_embedding = [i for i, stage in enumerate(stages) if stage.holds_embedding(layer.model.config)]
        with_loops = [i for i, stage in enumerate(stages) if stage.has_loops]
        self._tie_weights(layer.model, "embed", with_embedding, mesh)
        self._tie_weights(layer.model, "recurrent", with_loops, mesh)

    def _tie_weights(self, model: Mythos, module: str, stages: list[int], mesh: Mesh) -> None:
        """Tie the weights of a module of the model, which these stages hold. Every rank calls this."""
        replicas = range(mesh.data_context.size)  # DeepSpeed's
        replicas_with_same_experts = replicas[mesh.expert.rank :: mesh.expert.size]
        dense_group = self._stage_group(replicas, stages, mesh)
        expert_group = self._stage_group(replicas_with_same_experts, stages, mesh)
        if len(stages) == 1 or mesh.pipe.rank not in stages:
            return
        for parameter in getattr(model, module).parameters():
            if getattr(parameter, "allreduce", True):
                self.tied.append(TiedWeight(parameter, dense_group, len(replicas)))
            else:
                self.tied.append(TiedWeight(parameter, expert_group, len(replicas_with_same_experts)))
            parameter.ds_pipe_replicated = mesh.pipe.rank != stages[0]  # the gradient norm counts one copy

    def _stage_group(self, replicas: range, stages: list[int], mesh: Mesh) -> dist.ProcessGroup:
        """The ranks of these stages and replicas with this tensor rank; a rank outside of them is alone."""
        ranks = []
        for replica in replicas:
            for stage in stages:
                ranks.append(mesh.global_rank(replica, stage, mesh.tensor.rank))
        return new_group(ranks if self.global_rank in ranks else [self.global_rank])

    def _partition_layers(self, method: str = "") -> None:
        self.parts = list(range(len(self._layer_specs) + 1))
        stage = int(self._topo.get_coord(self.global_rank).pipe)
        self._local_start, self._local_stop = stage, stage + 1


def reduce_tied_weights_identically(engine: Any) -> None:
    """Make all stages that hold a copy of a weight receive bitwise equal gradients for it.

    DeepSpeed sums over stages first and then over replicas, each stage with buffers of its own. From three replicas on,
    the order of a sum depends on an element's position in its buffer, and the copies drift apart. Here one all-reduce
    sums over the stages of all replicas; averaging over replicas then sums equal values, which are the same everywhere.
    """

    def reduce(engine: Any) -> None:
        for tied in engine.module.tied:
            grad = tied.parameter._hp_grad if engine.using_bf16_optimizer else tied.parameter.grad
            grad.div_(tied.num_replicas)
            dist.all_reduce(grad, group=tied.group)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, ReduceTiedGrads: reduce}
