"""What DeepSpeed has to know of our mesh and experts, and patches where its assumptions do not hold for them.

- Its expert groups assume the rank order [pipe, data, model]; our groups are put into its tables.
- A layer that is an `AutoEPMoELayer` is reduced and partitioned as experts, in ZeRO-3 as well.
- Its gradient norms assume that every rank holds dense parameters and experts.
- What it holds of an engine outlives the engine.

`tests/train/test_deepspeed.py` checks every internal of DeepSpeed that is used here, in `zero_state.py` and in
`pipeline_stage.py`, and names what moved when DeepSpeed's version changes.

Decisions: PARALLEL-8, PARALLEL-14.
"""

import contextlib
import importlib
import inspect
import io
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime import compiler
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, ProcessTopology
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import groups
from torch import nn

from mythos_dist.model.moe import MoE
from mythos_dist.parallel.mesh import Axis, Mesh, new_group
from mythos_dist.parallel.process import device
from mythos_dist.parallel.tensor import expert_group_name


def topology_of(mesh: Mesh) -> ProcessTopology:
    """Our rank order as DeepSpeed's topology, whose data axis is data x context."""
    sizes = [mesh.data_context.size, mesh.pipe.size, mesh.tensor.size]
    topology = ProcessTopology(axes=["data", "pipe", "model"], dims=sizes)
    # The context axis is inside the pipe axis: ranks of neighboring stages stay as close as without it.
    topology.mapping = {at: mesh.global_rank(at.data, at.pipe, at.model) for at in topology.mapping}
    return topology


def mpu_of(mesh: Mesh) -> PipelineParallelGrid:
    """The groups for `deepspeed.initialize` without a pipeline; a PipelineModule has its own."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its topology
        return PipelineParallelGrid(topology=topology_of(mesh))


def import_muon() -> None:
    """Import DeepSpeed's Muon without a compiler, before an engine does.

    DeepSpeed imports it when it checks the type of our optimizer, and Muon compiles functions, which loads the compiler
    for 2 s on each rank. They are never called, so here they are what DeepSpeed gives a torch without a compiler.
    """
    compile_function = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_function


def release(engine: Any) -> None:
    """Let the memory of an engine be freed when nothing refers to it any more.

    Its hooks are references that the garbage collector does not see. ZeRO-3 keeps the model in a list from which
    nothing takes it, and the modules in a functools.lru_cache.
    """
    engine.destroy()
    parameter_offload.FWD_MODULE_STACK[:] = [m for m in parameter_offload.FWD_MODULE_STACK if m is not engine.module]
    method = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(method).nonlocals["func"].cache_clear()  # inside of `instrument_w_nvtx`


def register_expert_groups(mesh: Mesh) -> None:
    """Put our expert groups into DeepSpeed's tables; before every engine."""
    groups.expert_tensor_parallel_world_size = mesh.tensor.size  # else bf16's norm of experts omits tensor ranks
    if mesh.expert.size == 1:
        return
    name = expert_group_name(mesh.expert)
    _register_group(name, mesh.expert, groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS)
    _register_group(
        name, mesh.expert_data, groups._EXPERT_DATA_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS
    )


def _register_group(name: str, axis: Axis, group_table: dict, rank_table: dict) -> None:
    # An axis of size 1 has no group. It is so on all ranks or on none, as new_group requires.
    group_table[name] = axis.group or new_group([dist.get_rank()])
    rank_table[name] = dist.get_process_group_ranks(group_table[name])


class _MoEForDeepSpeed(MoE, AutoEPMoELayer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Our mixture of experts with the attributes that DeepSpeed reads from an `AutoEPMoELayer`."""

    def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the groups are registered."""


def mark_experts(model: nn.Module, mesh: Mesh) -> None:
    """Make DeepSpeed treat the experts as expert-parallel; their parameters have `allreduce` = False already."""
    if mesh.expert.size == 1:
        return
    name = expert_group_name(mesh.expert)
    for layer in [module for module in model.modules() if isinstance(module, MoE)]:
        layer.__class__ = _MoEForDeepSpeed
        attributes = {
            "num_experts": layer.experts.n_experts,
            "num_local_experts": layer.experts.w1.shape[0],
            "ep_size": mesh.expert.size,
            "ep_rank": mesh.expert.rank,
            "ep_group": mesh.expert.group,
            "ep_group_name": name,
            "expert_group_name": name,
            "folding_group_handles": None,
            "tp_group": None,
        }
        for key, value in attributes.items():
            setattr(layer, key, value)
        for parameter in layer.experts.parameters():
            parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
            parameter.ds_zero_partition_group_name = name  # type: ignore[attr-defined]


def fix_gradient_norm(optimizer: Any, mesh: Mesh) -> None:
    """Make the global gradient norm correct, and its collectives the same on every rank.

    ZeRO-3 assumes that the group of ranks that share experts spans the tensor ranks; our experts are sharded over both
    axes, and their norms have to be summed over both.

    BF16_Optimizer skips the sum over experts on ranks without experts, and fails on ranks without any gradients to
    count. Both exist: a pipeline stage without loops, and one that holds tied weights only. A zero in each list keeps
    the sum and the order of the collectives.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer._grad_norm_counts_every_rank = lambda params, process_group: False  # type: ignore[method-assign]
    if not isinstance(optimizer, BF16_Optimizer):
        return
    expert_groups = [expert_group_name(mesh.expert)] if mesh.expert.size > 1 else []
    original = optimizer.get_grads_for_norm

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        if for_clipping:
            return original(for_clipping=True)
        dense, experts = original()
        zero = torch.zeros(1, device=device())
        return [*dense, zero], {name: [*experts.get(name, []), zero] for name in expert_groups}

    if expert_groups and not optimizer.has_moe_layers:
        optimizer.has_moe_layers, optimizer.expert_gradients = True, {}
    optimizer.get_grads_for_norm = get_grads_for_norm
