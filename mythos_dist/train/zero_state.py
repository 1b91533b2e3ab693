"""What ZeRO holds of the model on this rank, as views that checkpoints read and fill.

Only ZeRO-3 partitions single parameters. The other stages put the parameters of a group end to end and give each rank
a range of the result. DeepSpeed's attributes that this file reads are checked by `tests/train/test_deepspeed.py`.

Decisions: CHECKPOINT-1.
"""

from typing import Any, NamedTuple

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from mythos_dist.checkpoint.manifest import BUFFER, MOMENTS, LocalShard, LocalShards
from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.model.mythos import Mythos
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.tensor import shard_of

_LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of a DynamicLossScaler


class Partition(NamedTuple):
    """This rank's elements of a parameter: [first, stop) of the flattened parameter, as flat fp32 views."""

    first: int
    stop: int
    values: dict[str, Tensor]  # parameter (the fp32 master copy) and moments


def init_moments(optimizer: Any) -> None:
    """Create the optimizer's state, all zeros, as its first step would, so that it can be loaded and saved before."""
    by_muon = {id(group["params"][0]) for group in optimizer.optimizer.param_groups if "matrix_exchange" in group}
    for flat in _flat_masters(optimizer):
        state = optimizer.optimizer.state[flat]
        if id(flat) not in by_muon:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        for kind in ("momentum_buffer",) if id(flat) in by_muon else ("exp_avg", "exp_avg_sq"):
            state[kind] = torch.zeros_like(flat.detach())


def partition_of(optimizer: Any, parameter: nn.Parameter) -> Partition | None:
    """This rank's partition of a parameter; None if it is empty."""
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
    tensors = {"parameter": flat.detach(), **{kind: state[kind] for kind in MOMENTS if kind in state}}
    return Partition(first, first + size, {kind: value.narrow(0, offset, size) for kind, value in tensors.items()})


def local_shards_of(model: Mythos, optimizer: Any, mesh: Mesh) -> LocalShards:
    """Views of what this rank holds of parameters (the fp32 master copies), moments and buffers, by name."""
    shards = {}
    for name, parameter in model.named_parameters():
        partition = partition_of(optimizer, parameter)
        if partition is None:
            continue
        shard = shard_of(parameter)
        # One rank writes what several hold: weights that stages share, and those that tensor ranks replicate.
        is_sharded = getattr(parameter, "tensor_model_parallel", False)
        is_tied_copy = getattr(parameter, "ds_pipe_replicated", False)
        writes = not is_tied_copy and (mesh.tensor.rank == 0 or is_sharded)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        piece = Piece(shape, shard.start, partition.first, partition.stop)
        shards[name] = LocalShard(piece, shard.full_shape, partition.values, writes)
    for name, buffer in model.named_buffers():  # the router's bias
        shape = tuple(buffer.shape)
        writes = model.stage.starts_loops and mesh.data_context.rank == 0 and mesh.tensor.rank == 0
        shards[name] = LocalShard(Piece.full(shape), shape, {BUFFER: buffer.view(-1)}, writes)
    return shards


def copy_masters_to_parameters(optimizer: Any) -> None:
    """Set the model's parameters to their fp32 master copies, as a step does at its end. Every rank calls this."""
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.update_lp_params()
        return
    # As at the beginning of a step: a pass without gradients leaves parameters unsharded that it expects to need again.
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    persistent = optimizer.persistent_parameters  # small ones, which every rank keeps unsharded
    if persistent:
        persistent[0].all_gather(persistent)


def optimizer_state(engine: Any) -> dict[str, Any]:
    """State that is equal on every rank: steps taken and skipped, fp16's loss scale."""
    optimizer = engine.optimizer
    scaler = getattr(optimizer, "loss_scaler", None)
    steps = {int(count) for count in _step_counts(optimizer)}
    assert len(steps) == 1, f"Adam counts {steps} steps"
    return {
        "steps": steps.pop(),
        "skipped_steps": engine.skipped_steps,
        "loss_scale": {name: getattr(scaler, name) for name in _LOSS_SCALER_STATE if hasattr(scaler, name)},
    }


def set_optimizer_state(engine: Any, state: dict[str, Any], step: int) -> None:
    """Restore what `optimizer_state` returned after step `step` of the run."""
    optimizer = engine.optimizer
    for count in _step_counts(optimizer):
        count.fill_(state["steps"])
    scaler = getattr(optimizer, "loss_scaler", None)  # BF16_Optimizer has none; other stages have one in bf16, too
    for name, value in state["loss_scale"].items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
    engine.skipped_steps = state["skipped_steps"]
    engine.global_steps = step
    engine.global_samples = step * engine.train_batch_size()


def _step_counts(optimizer: Any) -> list[Tensor]:
    """Adam's, of each of its groups; Muon has none."""
    states = [optimizer.optimizer.state[flat] for flat in _flat_masters(optimizer)]
    return [state["step"] for state in states if "step" in state]


def _flat_masters(optimizer: Any) -> list[Tensor]:
    """The fp32 tensors that the optimizer updates: for each parameter group this rank's partitions, end to end."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return optimizer.fp32_partitioned_groups_flat
    return [group["params"][0] for group in optimizer.optimizer.param_groups]
