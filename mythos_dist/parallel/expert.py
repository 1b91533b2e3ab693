"""Dropless token dispatch: tokens travel to the ranks that hold their experts and back, with uneven all-to-all.

A token that is routed to several experts of one rank is sent there once, with its weights. The ranks exchange row
counts first, and the counts reach the host in one copy. Under tensor parallelism each tensor rank sends 1 / tensor of
a row's channels over the expert axis; an all-gather over the (faster) tensor axis completes the rows.

Decisions: PARALLEL-4.
"""

# N tokens, D model, E experts, k experts per token, s = min(k, experts on one rank), R rows.

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mythos_dist.parallel.collectives import all_gather, all_to_all, reduce_scatter
from mythos_dist.parallel.mesh import Axis, Mesh
from mythos_dist.parallel.ranges import in_range
from mythos_dist.parallel.rows import RowIndex, index_slots, nonzero_no_sync, sum_rows, take_rows


class Route(NamedTuple):
    """What `combine` needs to send results back."""

    sent: RowIndex  # this rank's tokens among the rows it sent
    send: list[int]  # rows sent to each rank of the expert axis
    receive: list[int]  # rows received from each


class Dispatched(NamedTuple):
    """The rows that this rank's experts work on, and their route."""

    rows: Tensor  # (R, D), all channels
    weights: Tensor  # (R, s) router weights, 0 in an unused slot
    experts: Tensor  # (R, s) local expert; the number of local experts in an unused slot
    pairs: int  # how many slots are used
    route: Route


def exchange_counts(owner: Tensor, goes: Tensor, axis: Axis) -> tuple[list[int], list[int], int]:
    """Rows to send to each rank, rows to receive from each, and all (row, expert) pairs to receive."""
    flat = owner.flatten()
    pairs = torch.zeros(axis.size, dtype=torch.int64, device=owner.device).scatter_add_(0, flat, torch.ones_like(flat))
    to_send = torch.stack([goes.sum(1), pairs], dim=1)  # (ranks, 2)
    to_receive = torch.empty_like(to_send)
    dist.all_to_all_single(to_receive, to_send, group=axis.group)
    (send, _), (receive, pairs_in) = torch.stack([to_send.T, to_receive.T]).tolist()  # the only wait for the GPU
    return send, receive, sum(pairs_in)


def _sort_by_destination(goes: Tensor, n_rows: int) -> tuple[RowIndex, Tensor]:
    """The rows to send, ordered by destination rank and then by token; and each row's destination (n_rows,)."""
    N = goes.shape[1]
    flat = nonzero_no_sync(goes, n_rows)
    row = (goes.flatten().cumsum(0) - 1).view_as(goes)  # of each (rank, token)
    return index_slots(flat % N, row.T, goes.T, n_rows), flat // N


@in_range("exchange")
def dispatch(x: Tensor, weights: Tensor, index: Tensor, n_experts: int, mesh: Mesh) -> Dispatched:
    """x (N, D), equal on all tensor ranks, weights and index (N, k) -> the rows for this rank's experts."""
    axis = mesh.expert
    local = n_experts // axis.size
    slots = min(index.shape[1], local)
    owner = index // local
    goes = torch.zeros(axis.size, x.shape[0], dtype=torch.bool, device=x.device).scatter_(0, owner.T, True)
    send, receive, pairs = exchange_counts(owner, goes, axis)
    sent, destination = _sort_by_destination(goes, sum(send))

    at_destination = owner[sent.token] == destination.unsqueeze(1)  # (rows, k): the destination holds this expert
    experts_out = torch.where(at_destination, index[sent.token] % local, local)
    experts_out, order = experts_out.sort(dim=1, stable=True)  # unused slots go last; at most `slots` are used
    weights_out = take_rows(weights, sent).masked_fill(~at_destination, 0.0).gather(1, order)

    # One message: this rank's channels, the weights, and the expert indices as bits of the message's dtype.
    integer = torch.int32 if x.element_size() == 4 else torch.int16
    width = x.shape[1] // mesh.tensor.size
    channels = take_rows(x.narrow(1, mesh.tensor.rank * width, width), sent)
    bits = experts_out[:, :slots].to(integer).view(x.dtype)
    message = torch.cat([channels, weights_out[:, :slots].to(x.dtype), bits], dim=1)
    channels, weights, bits = all_to_all(message, axis, send, receive).split([width, slots, slots], dim=1)
    return Dispatched(
        rows=all_gather(channels, mesh.tensor, -1),
        weights=weights,
        experts=bits.detach().contiguous().view(integer).long(),
        pairs=pairs,
        route=Route(sent, send, receive),
    )


@in_range("exchange")
def combine(y: Tensor, route: Route | None, mesh: Mesh) -> Tensor:
    """y (R, D), this tensor rank's partial sums -> (N, D): each token's sum in this rank's channels, 0 elsewhere;
    without a route, y.

    `leave_tensor_parallel` adds the tensor ranks' results up to the full channels.
    """
    if route is None:
        return y
    D = y.shape[1]
    y = all_to_all(reduce_scatter(y, mesh.tensor, -1), mesh.expert, route.receive, route.send)
    before = mesh.tensor.rank * y.shape[1]
    return F.pad(sum_rows(y, route.sent), (before, D - before - y.shape[1]))
