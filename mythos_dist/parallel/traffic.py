"""Communication volume: bytes that this rank's process groups carry, DeepSpeed's included, by axis and collective.

Sizes are those of nccl-tests (github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md): the tensor for all_reduce,
broadcast and reduce, the output for all_gather, the input for reduce_scatter, the rows that this rank sends (to itself
too) for all_to_all. `send` counts on the sender; barriers and groups of one rank do not count.
The trap: while counting, every tensor operation passes through Python, so do not time such a step.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mythos_dist.config.schema import ParallelConfig
from mythos_dist.parallel.mesh import Mesh, axis_groups

Totals = dict[str, dict[str, int]]  # bytes by axis and kind

# Operations of `torch.ops.c10d`: the kind, and the index of the argument that gives the size.
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


def group_namer(parallel: ParallelConfig, world_size: int, rank: int) -> Callable[[Collection[int]], str]:
    """A function that names the axis of a process group that `rank` is in, given the group's ranks.

    Other names than the mesh's axes: `replica` (pipe x tensor: DeepSpeed's, for which the ranks of the context axis are
    replicas), `tensor_data`, `tensor_data_context` and `tensor_expert_data` (ranks that hold a pipeline stage, or the
    same of its experts), `world`, and `tied`, stages that share a weight, in several replicas; within one replica these
    are `pipe`. Groups with the same ranks get the first name that fits.
    """
    groups, axes = {}, axis_groups(parallel, world_size)
    # The context axis' own group is known to `Traffic`; one of DeepSpeed's with the same ranks is its data axis.
    for name in ("data", "pipe", "data_context", *axes):
        groups[name] = next(set(group) for group in axes[name] if rank in group)
    tensor = parallel.tensor
    tensor_rank, stride = rank % tensor, parallel.context * tensor  # from one pipeline stage to the next
    replica_size = parallel.pipe * stride
    first = rank // replica_size * replica_size + rank % stride - tensor_rank
    groups["replica"] = {first + stage * stride + t for stage in range(parallel.pipe) for t in range(tensor)}
    for axis in ("data", "data_context", "expert_data"):
        groups[f"tensor_{axis}"] = {one - tensor_rank + t for one in groups[axis] for t in range(tensor)}
    same_tensor_rank = set(range(tensor_rank, world_size, tensor))

    def name_of(ranks: Collection[int]) -> str:
        members = set(ranks)
        if members <= groups["pipe"]:
            return "pipe"
        for name, group in groups.items():
            if members == group:
                return name
        if members <= same_tensor_rank and len({member % replica_size // stride for member in members}) > 1:
            return "tied"
        assert members == set(range(world_size)), f"ranks {sorted(ranks)} are not a group of {parallel}"
        return "world"

    return name_of


class Traffic(TorchDispatchMode):
    """`with Traffic(mesh) as traffic:` counts this rank's messages into `traffic.totals`.

    Backward passes count too: dispatch modes also apply in autograd's own thread on CUDA.
    """

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.totals: Totals = {}
        axes = [mesh.tensor, mesh.context, mesh.expert, mesh.expert_data, mesh.data, mesh.data_context, mesh.pipe]
        self._ours = {axis.group.group_name: axis.name for axis in axes if axis.group is not None}
        self._rank = dist.get_rank()
        parallel = ParallelConfig(
            tensor=mesh.tensor.size, context=mesh.context.size, pipe=mesh.pipe.size, expert=mesh.expert.size
        )
        self._name = group_namer(parallel, dist.get_world_size(), self._rank)

    def total_over_ranks(self) -> Totals:
        """The sum over ranks of what they counted since the last call. A collective call, outside the context."""
        per_rank: list[Totals] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(per_rank, self.totals)
        self.totals = {}
        sums: Totals = {}
        for totals in per_rank:
            for axis, kinds in totals.items():
                for kind, size in kinds.items():
                    sums.setdefault(axis, {})[kind] = sums.get(axis, {}).get(kind, 0) + size
        return {axis: dict(sorted(kinds.items())) for axis, kinds in sorted(sums.items())}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        # Functional collectives call c10d's below this mode, where they would not be counted. None is in use.
        assert namespace != "_c10d_functional" or name.startswith("wait"), f"{func.name()} is not counted"
        if namespace == "c10d" and name not in _NOT_COUNTED:
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        kind, sized_by = _SIZED_BY[name]
        group = dist.ProcessGroup.unbox(next(arg for arg in args if hasattr(arg, "_type")))
        ranks = dist.get_process_group_ranks(group)
        if kind == "send":
            axis = self._name([self._rank, ranks[args[2]]])  # DeepSpeed sends between stages over the world group
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
