"""Collectives of DeepSpeed 0.19.8 outside of the layers: gradients, parameters, norms and pipeline scalars."""

from collections import Counter
from collections.abc import Sequence
from math import ceil

from mythos_dist.model.parameter_groups import plan_groups
from mythos_dist.model.parameter_table import LocalParameter
from mythos_dist.ops.plan.layer_communication import FP32, FP64, INT32, LayerMessages, Messages, message
from mythos_dist.ops.plan.memory import uses_bf16_optimizer
from mythos_dist.parallel.mesh import Axis, Mesh
from mythos_dist.parallel.pipeline import StageSpec

_PERSISTENCE_THRESHOLD = 100_000  # elements: DeepSpeed's stage3_param_persistence_threshold


def tied_gradients(
    parameters: Sequence[LocalParameter], stages: Sequence[StageSpec], layers: LayerMessages
) -> Messages:
    """train/pipeline_stage.py: gradients of weights that several stages hold; BF16_Optimizer has them in fp32."""
    item, pipe = FP32 if layers.config.train.dtype == "bf16" else layers.item, layers.mesh.pipe
    holders = {
        "embed.": [stage.holds_embedding(layers.config.model) for stage in stages],
        "recurrent.": [stage.has_loops for stage in stages],
    }
    total: Messages = Counter()
    for prefix, is_holder in holders.items():
        if sum(is_holder) == 1 or not is_holder[pipe.rank]:
            continue
        tied = [parameter for parameter in parameters if parameter.name.startswith(prefix)]
        for expert_sharded, replicas in ((False, layers.mesh.data_context), (True, layers.mesh.expert_data)):
            elements = sum(parameter.numel for parameter in tied if parameter.expert_sharded == expert_sharded)
            group = Axis("tied", sum(is_holder) * replicas.size) if replicas.size > 1 else pipe
            total += message(group, "all_reduce", elements * item)
    return total


def pipeline_messages(mesh: Mesh, shape_messages: int) -> Messages:
    """deepspeed/runtime/pipe/engine.py: the loss over data x context and to all stages; messages of shapes, 256
    int32."""
    last = mesh.pipe.rank == mesh.pipe.size - 1
    total = message(mesh.pipe, "broadcast", 2 * FP32)
    if last:
        total += message(mesh.data_context, "all_reduce", FP32)
    elif shape_messages:
        total += message(mesh.pipe, "send", shape_messages * 256 * INT32)
    return total


def zero_messages(parameters: Sequence[LocalParameter], layers: LayerMessages, micro_batches: int) -> Messages:
    """What DeepSpeed's optimizers send (Rajbhandari et al. 2020): gradients, parameters, and scalars of the norm.

    ZeRO-1 and 2 all-reduce gradients, ZeRO-2 after every micro-batch, and all-gather the updated parameters.
    """
    mesh, item, dtype, zero = layers.mesh, layers.item, layers.config.train.dtype, layers.config.parallel.zero
    bf16_optimizer = uses_bf16_optimizer(layers.config)  # runtime/bf16_optimizer.py; else runtime/zero/stage*.py
    replica = _replica(mesh)
    total: Messages = Counter()
    for group in plan_groups(parameters, mesh):
        axis = mesh.expert_data if group.expert_sharded else mesh.data_context
        sizes = [parameter.numel for parameter in group.parameters]
        if zero == 3:
            total += _zero_3(sizes, axis, item, micro_batches)
            norm_axes = [axis, replica]  # get_grad_norm_direct, as train/deepspeed_patches.py fixes it
            if group.expert_sharded:
                norm_axes.append(mesh.expert)
            for norm_axis in norm_axes:
                total += message(norm_axis, "all_reduce", FP64)
            continue
        padded = group.partition(axis.size) * axis.size
        reduced = padded if bf16_optimizer else sum(sizes)
        total += message(axis, "all_reduce", (micro_batches if zero == 2 else 1) * reduced * item)
        total += message(axis, "all_gather", padded * item)
        if not bf16_optimizer:  # get_grad_norm_direct, of experts over all replicas too; _average_expert_grad_norms
            total += message(mesh.data_context, "all_reduce", FP32) + message(replica, "all_reduce", FP32)
            if group.expert_sharded:
                total += message(axis, "all_reduce", FP32)
    if bf16_optimizer:  # runtime/utils.py: get_global_norm_of_tensors, once more for experts
        total += message(replica, "all_reduce", FP32)
        if mesh.expert.size > 1:
            total += message(replica if mesh.tensor.size > 1 else mesh.pipe, "all_reduce", FP32)
            total += message(mesh.expert, "all_reduce", FP32)
    elif dtype == "fp16" or (dtype == "bf16" and zero == 2):  # has_overflow: one byte
        total += message(mesh.data_context, "all_reduce", 1) + message(replica, "all_reduce", 1)
    return total


def _zero_3(sizes: Sequence[int], axis: Axis, item: int, micro_batches: int) -> Messages:
    """Each parameter is sharded by itself, rounded up.

    Large ones are gathered when a micro-batch first needs them, small ones after the step (parameter_offload.py:
    mark_persistent_parameters). Holds once partitioned_param_coordinator.py has traced two micro-batches with this
    number of loops, and while its max_reuse_distance keeps all until their last use: a micro-batch uses fewer than 1e9
    elements of parameters, each parameter counted as often as it is used.
    """
    total = persistent = 0
    for size in sizes:
        padded = axis.size * ceil(size / axis.size)
        total += padded
        if size <= _PERSISTENCE_THRESHOLD:
            persistent += padded
    gathered = persistent + micro_batches * (total - persistent)
    return message(axis, "reduce_scatter", micro_batches * total * item) + message(axis, "all_gather", gathered * item)


def _replica(mesh: Mesh) -> Axis:
    """DeepSpeed's model-parallel group: pipe x tensor."""
    if mesh.pipe.size == 1 or mesh.tensor.size == 1:
        return max(mesh.pipe, mesh.tensor, key=lambda axis: axis.size)
    return Axis("replica", mesh.pipe.size * mesh.tensor.size)
