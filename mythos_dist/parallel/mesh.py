"""The mesh: a rank's replica, pipeline stage, tensor shard and experts, and the process groups of each axis.

Ranks are ordered [data, pipe, tensor], data outermost, so that one replica's ranks are consecutive. The expert axis
lies inside the data axis: `expert` consecutive replicas hold one copy of all routed experts, and an `expert_data`
group is the ranks that hold the same experts. An axis of size 1 has no group, and collectives over it do nothing.

Decisions: PARALLEL-1, PARALLEL-9.
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
    tensor: Axis = Axis("tensor")
    expert: Axis = Axis("expert")
    expert_data: Axis = Axis("expert_data")
    sequence: bool = False


SINGLE = Mesh()  # one process


def axis_groups(parallel: ParallelConfig, world_size: int) -> dict[str, list[list[int]]]:
    """The groups of global ranks of each axis; every rank is in one group per axis."""
    pipe, tensor, expert = parallel.pipe, parallel.tensor, parallel.expert
    data = world_size // (pipe * tensor)

    def rank(d: int, p: int, t: int) -> int:
        return (d * pipe + p) * tensor + t

    columns = list(product(range(pipe), range(tensor)))
    first_replicas = range(0, data, expert)  # of each copy of the experts
    return {
        "data": [[rank(d, p, t) for d in range(data)] for p, t in columns],
        "pipe": [[rank(d, p, t) for p in range(pipe)] for d in range(data) for t in range(tensor)],
        "tensor": [[rank(d, p, t) for t in range(tensor)] for d in range(data) for p in range(pipe)],
        "expert": [[rank(r + i, p, t) for i in range(expert)] for p, t in columns for r in first_replicas],
        "expert_data": [[rank(r + i, p, t) for r in first_replicas] for p, t in columns for i in range(expert)],
    }


def mesh_of(
    parallel: ParallelConfig,
    world_size: int,
    rank: int,
    new_group: Callable[[list[int]], ProcessGroup | None] = lambda ranks: None,
) -> Mesh:
    """The mesh of one rank. `new_group` creates its process groups; by default there are none, only coordinates."""
    axes = {}
    for name, groups in axis_groups(parallel, world_size).items():
        ranks = next(group for group in groups if rank in group)
        axes[name] = Axis(name, len(ranks), ranks.index(rank), new_group(ranks) if len(ranks) > 1 else None)
    return Mesh(**axes, sequence=parallel.sequence and parallel.tensor > 1)


def mesh_coordinates(parallel: ParallelConfig, world_size: int, rank: int) -> Mesh:
    """`mesh_of` without process groups, by arithmetic: listing all ranks of a large world takes milliseconds."""
    data = world_size // (parallel.pipe * parallel.tensor)
    replica, rank_in_replica = divmod(rank, parallel.pipe * parallel.tensor)
    stage, tensor_rank = divmod(rank_in_replica, parallel.tensor)
    expert_copy, expert_rank = divmod(replica, parallel.expert)
    return Mesh(
        data=Axis("data", data, replica),
        pipe=Axis("pipe", parallel.pipe, stage),
        tensor=Axis("tensor", parallel.tensor, tensor_rank),
        expert=Axis("expert", parallel.expert, expert_rank),
        expert_data=Axis("expert_data", data // parallel.expert, expert_copy),
        sequence=parallel.sequence and parallel.tensor > 1,
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
