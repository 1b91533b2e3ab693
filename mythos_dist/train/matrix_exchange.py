"""How the ranks of a parameter group bring one matrix at a time together, and return it: for Muon.

ZeRO-1 and 2 put the parameters of a group end to end and give each replica an equal range; of a matrix that is sharded
over the tensor axis each tensor rank has a shard. So a matrix is spread over a few ranks of the group's replicas x
tensor ranks. It is assigned to the replica that holds most of it, and there to the tensor ranks in turn, so that hardly
anything is sent between replicas. In each round every rank owns one matrix at most:

    round 0     rank 0: matrix 0    rank 1: matrix 1    rank 2: matrix 4    rank 3: matrix 5
    round 1     rank 0: matrix 2    rank 1: matrix 3    rank 2: matrix 6    rank 3: -

One all-to-all sends each rank's elements of these matrices to the owners, which have one full matrix each, and a second
one returns the results. All ranks compute the same rounds from shapes, so they call the same collectives.
The trap: tensor ranks hold copies of a weight that is not sharded over them (the router's). The owner gets one copy
only, and returns the result to all of them.

Decisions: OPTIM-2.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mythos_dist.checkpoint.pieces import Piece, Region, overlaps
from mythos_dist.config.schema import MythosConfig
from mythos_dist.model.matrices import Matrix, matrices_of
from mythos_dist.model.parameter_groups import GroupSpec
from mythos_dist.parallel.mesh import Axis, Mesh, new_group


class View(NamedTuple):
    """Elements of a flat tensor."""

    offset: int
    shape: tuple[int, ...]
    slices: tuple[slice, ...]

    @property
    def numel(self) -> int:
        return prod(part.stop - part.start for part in self.slices)

    def of(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.offset, prod(self.shape)).view(self.shape)[self.slices]


class Share(NamedTuple):
    """The elements of one matrix that a rank holds."""

    rank: int  # the other side: the owner for a rank that holds the elements, the holder for the owner
    views: list[View]  # in the rank's range of the group, or in the owner's matrix
    matrix: Matrix
    sends: bool  # whether the owner needs this copy

    @property
    def numel(self) -> int:
        return sum(view.numel for view in self.views)


class Round(NamedTuple):
    """What one rank does in a round; shares are in the order of ranks."""

    exchanges: bool  # whether any rank of the group needs another's elements
    held: list[Share]  # this rank's elements, by owner
    matrix: Matrix | None  # that this rank owns
    parts: list[Share]  # of that matrix, by holder


class _Assigned(NamedTuple):
    """A matrix of the group and its owner."""

    parameter: int
    matrix: Matrix
    first: int  # [first, stop) of the group: the shard's elements that the matrix is part of
    stop: int
    home: int  # replica
    crosses: bool  # it is spread over several replicas


class GroupLayout:
    """Where the elements of a parameter group are, on every rank of `replicas` x tensor ranks."""

    def __init__(self, group: GroupSpec, config: MythosConfig, mesh: Mesh):
        self.group, self.config, self.mesh = group, config, mesh
        self.axis = mesh.expert_data if group.expert_sharded else mesh.data_context
        self.partition = group.partition(self.axis.size)  # elements of a replica
        self.offsets = list(accumulate((parameter.numel for parameter in group.parameters), initial=0))

    def rounds(self) -> list[Round]:
        """The rounds of this rank; as many on every rank of the group."""
        tensor = self.mesh.tensor.size
        own = self.axis.rank * tensor + self.mesh.tensor.rank
        by_home: dict[int, list[_Assigned]] = {}
        for assigned in self._matrices():
            by_home.setdefault(assigned.home, []).append(assigned)
        queues = [sorted(queue, key=lambda one: not one.crosses) for _, queue in sorted(by_home.items())]
        rounds = []
        for first in range(0, max(map(len, queues), default=0), tensor):
            owners = {
                one.home * tensor + i: one for queue in queues for i, one in enumerate(queue[first : first + tensor])
            }
            held = [self._share(one, own, owner, of_owner=False) for owner, one in owners.items()]
            mine = owners.get(own)
            parts = [self._share(mine, holder, own, of_owner=True) for holder in self._holders(mine)] if mine else []
            matrix = mine.matrix if mine else None
            if matrix:
                gathered = sum(share.numel for share in parts if share.sends)
                assert gathered == matrix.rows * matrix.columns, "each element is held once"
            exchanges = tensor > 1 or any(one.crosses for one in owners.values())
            rounds.append(Round(exchanges, [s for s in held if s.views], matrix, [s for s in parts if s.views]))
        return rounds

    def _matrices(self) -> Iterator[_Assigned]:
        """All matrices of the group that these ranks hold."""
        for i, parameter in enumerate(self.group.parameters):
            stacked = len(parameter.full_shape) == 3
            begin = self._start(i, 0)[0]
            for index, matrix in enumerate(matrices_of(parameter.name, parameter.full_shape, self.config)):
                first, size = self.offsets[i], parameter.numel
                if stacked:
                    size = prod(parameter.shape[1:])
                    first += (index - begin) * size
                    if not begin <= index < begin + parameter.shape[0]:
                        continue  # an expert of other ranks
                replicas = range(first // self.partition, (first + size - 1) // self.partition + 1)
                held = {replicas[0]: size}
                if len(replicas) > 1:  # fused matrices are less spread than their parameter
                    held = {replica: n for replica in replicas if (n := self._elements(i, matrix, replica))}
                turn = list(held)[index % len(held)]  # of those that hold equally much
                home = max(held, key=lambda replica: (held[replica], replica == turn))
                yield _Assigned(i, matrix, first, first + size, home, len(held) > 1)

    def _elements(self, parameter: int, matrix: Matrix, replica: int) -> int:
        """How many of a matrix's elements the tensor ranks of a replica hold."""
        regions = (
            region
            for tensor_rank in range(self.mesh.tensor.size)
            for _, region, _ in self._overlaps(parameter, matrix, replica, tensor_rank)
        )
        return sum(View(0, region.shape, region.slices).numel for region in regions)

    def _overlaps(
        self, parameter: int, matrix: Matrix, replica: int, tensor_rank: int
    ) -> Iterator[tuple[Region, Region, int]]:
        """What a rank holds of a matrix: (region of its range of the parameter, region of the matrix's block, first
        element of that block in the matrix)."""
        spec, offset, at = self.group.parameters[parameter], self.offsets[parameter], 0
        first = max(0, replica * self.partition - offset)
        stop = min(spec.numel, (replica + 1) * self.partition - offset)
        if first >= stop:
            return
        piece = Piece(spec.shape, self._start(parameter, tensor_rank), first, stop)
        for block in matrix.blocks:
            size = prod(block.shape)
            for source, region in overlaps(piece, Piece(block.shape, block.start, 0, size), spec.full_shape):
                yield source, region, at
            at += size

    def _holders(self, one: _Assigned) -> Iterator[int]:
        for replica in range(one.first // self.partition, (one.stop - 1) // self.partition + 1):
            for tensor_rank in range(self.mesh.tensor.size):
                yield replica * self.mesh.tensor.size + tensor_rank

    def _share(self, one: _Assigned, holder: int, owner: int, of_owner: bool) -> Share:
        """What `holder` has of a matrix, as views of the owner's matrix or of the holder's range."""
        replica, tensor_rank = divmod(holder, self.mesh.tensor.size)
        parameter, offset = self.group.parameters[one.parameter], self.offsets[one.parameter]
        in_range = max(0, offset - replica * self.partition)  # where the parameter begins in the rank's range
        views = [
            _view(region, at) if of_owner else _view(source, in_range)
            for source, region, at in self._overlaps(one.parameter, one.matrix, replica, tensor_rank)
        ]
        is_copy = "tensor" not in parameter.shard_axes.values()
        sends = not is_copy or tensor_rank == owner % self.mesh.tensor.size
        return Share(holder if of_owner else owner, views, one.matrix, sends)

    def _start(self, parameter: int, tensor_rank: int) -> tuple[int, ...]:
        """The start of a tensor rank's shard in the full tensor."""
        spec = self.group.parameters[parameter]
        ranks = {"tensor": tensor_rank, "expert": self.mesh.expert.rank}
        return tuple(
            min(ranks[spec.shard_axes[dim]] * size, full) if dim in spec.shard_axes else 0
            for dim, (size, full) in enumerate(zip(spec.shape, spec.full_shape, strict=True))
        )


def _view(region: Region, offset: int) -> View:
    return View(offset + region.offset, region.shape, region.slices)


class MatrixExchange:
    """Applies a function to each matrix of a group, given this rank's flat range of the group."""

    def __init__(self, layout: GroupLayout, axis: Axis, dtype: torch.dtype):
        """axis: the ranks that hold the group (`exchange_axis`). dtype: of messages and matrices."""
        self.partition, self.rounds, self.axis, self.dtype = layout.partition, layout.rounds(), axis, dtype

    def apply(self, flat: Tensor, function: Callable[[Tensor], Tensor], scale: Callable[[Matrix], float]) -> None:
        """Replace each matrix of `flat` (partition,), in place, by `scale` times `function` of it.

        `function` gets and returns (rows, columns) in `dtype`. A collective call of the ranks of the group.
        """
        assert flat.numel() == self.partition, f"DeepSpeed gives a replica {flat.numel()} elements"
        for one in self.rounds:
            result = flat.new_empty(0, dtype=self.dtype)
            matrix = self._gather(flat, one)
            if matrix is not None:
                result = function(matrix).reshape(-1)
            returned = self._exchange(self._pack(result, one.parts), one.parts, one.held, one.exchanges)
            for share, view, part in _split(returned, one.held):
                view.of(flat).copy_(part).mul_(scale(share.matrix))

    def _gather(self, flat: Tensor, one: Round) -> Tensor | None:
        """The matrix that this rank owns in a round."""
        held, parts = ([share for share in shares if share.sends] for shares in (one.held, one.parts))
        received = self._exchange(self._pack(flat, held), held, parts, one.exchanges)
        if one.matrix is None:
            return None
        # A new tensor, as products of unaligned ones may be rounded differently: stages must get the same bits.
        matrix = flat.new_empty(one.matrix.rows * one.matrix.columns, dtype=self.dtype)
        for _, view, part in _split(received, parts):
            view.of(matrix).copy_(part)
        return matrix.view(one.matrix.rows, one.matrix.columns)

    def _pack(self, flat: Tensor, shares: list[Share]) -> Tensor:
        parts = [view.of(flat).reshape(-1).to(self.dtype) for share in shares for view in share.views]
        return torch.cat(parts) if parts else flat.new_empty(0, dtype=self.dtype)

    def _exchange(self, message: Tensor, send: list[Share], receive: list[Share], exchanges: bool) -> Tensor:
        if not exchanges:  # all shares are of this rank
            return message
        sizes = [[0] * self.axis.size, [0] * self.axis.size]
        for counts, shares in zip(sizes, (send, receive), strict=True):
            for share in shares:
                counts[share.rank] = share.numel
        received = message.new_empty(sum(sizes[1]))
        dist.all_to_all_single(received, message, sizes[1], sizes[0], group=self.axis.group)
        return received


def _split(message: Tensor, shares: list[Share]) -> Iterator[tuple[Share, View, Tensor]]:
    """The part of a message for each view of the shares."""
    at = 0
    for share in shares:
        for view in share.views:
            part = message.narrow(0, at, view.numel)
            at += view.numel
            yield share, view, part.view([piece.stop - piece.start for piece in view.slices])


def exchange_axis(mesh: Mesh, replicas: Axis) -> Axis:
    """The ranks that hold a parameter group of one pipeline stage: `replicas` (data_context or expert_data) x tensor
    ranks.

    Creates a process group if both have several ranks, so all ranks call it for the same axes in the same order.
    """
    if replicas.size == 1 or mesh.tensor.size == 1:
        return max(replicas, mesh.tensor, key=lambda axis: axis.size)
    step = mesh.data_context.size // replicas.size  # between the replicas
    ranks = [
        mesh.global_rank(mesh.data_context.rank % step + step * replica, mesh.pipe.rank, tensor_rank)
        for replica in range(replicas.size)
        for tensor_rank in range(mesh.tensor.size)
    ]
    rank = replicas.rank * mesh.tensor.size + mesh.tensor.rank
    return Axis(axis_name(mesh, replicas), len(ranks), rank, new_group(ranks))


def axis_name(mesh: Mesh, replicas: Axis) -> str:
    """The name of `exchange_axis`, as in `parallel/traffic.py`."""
    if mesh.tensor.size == 1:
        return replicas.name
    return "tensor" if replicas.size == 1 else f"tensor_{replicas.name}"
