"""Attention over the context axis, forward and backward, on gloo: our all-gather of latents against rings.

Every side gets the same queries and MLA latents of one causal sequence, in zigzag order, and the same matrix that
expands latents to keys and values. Before timing, outputs and gradients are compared. Sides:

  gather      ours (model/context_attention.py)
  ring        a ring of latents: each rank sends on what it holds while it attends to it, and gradients travel along
  torch ring  PyTorch's ring of key and value heads (torch.distributed.tensor.experimental, as in torchtitan), with its
              attention replaced by the CPU's kernel; keys and values are expanded before it, as for any attention

Rounds are interleaved. Bytes are what a rank sends (an all-gather or reduce-scatter: what it sends in a ring). Memory
is the peak of all tensors, inputs included, counted as they are created and freed. Shapes: a rank of 100b at tensor 8.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.distributed.tensor.experimental._context_parallel import _attention as theirs

from mythos_dist.config.schema import ParallelConfig
from mythos_dist.model.context_attention import attend_over_context, block_backward, block_forward
from mythos_dist.ops.plan.meter import Meter
from mythos_dist.parallel.context import context_shard
from mythos_dist.parallel.mesh import build_mesh

# S tokens, n of them on this rank, H heads, d and v channels of a key and a value, w = d, W elements of a latent with
# the rotary key.

HEADS, LATENT, ROPE, NOPE, VALUE = 8, 512, 64, 128, 128
TOLERANCE = 1e-4  # relative to the largest element; sums in another order
AttendTo = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (n, H, d), entries (n, W), weight -> (n, H * v)


def expand(entries: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """entries (n, W) -> keys (n, H, d), values (n, H, v)."""
    assert weight is not None
    latent, rope = entries.split([LATENT, ROPE], dim=-1)
    nope, v = F.linear(latent, weight).unflatten(-1, (HEADS, -1)).split([NOPE, VALUE], dim=-1)
    return torch.cat([nope, rope.unsqueeze(1).expand(-1, HEADS, -1)], dim=-1), v


def expand_padded(entries: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same, with values as wide as keys, which the kernels require."""
    k, v = expand(entries, weight)
    return k, F.pad(v, (0, k.shape[-1] - v.shape[-1]))


def exchange(tensors: list[Tensor]) -> tuple[list[Tensor], list[Any]]:
    """Begin to send tensors to the next rank and to receive the previous rank's: those, and what to wait for."""
    rank, size = dist.get_rank(), dist.get_world_size()
    received = [torch.empty_like(x) for x in tensors]
    sends = [dist.P2POp(dist.isend, x, (rank + 1) % size) for x in tensors]
    receives = [dist.P2POp(dist.irecv, x, (rank - 1) % size) for x in received]
    return received, dist.batch_isend_irecv(sends + receives)


def wait(works: list[Any]) -> None:
    """For all of `exchange`."""
    for work in works:
        work.wait()


def zigzag(step: int, n: int) -> tuple[slice, slice, bool]:
    """The queries here that attend to the tokens held in a step, which of those, and whether causally."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if step == 0:
        return slice(0, n), slice(0, n), True
    if (rank - step) % size < rank:
        return slice(0, n), slice(0, n // 2), False
    return slice(n // 2, n), slice(0, n), False


class Ring(torch.autograd.Function):
    """A ring of latents."""

    @staticmethod
    def forward(ctx, q: Tensor, entries: Tensor, weight: Tensor) -> Tensor:
        """q (n, H, w), entries (n, W) -> (n, H, w)."""
        size, held, works = dist.get_world_size(), entries, []
        out = torch.zeros_like(q)
        lse = q.new_full(q.shape[:2], -torch.inf)
        for step in range(size):
            following = held
            if step < size - 1:
                (following,), works = exchange([held])
            queries, keys, causal = zigzag(step, len(q))
            k, v = expand_padded(held[keys], weight)
            part, part_lse = block_forward(q[queries], k, v, causal, q.shape[-1] ** -0.5)
            merged = torch.logaddexp(lse[queries], part_lse)
            out[queries] *= (lse[queries] - merged).exp().unsqueeze(-1)
            out[queries] += part * (part_lse - merged).exp().unsqueeze(-1)
            lse[queries] = merged
            wait(works)
            held, works = following, []
        ctx.save_for_backward(q, entries, weight, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        q, entries, weight, out, lse = ctx.saved_tensors
        size, held, works = dist.get_world_size(), entries, []
        grad_q, grad_weight, grad_held = torch.zeros_like(q), torch.zeros_like(weight), torch.zeros_like(entries)
        arriving, of_gradients = grad_held, []
        for step in range(size):
            following = held
            if step < size - 1:
                (following,), works = exchange([held])
            queries, keys, causal = zigzag(step, len(q))
            with torch.enable_grad():
                inputs = [held[keys].detach().requires_grad_(), weight.detach().requires_grad_()]
                k, v = expand_padded(*inputs)
            parts = block_backward(
                grad[queries],
                q[queries],
                k.detach(),
                v.detach(),
                out[queries],
                lse[queries],
                causal,
                q.shape[-1] ** -0.5,
            )
            grad_q[queries] += parts[0]
            grads = torch.autograd.grad((k, v), inputs, parts[1:])
            grad_weight += grads[1]
            wait(of_gradients)  # those of the tokens held now, from the rank that held them before
            grad_held = arriving
            grad_held[keys] += grads[0]
            (arriving,), of_gradients = exchange([grad_held])
            wait(works)
            held, works = following, []
        wait(of_gradients)
        return grad_q, arriving, grad_weight


def _forward(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    """The CPU's kernel as PyTorch's ring calls one."""
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return op(query, key, value, 0.0, arguments["is_causal"])


def _backward(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    others = (arguments[name] for name in ("out", "logsumexp"))
    return op(arguments["grad_out"], query, key, value, *others, 0.0, arguments["is_causal"])


class TorchRing(torch.autograd.Function):
    """PyTorch's ring of key and value heads."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(1, H, n, w) -> the same."""
        group = dist.group.WORLD
        assert group is not None
        out, lse = theirs._templated_ring_attention(group, 2, _forward, q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        group = dist.group.WORLD
        assert group is not None
        grads = theirs._templated_ring_attention_backward(
            group, 2, _backward, grad.contiguous(), "grad_out", q, k, v, out, lse, True
        )
        return grads[:3]


def sides(tokens: int, ranks: int) -> tuple[Tensor, dict[str, AttendTo]]:
    """This rank's positions (n,), and each side's attention."""
    shard = context_shard(torch.Size([1, tokens]), build_mesh(ParallelConfig(context=ranks)), torch.device("cpu"))
    assert shard is not None

    def gather(q: Tensor, entries: Tensor, weight: Tensor) -> Tensor:
        return attend_over_context(q.unsqueeze(0), entries.unsqueeze(0), weight, expand, VALUE, shard)

    def ring(q: Tensor, entries: Tensor, weight: Tensor) -> Tensor:
        out: Any = Ring.apply(q, entries, weight)
        return out[..., :VALUE].flatten(1)

    def torch_ring(q: Tensor, entries: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0).contiguous() for x in (q, *expand_padded(entries, weight)))
        out: Any = TorchRing.apply(q, k, v)
        return out[0].transpose(0, 1)[..., :VALUE].flatten(1)

    return shard.positions[0], {"gather": gather, "ring": ring, "torch ring": torch_ring}


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """A list with the bytes that this rank has sent."""
    sent = [0]

    def counting(function: Callable, size: Callable[..., int]) -> Callable:
        def call(*arguments: Any, **keywords: Any) -> Any:
            sent[0] += size(*arguments)
            return function(*arguments, **keywords)

        return call

    def of_messages(operations: list[Any]) -> int:
        return sum(one.tensor.nbytes for one in operations if one.op is dist.isend)

    def difference(out: Tensor, x: Tensor) -> int:
        return abs(out.nbytes - x.nbytes)

    with ExitStack() as stack:
        for owner, name, size in (
            (dist, "all_gather_into_tensor", difference),
            (dist, "reduce_scatter_tensor", difference),
            (dist, "batch_isend_irecv", of_messages),
            (functional, "permute_tensor", lambda x, *_: x.nbytes),
        ):
            stack.enter_context(mock.patch.object(owner, name, counting(getattr(owner, name), size)))
        yield sent


def run_rank(rank: int, options: argparse.Namespace, folder: str) -> None:
    """Compare all sides, count their bytes and memory, and time them; rank 0 writes the results."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # of names that torch changes
    store = dist.FileStore(os.path.join(folder, "store"), options.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.ranks)
    theirs.set_rotate_method("alltoall")  # the ring; its default is an all-gather
    positions, attentions = sides(options.tokens, options.ranks)
    generator = torch.Generator().manual_seed(0)
    widths = [(options.tokens, HEADS, NOPE + ROPE), (options.tokens, LATENT + ROPE), (options.tokens, HEADS * VALUE)]
    q, entries, grad = (torch.randn(shape, generator=generator)[positions] for shape in widths)
    weight = torch.randn(HEADS * (NOPE + VALUE), LATENT, generator=generator) * LATENT**-0.5

    def step(attend: AttendTo) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in (q, entries, weight)]
        out = attend(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    results: dict[str, dict[str, float]] = {}
    expected: list[Tensor] = []
    for name, attend in attentions.items():
        with counted_bytes() as sent:
            values = step(attend)
        dist.all_reduce(values[-1])  # of the weight: a rank's part of its gradient depends on who expands which tokens
        expected = expected or values
        for ours, one in zip(expected, values, strict=True):
            difference = (ours - one).abs().max() / ours.abs().max()
            assert difference <= TOLERANCE, f"{name}: {difference:.1e}"
        with Meter() as meter:
            step(attend)
        results[name] = {"bytes": sent[0], "memory": meter.peak}
    times: dict[str, list[float]] = {name: [] for name in attentions}
    for _ in range(options.rounds):
        for name, attend in attentions.items():
            dist.barrier()
            begin = time.perf_counter()
            step(attend)
            dist.barrier()
            times[name].append(time.perf_counter() - begin)
    for name, result in results.items():
        ratios = [own / ours for own, ours in zip(times[name], times["gather"], strict=True)]
        result["time"] = statistics.median(ratios)
    if rank == 0:
        with open(os.path.join(folder, "results.json"), "w") as file:
            json.dump(results, file)
    dist.destroy_process_group()


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="(%(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=2048, help="of the sequence, a multiple of 2 x ranks (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.ranks < 2 or options.tokens % (2 * options.ranks):
        parser.error("--tokens must be a multiple of 2 x --ranks, and --ranks at least 2")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (options, folder), options.ranks)
        with open(os.path.join(folder, "results.json")) as file:
            results = json.load(file)
    if options.json:
        print(json.dumps(results))
        return
    print(f"{options.ranks} ranks, {options.tokens:,} tokens, fp32, forward and backward, rank 0")
    print(f"{'':12} {'sent MB':>9} {'x':>6} {'peak MB':>9} {'x':>6} {'time x':>7}")
    first = results["gather"]
    for name, one in results.items():
        print(
            f"{name:12} {one['bytes'] / 1e6:9.2f} {one['bytes'] / first['bytes']:6.2f} {one['memory'] / 1e6:9.2f} "
            f"{one['memory'] / first['memory']:6.2f} {one['time']:7.2f}"
        )


if __name__ == "__main__":
    main()
