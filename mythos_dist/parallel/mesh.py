"""The mesh: which replica, pipe stage, tensor slice and experts a rank holds, and the process groups of each axis.

Ranks are ordered [data, pipe, tensor], data outermost, so that one replica's ranks are consecutive. The expert axis
lies inside the data axis: `expert` neighbouring replicas hold one copy of all routed experts, `expert_data` joins the
ranks that hold the same ones. An axis of size 1 has no group, and nothing is sent over it: that is the dense model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from mythos_dist.config.schema import ParallelConfig

if TYPE_CHECKING:  # planning asks who holds what a thousand times, and needs no torch
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """One axis as one rank sees it."""

    name: str
    size: int = 1
    rank: int = 0  # this rank's place on the axis
    group: ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """All axes of one rank. `sequence`: norms and residuals work on 1 / tensor of each sequence."""

    data: Axis = Axis("data")
    pipe: Axis = Axis("pipe")
    tensor: Axis = Axis("tensor")
    expert: Axis = Axis("expert")
    expert_data: Axis = Axis("expert_data")
    sequence: bool = False


SINGLE = Mesh()  # one process


def axis_groups(parallel: ParallelConfig, world_size: int) -> dict[str, list[list[int]]]:
    """For each axis the lines of global ranks that it joins; every rank is on one line of every axis."""
    pipe, tensor, expert = parallel.pipe, parallel.tensor, parallel.expert
    data = world_size // (pipe * tensor)

    def rank(d: int, p: int, t: int) -> int:
        return (d * pipe + p) * tensor + t

    columns = list(product(range(pipe), range(tensor)))
    blocks = range(0, data, expert)
    return {
        "data": [[rank(d, p, t) for d in range(data)] for p, t in columns],
        "pipe": [[rank(d, p, t) for p in range(pipe)] for d in range(data) for t in range(tensor)],
        "tensor": [[rank(d, p, t) for t in range(tensor)] for d in range(data) for p in range(pipe)],
        "expert": [[rank(b + i, p, t) for i in range(expert)] for p, t in columns for b in blocks],
        "expert_data": [[rank(b + i, p, t) for b in blocks] for p, t in columns for i in range(expert)],
    }


def mesh_of(
    parallel: ParallelConfig,
    world_size: int,
    rank: int,
    new_group: Callable[[list[int]], ProcessGroup | None] = lambda ranks: None,
) -> Mesh:
    """The mesh as `rank` sees it; without `new_group` it only says who holds what, and nothing can be sent."""
    axes = {}
    for name, lines in axis_groups(parallel, world_size).items():
        ranks = next(line for line in lines if rank in line)
        axes[name] = Axis(name, len(ranks), ranks.index(rank), new_group(ranks) if len(ranks) > 1 else None)
    return Mesh(**axes, sequence=parallel.sequence and parallel.tensor > 1)


def mesh_coordinates(parallel: ParallelConfig, world_size: int, rank: int) -> Mesh:
    """`mesh_of` without groups, by arithmetic: lists of all ranks of a large world take milliseconds."""
    data = world_size // (parallel.pipe * parallel.tensor)
    replica, column = divmod(rank, parallel.pipe * parallel.tensor)
    stage, slice_ = divmod(column, parallel.tensor)
    block, share = divmod(replica, parallel.expert)
    return Mesh(
        data=Axis("data", data, replica),
        pipe=Axis("pipe", parallel.pipe, stage),
        tensor=Axis("tensor", parallel.tensor, slice_),
        expert=Axis("expert", parallel.expert, share),
        expert_data=Axis("expert_data", data // parallel.expert, block),
        sequence=parallel.sequence and parallel.tensor > 1,
    )


def new_group(ranks: list[int]) -> ProcessGroup:
    """A process group that only its members make: every rank making every group would take minutes on 4096 ranks.

    The trap: torch names such a group by its ranks and by how many groups the process has, and members that count
    differently wait for each other for ever. So whenever some ranks make a group, the others make one of themselves.
    """
    import torch.distributed as dist
    from torch.distributed import ProcessGroup

    group = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, ProcessGroup), "only members call this"
    return group


def build_mesh(parallel: ParallelConfig) -> Mesh:
    """This rank's mesh with its process groups; every rank calls this once the process group is there."""
    import torch.distributed as dist

    return mesh_of(parallel, dist.get_world_size(), dist.get_rank(), new_group)
