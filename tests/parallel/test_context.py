"""Context parallelism: which rank has which tokens of a sequence, and attention to the tokens of all ranks."""

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.launch import run_ranks
from hypothesis import given
from hypothesis import strategies as st

from mythos_dist.config.load import load_config
from mythos_dist.config.schema import MythosConfig, ParallelConfig
from mythos_dist.data.stream import MicroBatch
from mythos_dist.model.attend import attend, find_documents
from mythos_dist.model.context_attention import attend_over_context, block_backward, block_forward
from mythos_dist.parallel.context import BALANCE, context_shard, divide_sequences, local_tokens
from mythos_dist.parallel.mesh import Mesh, build_mesh, mesh_coordinates


def mesh_of_rank(context: int, rank: int = 0, tensor: int = 1) -> Mesh:
    parallel = ParallelConfig(context=context, tensor=tensor, sequence=tensor > 1)
    return mesh_coordinates(parallel, context * tensor, rank * tensor)


def document_ids(lengths: list[int], seq_len: int) -> torch.Tensor:
    """(1, S) of documents with these lengths, the last one as long as needed."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[:seq_len]
    return torch.cat([ids, torch.full((seq_len - len(ids),), len(lengths))]).unsqueeze(0)


@st.composite
def batches(draw) -> tuple[int, int, torch.Tensor, int]:
    """Ranks, tensor ranks, document ids (B, S), rank."""
    context, tensor = draw(st.integers(2, 5)), draw(st.integers(1, 3))
    units = draw(st.integers(2 * context, 40))
    seq_len = units * tensor
    rows = [
        document_ids(draw(st.lists(st.integers(1, seq_len), min_size=1, max_size=8)), seq_len)
        for _ in range(draw(st.integers(1, 3)))
    ]
    return context, tensor, torch.cat(rows), draw(st.integers(0, context - 1))


@given(batches())
def test_every_token_is_on_one_rank_and_ranks_have_equally_many(batch):
    """Up to one unit: a token, or with sequence parallelism one of each tensor rank."""
    context, tensor, ids, _ = batch
    B, S = ids.shape
    seen = torch.zeros(B, S, dtype=torch.int64)
    sizes = []
    for rank in range(context):
        mesh = mesh_of_rank(context, rank, tensor)
        shard = context_shard(ids.shape, mesh, ids.device, ids)
        assert shard is not None
        seen.scatter_add_(1, shard.positions, torch.ones_like(shard.positions))
        assert (shard.positions.diff(dim=1) > 0).all()
        sizes.append(shard.positions.shape[1])
        assert sizes[-1] == local_tokens(S, mesh)
        values = torch.arange(B * S).view(B, S)
        assert torch.equal(shard.local(values), shard.positions + torch.arange(B).unsqueeze(1) * S)
        assert torch.equal(shard.local(shard.full(shard.local(values))), shard.local(values))
    assert (seen == 1).all()
    assert sum(sizes) == S and max(sizes) - min(sizes) in (0, tensor) and all(size % tensor == 0 for size in sizes)


@given(batches(), st.integers(1, 2))
def test_blocks_are_the_pairs_of_queries_and_keys_that_attend(batch, times):
    """Each (query, key) pair of a document with the key not after the query is in one block, and no other pair is; also
    of copies of the batch."""
    context, tensor, ids, rank = batch
    shard = context_shard(ids.shape, mesh_of_rank(context, rank, tensor), ids.device, ids)
    assert shard is not None
    if times > 1:
        shard, ids = shard.repeated(times), ids.repeat(times, 1)
    B, S = ids.shape
    queries = (shard.positions + torch.arange(B).unsqueeze(1) * S).flatten()
    pairs = torch.zeros(len(queries), B * S, dtype=torch.int64)
    for tile in shard.tiles:
        assert tile.tokens.stop - tile.tokens.start <= -(-S // context), "no tile is longer than a rank's share"
        for rows, keys, causal in tile.blocks:
            block = torch.ones(rows.stop - rows.start, keys.stop - keys.start, dtype=torch.int64)
            assert not causal or block.shape[0] == block.shape[1]
            first = tile.tokens.start
            pairs[rows, first + keys.start : first + keys.stop] += block.tril() if causal else block
    tokens = torch.arange(B * S)
    row, position, document = tokens // S, tokens % S, ids.flatten()
    same = (row[queries, None] == row) & (document[queries, None] == document)
    assert torch.equal(pairs.bool(), same & (position[queries, None] >= position))
    assert pairs.max() == 1


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_without_documents_the_division_is_zigzag(ranks):
    """Of 2N chunks rank r has r and 2N - 1 - r, as in Megatron-LM."""
    (sequence,) = divide_sequences(np.zeros((1, 64), np.int64), ranks)
    size = 64 // (2 * ranks)
    for rank, ranges in enumerate(sequence):
        chunks = [rank, 2 * ranks - 1 - rank]
        assert [i for one in ranges for i in one] == [i for c in chunks for i in range(c * size, (c + 1) * size)]


def pairs_of(starts: np.ndarray, sequences: list[list[list[range]]], ranks: int) -> list[int]:
    """The (query, key) pairs of each rank: a query sees its document up to itself."""
    keys = np.arange(1, starts.shape[1] + 1) - starts
    return [
        sum(int(keys[row, list(r)].sum()) for row, one in enumerate(sequences) for r in one[rank])
        for rank in range(ranks)
    ]


@pytest.mark.parametrize(("ranks", "batch"), list(itertools.product([2, 4, 8], [1, 4])))
def test_packed_windows_are_balanced(ranks, batch):
    """No rank attends to more than 1.05 times the mean of pairs, in windows of 8,192 tokens of documents with lengths
    like FineWeb-Edu's: log-normal, with a mean of about 1,000 and a few of tens of thousands."""
    random = np.random.default_rng(ranks)
    for _ in range(5):
        lengths = np.maximum(1, random.lognormal(6.4, 1.0, (batch, 200)).astype(np.int64))
        ends = lengths.cumsum(1) - random.integers(0, lengths[:, :1], (batch, 1))  # a window begins within a document
        starts = np.zeros((batch, 8192), np.int64)
        for row, ends_of_row in zip(starts, ends, strict=True):
            row[ends_of_row[ends_of_row < 8192]] = ends_of_row[ends_of_row < 8192]
        starts = np.maximum.accumulate(starts, axis=1)
        pairs = pairs_of(starts, divide_sequences(starts, ranks), ranks)
        assert max(pairs) <= BALANCE * np.mean(pairs)
        assert sum(pairs) == (np.arange(1, 8193) - starts).sum()


def test_one_rank_has_no_shard():
    assert context_shard(torch.Size([2, 16]), mesh_of_rank(1), torch.device("cpu")) is None


KERNELS = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
if torch.cuda.is_available():
    KERNELS += [("cuda", torch.float32), ("cuda", torch.bfloat16)]


@pytest.mark.parametrize(("device", "dtype"), KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_block_has_the_log_sum_exp_and_gradients_of_its_part(causal, device, dtype):
    """Two blocks of keys, merged, are attention to both; each block's gradients, computed with the merged output and
    log-sum-exp, are those of the whole, against autograd of the formula in fp32."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 3, 8, generator=generator).to(device, dtype).float() for n in (5, 12, 12))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    k_near, v_near = (x[:5] if causal else x[:7] for x in (k, v))
    k_far, v_far = (x[len(k_near) :] for x in (k, v))
    mask = torch.ones(5, 12, dtype=torch.bool, device=device)
    if causal:
        mask[:, :5] = mask[:, :5].tril()
    scores = torch.einsum("mhd,nhd->hmn", q, k) * 0.3
    scores = scores.masked_fill(~mask, -torch.inf)
    expected = torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v)
    grad = torch.randn(expected.shape, generator=generator).to(device, dtype)
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad.float())
    with torch.no_grad():
        q, k_near, k_far, v_near, v_far = (x.to(dtype) for x in (q, k_near, k_far, v_near, v_far))
        parts = [block_forward(q, k_near, v_near, causal, 0.3), block_forward(q, k_far, v_far, False, 0.3)]
        lse = torch.logaddexp(parts[0][1], parts[1][1])
        out = sum(part * (one - lse).exp().unsqueeze(-1) for part, one in parts)
        assert isinstance(out, torch.Tensor)
        near = block_backward(grad, q, k_near, v_near, out.to(dtype), lse, causal, 0.3)
        far = block_backward(grad, q, k_far, v_far, out.to(dtype), lse, False, 0.3)
    close = functools.partial(
        torch.testing.assert_close, **({} if dtype == torch.float32 else dict(rtol=3e-2, atol=3e-2)), check_dtype=False
    )
    close(lse.t(), scores.logsumexp(-1))
    close(out, expected)
    grads = near[0] + far[0], torch.cat([near[1], far[1]]), torch.cat([near[2], far[2]])
    for ours, theirs in zip(grads, expected_grads, strict=True):
        close(ours, theirs)


# (batch, tokens, head channels, value channels, whether there are documents)
SHAPES = [(1, 24, 8, 8, False), (3, 37, 12, 8, True), (2, 50, 8, 12, True), (2, 24, 16, 16, True)]


def attend_on_ranks(dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """On each rank, for each of SHAPES: positions, output, and the gradients of queries, entries and weight."""
    mesh, results = build_mesh(ParallelConfig(context=3)), []
    for shape in SHAPES:
        q, entries, weight, ids, grad = inputs_of(shape, dtype)
        shard = context_shard(q.shape[:2], mesh, q.device, ids)
        assert shard is not None
        index = torch.arange(len(q)).unsqueeze(1), shard.positions
        q, entries, weight = q[index].requires_grad_(), entries[index].requires_grad_(), weight.requires_grad_()
        out = attend_over_context(q, entries, weight, expand_to(shape), shape[3], shard)
        out.backward(grad.view(*shape[:2], -1)[index].flatten(0, 1))
        results.append([shard.positions, out.detach(), q.grad, entries.grad, weight.grad])
    return results


def inputs_of(shape: tuple[int, int, int, int, bool], dtype: torch.dtype) -> Any:
    B, S, d, v, has_documents = shape
    generator = torch.Generator().manual_seed(S)
    sizes = ((B, S, 2, d), (B, S, 6), (2 * (d + v), 6), (B * S, 2 * v))
    q, entries, weight, grad = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    ids = (torch.rand(B, S, generator=generator) < 0.15).cumsum(1) if has_documents else None
    return q, entries, weight, ids, grad


def expand_to(shape: tuple[int, int, int, int, bool]) -> Any:
    def expand(rows: torch.Tensor, weight: torch.Tensor | None) -> Any:
        assert weight is not None
        return (rows @ weight.t()).unflatten(-1, (2, -1)).split([shape[2], shape[3]], dim=-1)

    return expand


@pytest.mark.launch
def test_attention_over_ranks_equals_attention_on_one():
    """Outputs and all gradients, in fp32: only the order of summation differs. Lengths that no number of ranks divides,
    documents across the borders, values narrower and wider than keys."""
    ranks = run_ranks(3, attend_on_ranks, torch.float32)
    for i, shape in enumerate(SHAPES):
        q, entries, weight, ids, grad = inputs_of(shape, torch.float32)
        inputs = [x.requires_grad_() for x in (q, entries, weight)]
        k, v = expand_to(shape)(entries.flatten(0, 1), weight)
        k, v = (x.view(*q.shape[:2], 2, -1) for x in (k, v))
        expected = attend(q, k, v, documents=None if ids is None else find_documents(ids))
        expected.backward(grad)
        out = torch.zeros_like(expected).view(*q.shape[:2], -1)
        grads = [torch.zeros_like(q), torch.zeros_like(entries), torch.zeros_like(weight)]
        for results in ranks:
            positions, ours, grad_q, grad_entries, grad_weight = results[i]
            index = torch.arange(len(q)).unsqueeze(1), positions
            out[index] = ours.view(*positions.shape, -1)
            grads[0][index], grads[1][index] = grad_q, grad_entries
            grads[2] += grad_weight
        torch.testing.assert_close(out.flatten(0, 1), expected)
        for ours, x in zip(grads, inputs, strict=True):
            assert x.grad is not None
            assert (ours - x.grad).abs().max() <= 1e-5 * x.grad.abs().max()


def test_a_model_of_one_rank_is_not_changed_by_the_axis():
    """With one rank there is no shard, so attention is that of a model without the axis."""
    from mythos_dist.model import Mythos

    config = MythosConfig(vocab_size=64, dim=32, n_heads=4, max_seq_len=32, max_loop_iters=2, n_experts=4)
    model = Mythos(config, mesh=mesh_of_rank(1))
    assert model.context(torch.zeros(1, 8, dtype=torch.int64)).shard is None


def peak_of_a_step(context: int, seq_len: int) -> tuple[float, float]:
    """On each rank: resident bytes above those before the step, at the peak of a step of `seq_len` tokens; the loss."""
    from mythos_dist.train.engine import Engine

    settings = f"train.seq_len={seq_len} model.max_seq_len={seq_len} train.global_batch=1 train.micro_batch=1"
    settings += f" parallel.context={context} train.recompute=loop loops.mean=4 train.dtype=fp32 data.path=none"
    config = load_config("configs/tiny_cpu.yaml", settings.split())
    engine = Engine(config, build_mesh(config.parallel))
    generator = torch.Generator().manual_seed(0)

    def batch(size: int) -> list[MicroBatch]:
        tokens = torch.randint(config.model.vocab_size, (1, size + 1), generator=generator)
        documents = (torch.rand(1, size, generator=generator) < 1 / 200).cumsum(1).int()
        return [MicroBatch(tokens[:, :-1], tokens[:, 1:], documents, torch.zeros(1, dtype=torch.int64))]

    engine.train_step(batch(256), 1)  # allocates gradients and buffers
    long = batch(seq_len)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    loss = engine.train_step(long, 2).loss
    return resident("VmHWM") - before, loss


def resident(key: str) -> float:
    """Of this process, from /proc: VmRSS now, VmHWM at the peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * float(line.split()[1])


@pytest.mark.launch
@pytest.mark.long  # a dry run has the same memory, and is held to real ranks
def test_four_ranks_need_a_third_of_the_memory_of_one():
    """Above weights and optimizer, at most 0.35 of the bytes for the same 16,384 tokens; a quarter is the ideal."""
    ((alone, loss),) = run_ranks(1, peak_of_a_step, 1, 16384)
    for peak, loss_of_rank in run_ranks(4, peak_of_a_step, 4, 16384):
        assert peak <= 0.35 * alone
        assert loss_of_rank == pytest.approx(loss, rel=1e-5)
