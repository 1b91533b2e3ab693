"""Where our mesh, experts and stages meet DeepSpeed's internals. Everything here that is not public API is checked by
`tests/train/test_deepspeed_seam.py`, which says what moved when DeepSpeed's version changes.

- groups: DeepSpeed's expert groups assume the rank order [pipe, data, model]; ours are put into its tables.
- experts: a layer that is an `AutoEPMoELayer` is reduced and partitioned (ZeRO-3 included) as experts.
- partitions: what ZeRO holds of a parameter, as views that checkpoints read and fill.
- stages: a PipelineModule with one layer per stage, and our own way to add up the gradients of tied weights.
"""

import contextlib
import importlib
import io
from collections import deque
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.pipe import PipelineModule
from deepspeed.runtime import compiler
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.schedule import ReduceTiedGrads
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, ProcessTopology
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import groups
from torch import Tensor, nn

from mythos_dist.model.loops import Loops
from mythos_dist.model.moe import MoE
from mythos_dist.model.mythos import Losses, Mythos
from mythos_dist.model.state import State
from mythos_dist.parallel.mesh import Mesh, new_group
from mythos_dist.parallel.packing import pack, unpack
from mythos_dist.parallel.pipeline import StageSpec
from mythos_dist.parallel.process import device
from mythos_dist.parallel.tensor import expert_group_name


def topology_of(mesh: Mesh) -> ProcessTopology:
    """Our rank order in DeepSpeed's terms."""
    return ProcessTopology(axes=["data", "pipe", "model"], dims=[mesh.data.size, mesh.pipe.size, mesh.tensor.size])


def mpu_of(mesh: Mesh) -> PipelineParallelGrid:
    """The groups of a run without a pipeline, as `deepspeed.initialize` asks for them; a pipeline makes its own."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its topology
        return PipelineParallelGrid(topology=topology_of(mesh))


def import_muon() -> None:
    """Before every engine: DeepSpeed imports its Muon when it looks at our optimizer, and Muon asks for kernels.

    Loading the compiler takes each rank 2 s, for what is never called; so Muon gets what DeepSpeed has for a torch
    without a compiler.
    """
    compile_for_muon = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_for_muon


def register_experts(mesh: Mesh) -> None:
    """Tell DeepSpeed which ranks share experts; before every engine."""
    tables = (
        (mesh.expert, groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS),
        (mesh.expert_data, groups._EXPERT_DATA_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS),
    )
    groups.expert_tensor_parallel_world_size = mesh.tensor.size  # else bf16's norm of experts leaves tensor ranks out
    if mesh.expert.size > 1:
        name = expert_group_name(mesh.expert)
        for axis, group_table, rank_table in tables:
            group_table[name] = axis.group or new_group([dist.get_rank()])  # so on all ranks or on none
            rank_table[name] = dist.get_process_group_ranks(group_table[name])


def mend_gradient_norm(optimizer: Any, mesh: Mesh) -> None:
    """Make the global gradient norm right and its collectives complete, whatever a rank holds.

    ZeRO-3 takes it that a group of ranks that share experts spans the tensor ranks; ours are cut over both axes, and
    their norms have to be added up over both. BF16_Optimizer skips the sum over experts on ranks without experts to
    count, and fails on ranks without anything to count: a pipeline stage that holds tied weights only has neither, one
    without loops has no experts at all. A zero in each list keeps the sum and the order.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer._grad_norm_counts_every_rank = lambda params, process_group: False  # type: ignore[method-assign]
    if not isinstance(optimizer, BF16_Optimizer):
        return
    collect = optimizer.get_grads_for_norm

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        if for_clipping:
            return collect(for_clipping=True)
        others, experts = collect()
        nothing = torch.zeros(1, device=device())
        return [*others, nothing], {name: [*experts.get(name, []), nothing] for name in names}

    names = [expert_group_name(mesh.expert)] if mesh.expert.size > 1 else []
    if names and not optimizer.has_moe_layers:
        optimizer.has_moe_layers, optimizer.expert_gradients = True, {}
    optimizer.get_grads_for_norm = get_grads_for_norm


class Partition(NamedTuple):
    """What ZeRO leaves a rank of a parameter: of its flattened numbers those in [first, last), as flat fp32 views."""

    first: int
    last: int
    values: dict[str, Tensor]  # parameter (the master copy), exp_avg, exp_avg_sq


def start_moments(optimizer: Any) -> None:
    """Give Adam its state, all zeros, as its first step would: it can be loaded into then, and saved before."""
    for flat in _flat_masters(optimizer):
        state = optimizer.optimizer.state[flat]
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat.detach()), torch.zeros_like(flat.detach())


def partition_of(optimizer: Any, parameter: nn.Parameter) -> Partition | None:
    """This rank's numbers of a parameter; None if it holds none."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        first = optimizer._get_param_partition_rank(parameter) * size
        size = max(0, min(size, parameter.ds_numel - first))  # pyright: ignore[reportAttributeAccessIssue]
    else:
        mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
        if mapping is None:
            return None
        flat = optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
        first, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
        size = mapping.lp_fragment_address.numel
    if not size:
        return None
    state = optimizer.optimizer.state[flat]
    sources = {"parameter": flat.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
    return Partition(first, first + size, {kind: source.narrow(0, offset, size) for kind, source in sources.items()})


def spread_masters(optimizer: Any) -> None:
    """Make the model's parameters what their master copies are, as the end of a step does. Every rank calls this."""
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.update_lp_params()
        return
    resident = optimizer.persistent_parameters  # small ones, which every rank keeps whole
    if resident:
        resident[0].partition(resident)
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if resident:
        resident[0].all_gather(resident)


def optimizer_state(engine: Any) -> dict[str, Any]:
    """Numbers that belong to the state and are the same on every rank: steps taken and skipped, fp16's loss scale."""
    optimizer = engine.optimizer
    scaler = getattr(optimizer, "loss_scaler", None)
    steps = {int(optimizer.optimizer.state[flat]["step"]) for flat in _flat_masters(optimizer)}
    assert len(steps) == 1, f"Adam counts {steps} steps"
    return {
        "steps": steps.pop(),
        "skipped_steps": engine.skipped_steps,
        "loss_scale": {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)},
    }


def set_optimizer_state(engine: Any, state: dict[str, Any], step: int) -> None:
    """What `optimizer_state` gave, and `step` optimizer updates of the run behind us."""
    optimizer = engine.optimizer
    for flat in _flat_masters(optimizer):
        optimizer.optimizer.state[flat]["step"].fill_(state["steps"])
    scaler = getattr(optimizer, "loss_scaler", None)  # BF16_Optimizer has none, other stages' have one for bf16 too
    for name, value in state["loss_scale"].items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
    engine.skipped_steps = state["skipped_steps"]
    engine.global_steps = step
    engine.global_samples = step * engine.train_batch_size()


_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of a DynamicLossScaler, what moves


def _flat_masters(optimizer: Any) -> list[Tensor]:
    """The fp32 tensors that Adam steps; each is this rank's part of one group's parameters, laid end to end."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return optimizer.fp32_partitioned_groups_flat
    return [group["params"][0] for group in optimizer.optimizer.param_groups]


class _KnownMoE(MoE, AutoEPMoELayer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Our mixture of experts with the attributes that DeepSpeed asks an `AutoEPMoELayer` for."""

    def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the groups are registered."""


def make_experts_known(model: nn.Module, mesh: Mesh) -> None:
    """Let DeepSpeed see the mixture as experts that are spread over ranks; their parameters carry marks already."""
    if mesh.expert.size == 1:
        return
    for layer in [module for module in model.modules() if isinstance(module, MoE)]:
        layer.__class__ = _KnownMoE
        n_experts, n_local = layer.experts.n_experts, layer.experts.w1.shape[0]
        name = expert_group_name(mesh.expert)
        for key, value in {
            "num_experts": n_experts,
            "num_local_experts": n_local,
            "ep_size": mesh.expert.size,
            "ep_rank": mesh.expert.rank,
            "ep_group": mesh.expert.group,
            "ep_group_name": name,
            "expert_group_name": name,
            "folding_group_handles": None,
            "tp_group": None,
        }.items():
            setattr(layer, key, value)
        for parameter in layer.experts.parameters():
            parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
            parameter.ds_zero_partition_group_name = name  # type: ignore[attr-defined]


class Work(NamedTuple):
    """One micro-batch and what a stage is to do with it."""

    input_ids: Tensor  # (B, S)
    labels: Tensor  # (B, S) or (B, T, S)
    document_ids: Tensor | None  # (B, S)
    turns: range  # the loops that this stage runs
    read: int  # how many readouts the stages before it have made
    loops: Loops


class StageLayer(nn.Module):
    """A stage as the one layer that DeepSpeed sees: token ids or the tensor of the stage before -> the next one's.

    Every rank of a replica reads the replica's batches, so tokens, documents and labels never travel: `work` holds
    the micro-batches to come, in order. `counts` and, on the last stage, `losses` collect what the passes found.
    """

    def __init__(self, model: Mythos, groups: list[dict]):
        super().__init__()
        self.model = model
        held = {id(parameter) for parameter in model.parameters()}
        stand_ins = [p for group in groups for p in group["params"] if id(p) not in held]  # of optimizer groups
        self.stand_ins = nn.ParameterList(stand_ins)
        self.work: deque[Work] = deque()
        self.counts: list[Tensor] = []  # (loops of this stage, E)
        self.losses: list[Losses] = []

    def forward(self, received: Tensor) -> Tensor:
        """The flat tensor for the next stage; on the last stage the objective ()."""
        work, model = self.work.popleft(), self.model
        context = model.context(work.input_ids, work.document_ids)
        B, S = work.input_ids.shape
        if model.stage.first:
            state = State(work.input_ids)
        else:
            specs = model.input_shapes(B, S, work.read)
            state = State.unflatten(unpack(received, list(specs.values())), specs)
        state, counts = model.run(state, work.turns, work.loops, context)
        self.counts.append(counts)
        if not model.stage.last:
            return pack(state.flatten(), next(model.parameters()).dtype)
        losses = model.losses(state, work.labels, work.loops, counts)
        self.losses.append(Losses(**{**losses, "objective": losses["objective"].detach()}))
        return losses["objective"]


class Pipeline(PipelineModule):
    """DeepSpeed's pipeline with one layer per stage, bounds that we chose, and weights that several stages hold."""

    def __init__(self, layer: StageLayer, parts: list[StageSpec], mesh: Mesh, sizes_vary: bool):
        """sizes_vary: what stages send each other is not of one size in all steps, so they say how large it is."""
        topology = topology_of(mesh)
        layers = [layer if i == mesh.pipe.rank else nn.Identity() for i in range(mesh.pipe.size)]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its random seeds
            super().__init__(layers, topology=topology, dynamic_shape=sizes_vary)
        self.tied: list[tuple[nn.Parameter, Any, int]] = []  # a weight, who has a copy of it, how many replicas of them
        # The same order on every stage, or their all-reduces would not meet: first the embedding, then the loop.
        holders = {
            "embed": [i for i, part in enumerate(parts) if part.first or part.last],
            "recurrent": [i for i, part in enumerate(parts) if part.has_loops],
        }
        experts = range(mesh.data.rank % mesh.expert.size, mesh.data.size, mesh.expert.size)  # replicas with ours
        for name, stages in holders.items():
            groups = []
            for replicas in (range(mesh.data.size), experts):
                ranks = [topology.get_rank(data=d, pipe=i, model=mesh.tensor.rank) for d in replicas for i in stages]
                groups.append((new_group(ranks if self.global_rank in ranks else [self.global_rank]), len(replicas)))
            if len(stages) > 1 and mesh.pipe.rank in stages:
                for parameter in getattr(layer.model, name).parameters():
                    self.tied.append((parameter, *groups[not getattr(parameter, "allreduce", True)]))
                    # One stage counts in the gradient norm.
                    parameter.ds_pipe_replicated = mesh.pipe.rank != stages[0]

    def _partition_layers(self, method: str = "") -> None:
        self.parts = list(range(len(self._layer_specs) + 1))
        stage = int(self._topo.get_coord(self.global_rank).pipe)
        self._local_start, self._local_stop = stage, stage + 1


def reduce_tied_weights_alike(engine: Any) -> None:
    """Let stages that hold copies of a weight get the same gradient for it, to the last bit.

    DeepSpeed adds up over stages first and over replicas then, each stage with buffers of its own; from three replicas
    on, the order of a sum follows from where a number lies in its buffer, and copies drift apart. Here one all-reduce
    goes over the stages of all replicas. Averaging over replicas then adds up equal numbers, the same everywhere.
    """

    def reduce(engine: Any) -> None:
        for parameter, group, replicas in engine.module.tied:
            grad = parameter._hp_grad if engine.using_bf16_optimizer else parameter.grad
            grad.div_(replicas)
            dist.all_reduce(grad, group=group)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, ReduceTiedGrads: reduce}
