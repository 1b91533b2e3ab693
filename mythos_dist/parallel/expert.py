"""Moving tokens to the ranks that hold their experts and back, dropless, with uneven all-to-all.

A token that goes to several experts of one rank is sent there once, with its weights. How many rows everybody sends
is exchanged first, and all of it reaches the host in one copy. Under tensor parallelism every tensor rank carries
1 / tensor of a row's channels between the experts' ranks; the rows become whole over the (faster) tensor axis.
"""

# N tokens, D model, E experts, k experts per token, s = min(k, experts on one rank), R rows.

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mythos_dist.parallel.collectives import all_gather, all_to_all, reduce_scatter
from mythos_dist.parallel.mesh import Axis, Mesh
from mythos_dist.parallel.rows import RowIndex, index_slots, nonzero_no_sync, sum_rows, take_rows


class Route(NamedTuple):
    """What came to this rank's experts, and the way back."""

    rows: Tensor  # (R, D), whole
    weights: Tensor  # (R, s) router weights, 0 where a slot is empty
    experts: Tensor  # (R, s) local expert; one beyond the last where a slot is empty
    pairs: int  # how many slots are not empty
    sent: RowIndex  # this rank's tokens among the rows it sent
    send: list[int]  # rows sent to each rank of the expert axis
    receive: list[int]  # rows that came from each


def _exchange_counts(owner: Tensor, goes: Tensor, axis: Axis) -> tuple[list[int], list[int], int]:
    """Rows to send to each rank, rows to receive from each, and all (row, expert) pairs to receive."""
    flat = owner.flatten()
    pairs = torch.zeros(axis.size, dtype=torch.int64, device=owner.device).scatter_add_(0, flat, torch.ones_like(flat))
    here = torch.stack([goes.sum(1), pairs], dim=1)  # (ranks, 2)
    there = torch.empty_like(here)
    dist.all_to_all_single(there, here, group=axis.group)
    (send, _), (receive, pairs_in) = torch.stack([here.T, there.T]).tolist()  # the one wait for the GPU
    return send, receive, sum(pairs_in)


def _place(goes: Tensor, n_rows: int) -> tuple[RowIndex, Tensor]:
    """Rows sorted by destination, then by token; and each row's destination (n_rows,)."""
    N = goes.shape[1]
    flat = nonzero_no_sync(goes, n_rows)
    row = (goes.flatten().cumsum(0) - 1).view_as(goes)  # of each (rank, token)
    return index_slots(flat % N, row.T, goes.T, n_rows), flat // N


def dispatch(x: Tensor, weights: Tensor, index: Tensor, n_experts: int, mesh: Mesh) -> Route:
    """x (N, D), the same on every tensor rank, weights (N, k), index (N, k) -> what this rank's experts work on."""
    axis = mesh.expert
    local = n_experts // axis.size
    slots = min(index.shape[1], local)
    owner = index // local
    goes = torch.zeros(axis.size, x.shape[0], dtype=torch.bool, device=x.device).scatter_(0, owner.T, True)
    send, receive, pairs = _exchange_counts(owner, goes, axis)
    sent, destination = _place(goes, sum(send))

    here = owner[sent.token] == destination.unsqueeze(1)  # (rows, k): slots whose expert is at the destination
    index_out = torch.where(here, index[sent.token] % local, local)
    index_out, order = index_out.sort(dim=1, stable=True)  # empty slots go last; at most `slots` are not empty
    weights_out = take_rows(weights, sent).masked_fill(~here, 0.0).gather(1, order)

    # One message: this rank's channels, the weights, and the experts' numbers as bits of the message's dtype.
    integer = torch.int32 if x.element_size() == 4 else torch.int16
    width = x.shape[1] // mesh.tensor.size
    channels = take_rows(x.narrow(1, mesh.tensor.rank * width, width), sent)
    bits = index_out[:, :slots].to(integer).view(x.dtype)
    message = torch.cat([channels, weights_out[:, :slots].to(x.dtype), bits], dim=1)
    channels, weights, bits = all_to_all(message, axis, send, receive).split([width, slots, slots], dim=1)
    return Route(
        rows=all_gather(channels, mesh.tensor, -1),
        weights=weights,
        experts=bits.detach().contiguous().view(integer).long(),
        pairs=pairs,
        sent=sent,
        send=send,
        receive=receive,
    )


def combine(y: Tensor, route: Route, mesh: Mesh) -> Tensor:
    """y (R, D), this tensor rank's partial sums -> (N, D): the tokens' sums in this rank's channels, 0 elsewhere.

    Added up over the tensor axis, the parts are the whole: what `leave` expects.
    """
    D = y.shape[1]
    y = all_to_all(reduce_scatter(y, mesh.tensor, -1), mesh.expert, route.receive, route.send)
    before = mesh.tensor.rank * y.shape[1]
    return F.pad(sum_rows(y, route.sent), (before, D - before - y.shape[1]))
