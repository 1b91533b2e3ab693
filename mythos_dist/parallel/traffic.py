"""Counting what goes over the process groups, ours and DeepSpeed's own: bytes per axis and kind of collective.

A message's size is that of NCCL's tests (github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md): of all_reduce,
broadcast and reduce the tensor, of all_gather the gathered output, of reduce_scatter the input, of all_to_all the rows
that this rank sends, its own included. `send` is counted where it starts; barriers and groups of one rank not at all.
The trap: while counting, every operation of every tensor passes through Python. Not for a step that is timed.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mythos_dist.config.schema import ParallelConfig
from mythos_dist.parallel.mesh import Mesh, axis_groups

Totals = dict[str, dict[str, int]]  # bytes by axis and kind

# Operations of `torch.ops.c10d`: the kind, and which argument its size is that of.
_SIZED_BY: Mapping[str, tuple[str, int]] = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 0),
    "allgather_coalesced_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
    "send": ("send", 0),
}
_NOT_COUNTED = {"recv_", "recv_any_source_", "barrier", "monitored_barrier_", "check_for_nan"}


def axis_namer(parallel: ParallelConfig, world_size: int, rank: int) -> Callable[[Collection[int]], str]:
    """What the axis of a group of ranks that holds `rank` is called, where groups are told apart by their ranks only.

    `pipe` are also the stages that share a weight, `tied` are such stages of several replicas, `replica` is pipe x
    tensor. Of equal lines the first name counts.
    """
    lines = {
        name: next(set(line) for line in of_axis if rank in line)
        for name, of_axis in axis_groups(parallel, world_size).items()
    }
    per_replica = parallel.pipe * parallel.tensor
    lines["replica"] = set(range(rank // per_replica * per_replica, (rank // per_replica + 1) * per_replica))
    same_slices = set(range(rank % parallel.tensor, world_size, parallel.tensor))
    lines["world"] = set(range(world_size))

    def name(ranks: Collection[int]) -> str:
        if set(ranks) <= lines["pipe"]:
            return "pipe"
        found = [name for name, line in lines.items() if name != "world" and line == set(ranks)]
        if not found and len({other % per_replica for other in ranks}) > 1 and set(ranks) <= same_slices:
            return "tied"
        found = found or ["world"] * (lines["world"] == set(ranks))
        assert found, f"ranks {sorted(ranks)} are no line of {parallel} on {world_size} ranks"
        return found[0]

    return name


class Traffic(TorchDispatchMode):
    """Within `with Traffic(mesh) as traffic:` counts all messages of this rank into `traffic.totals`.

    Dispatch modes follow autograd into its own thread on CUDA, so backward passes are counted as well.
    """

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.totals: Totals = {}
        axes = [mesh.tensor, mesh.expert, mesh.expert_data, mesh.data, mesh.pipe]
        self._ours = {axis.group.group_name: axis.name for axis in axes if axis.group is not None}
        self._rank = dist.get_rank()
        parallel = ParallelConfig(tensor=mesh.tensor.size, pipe=mesh.pipe.size, expert=mesh.expert.size)
        self._name = axis_namer(parallel, dist.get_world_size(), self._rank)

    def total_over_ranks(self) -> Totals:
        """What all ranks have counted since the last call, added up; every rank calls this, outside the context."""
        everyone: list[Totals] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, self.totals)
        self.totals = {}
        sums: Totals = {}
        for totals in everyone:
            for axis, kinds in totals.items():
                for kind, size in kinds.items():
                    sums.setdefault(axis, {})[kind] = sums.get(axis, {}).get(kind, 0) + size
        return {axis: dict(sorted(kinds.items())) for axis, kinds in sorted(sums.items())}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        # Functional collectives are written in terms of these, below this mode: nothing of ours uses them.
        assert namespace != "_c10d_functional" or name.startswith("wait"), f"{func.name()} is not counted"
        if namespace == "c10d" and name not in _NOT_COUNTED:
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        kind, sized_by = _SIZED_BY[name]
        group = dist.ProcessGroup.unbox(next(arg for arg in args if hasattr(arg, "_type")))
        ranks = dist.get_process_group_ranks(group)
        if kind == "send":
            axis = self._name([self._rank, ranks[args[2]]])  # DeepSpeed's stages send over the group of all ranks
        elif len(ranks) == 1:
            return
        else:
            axis = self._ours.get(group.group_name) or self._name(ranks)
        size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(args[sized_by]))
        if size:
            kinds = self.totals.setdefault(axis, {})
            kinds[kind] = kinds.get(kind, 0) + size


def _tensors(nested: Tensor | list) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    else:
        for inner in nested:
            yield from _tensors(inner)
