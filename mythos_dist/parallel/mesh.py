"""The mesh: a rank's replica, pipeline stage, tensor shard and experts, and the process groups of each axis.

Ranks are ordered [data, pipe, context, tensor], data outermost, so that one replica's ranks are consecutive. The ranks
of a context group have the same weights and the same sequences, each some of their tokens. To ZeRO and to the experts
they are like replicas, so both work on data x context, the axis `data_context`: gradients are averaged over it, and
`expert` consecutive ranks of it hold one copy of all routed experts. An `expert_data` group is the ranks that hold the
same experts. An axis of size 1 has no group, and collectives over it do nothing.

Decisions: PARALLEL-1, PARALLEL-9, PARALLEL-18.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from mythos_dist.config.schema import ParallelConfig

if TYPE_CHECKING:  # experiments/trials.py imports this module, and --help needs no torch
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """One axis as one rank sees it."""

    name: str
    size: int = 1
    rank: int = 0  # this rank's coordinate on the axis
    group: ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """All axes of one rank. `sequence`: sequence parallelism, norms and residuals see 1 / tensor of each sequence."""

    data: Axis = Axis("data")
    pipe: Axis = Axis("pipe")
    context: Axis = Axis("context")
    tensor: Axis = Axis("tensor")
    expert: Axis = Axis("expert")
    expert_data: Axis = Axis("expert_data")
    data_context: Axis = Axis("data")  # the data axis itself if context is 1
    sequence: bool = False

    def global_rank(self, data_context: int, pipe: int, tensor: int) -> int:
        """The global rank of these coordinates."""
        replica, part = divmod(data_context, self.context.size)
        return ((replica * self.pipe.size + pipe) * self.context.size + part) * self.tensor.size + tensor


SINGLE = Mesh()  # one process


def axis_groups(parallel: ParallelConfig, world_size: int) -> dict[str, list[list[int]]]:
    """The groups of global ranks of each axis; every rank is in one group per axis."""
    pipe, context, tensor, expert = parallel.pipe, parallel.context, parallel.tensor, parallel.expert
    data = world_size // (pipe * context * tensor)

    def rank(d: int, p: int, c: int, t: int) -> int:
        return ((d * pipe + p) * context + c) * tensor + t

    replicas, stages, parts, shards = range(data), range(pipe), range(context), range(tensor)
    data_context = [[rank(d, p, c, t) for d in replicas for c in parts] for p in stages for t in shards]
    return {
        "data": [[rank(d, p, c, t) for d in replicas] for p, c, t in product(stages, parts, shards)],
        "pipe": [[rank(d, p, c, t) for p in stages] for d, c, t in product(replicas, parts, shards)],
        "context": [[rank(d, p, c, t) for c in parts] for d, p, t in product(replicas, stages, shards)],
        "tensor": [[rank(d, p, c, t) for t in shards] for d, p, c in product(replicas, stages, parts)],
        "expert": [group[i : i + expert] for group in data_context for i in range(0, len(group), expert)],
        "expert_data": [group[i::expert] for group in data_context for i in range(expert)],
        "data_context": data_context,
    }


def mesh_of(
    parallel: ParallelConfig, world_size: int, rank: int, new_group: Callable[[list[int]], ProcessGroup | None]
) -> Mesh:
    """The mesh of one rank, with the process groups that `new_group` creates."""
    axes = {}
    for name, groups in axis_groups(parallel, world_size).items():
        if name == "data_context" and parallel.context == 1:
            axes[name] = axes["data"]
            continue
        ranks = next(group for group in groups if rank in group)
        axes[name] = Axis(name, len(ranks), ranks.index(rank), new_group(ranks) if len(ranks) > 1 else None)
    return Mesh(**axes, sequence=parallel.sequence and parallel.tensor > 1)


def mesh_coordinates(parallel: ParallelConfig, world_size: int, rank: int) -> Mesh:
    """`mesh_of` without process groups, by arithmetic: listing all ranks of a large world takes milliseconds."""
    context, tensor = parallel.context, parallel.tensor
    replicas = world_size // parallel.ranks_per_replica
    replica, rank_in_replica = divmod(rank, parallel.ranks_per_replica)
    stage, rank_in_stage = divmod(rank_in_replica, context * tensor)
    part, tensor_rank = divmod(rank_in_stage, tensor)
    data = Axis("data", replicas, replica)
    data_context = Axis("data_context", replicas * context, replica * context + part) if context > 1 else data
    expert_copy, expert_rank = divmod(data_context.rank, parallel.expert)
    return Mesh(
        data=data,
        pipe=Axis("pipe", parallel.pipe, stage),
        context=Axis("context", context, part),
        tensor=Axis("tensor", tensor, tensor_rank),
        expert=Axis("expert", parallel.expert, expert_rank),
        expert_data=Axis("expert_data", data_context.size // parallel.expert, expert_copy),
        data_context=data_context,
        sequence=parallel.sequence and tensor > 1,
    )


def new_group(ranks: list[int]) -> ProcessGroup:
    """A process group that only its members create: creating every group on every rank takes minutes on 4096 ranks.

    The trap: torch names such a group by its ranks and the number of groups that the process has, and members with
    different counts deadlock. So whenever some ranks create a group, every other rank creates one as well, of
    itself if need be.
    """
    import torch.distributed as dist
    from torch.distributed import ProcessGroup

    group = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, ProcessGroup), "only the group's members call this"
    return group


def build_mesh(parallel: ParallelConfig) -> Mesh:
    """This rank's mesh with its process groups. A collective call, after `init_process_group`."""
    import torch.distributed as dist

    return mesh_of(parallel, dist.get_world_size(), dist.get_rank(), new_group)
