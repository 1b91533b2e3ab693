"""Layers that work in chunks of the tokens give the same results, and their memory does not grow with the sequence."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mythos_dist.config.schema import Config, ParallelConfig, TrainConfig
from mythos_dist.model import ExpertsConfig, Mythos
from mythos_dist.model.block import DenseBlock
from mythos_dist.model.moe import MoE
from mythos_dist.model.recompute import Recompute
from mythos_dist.ops.plan.meter import Meter
from mythos_dist.parallel.mesh import SINGLE, mesh_coordinates
from mythos_dist.parallel.process import use_gpu_code
from mythos_dist.parallel.tensor import Embedding

EXPERTS = ExpertsConfig(z_loss=0.1, sequence_balance_loss=0.1)


def train(config, enliven, recompute: Recompute, chunk_tokens: int) -> tuple[dict, dict[str, Tensor]]:
    """Losses and gradients of one pass over 2 x 25 tokens in documents."""
    model = enliven(Mythos(config, experts=EXPERTS, recompute=recompute, chunk_tokens=chunk_tokens))
    ids = torch.randint(config.vocab_size, (2, 25), generator=torch.Generator().manual_seed(0))
    losses = model(ids, labels=ids, document_ids=torch.arange(50).view(2, 25) // 9)
    losses["objective"].backward()
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


NONE, LOOP, SELECTIVE = Recompute(), Recompute("loop", 2), Recompute("selective")
IN_PIECES = [(1, NONE), (7, LOOP), (7, SELECTIVE), (25, LOOP), (49, SELECTIVE)]
ALL = itertools.product([1, 7, 25, 49], [NONE, LOOP, SELECTIVE])


@pytest.mark.parametrize(
    ("chunk_tokens", "recompute"),
    [*IN_PIECES, *(pytest.param(*case, marks=pytest.mark.long) for case in ALL if case not in IN_PIECES)],
    ids=str,
)
def test_work_in_chunks_changes_no_result(chunk_tokens, recompute, tiny, enliven):
    """Chunks that divide nothing, and cross sequences: the same experts for every token; losses to 1e-6, gradients to
    1e-5 of the parameter's largest, because weights' gradients are summed in another order."""
    expected, gradients = train(tiny(), enliven, recompute, 0)
    losses, in_chunks = train(tiny(), enliven, recompute, chunk_tokens)
    assert torch.equal(losses["expert_counts"], expected["expert_counts"])
    for name in ("objective", "cross_entropy", "token_losses"):
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        assert (in_chunks[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@torch.no_grad()
def test_passes_without_gradient_work_in_chunks_too(tiny, enliven):
    """The same logits, to 1e-5: products of fewer rows may round differently."""
    ids = torch.randint(tiny().vocab_size, (2, 25), generator=torch.Generator().manual_seed(0))
    expected, logits = (enliven(Mythos(tiny(), chunk_tokens=size))(ids) for size in (0, 8))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_size_that_does_not_divide_a_micro_batch_is_the_whole():
    sizes = {None: 0, 0: 0, 100: 100, 199: 199, 200: 0, 10**6: 0}
    configs = {size: Config(train=TrainConfig(seq_len=100, micro_batch=2, chunk_tokens=size)) for size in sizes}
    assert {size: config.chunk_size for size, config in configs.items()} == sizes
    in_context = ParallelConfig(context=2)
    shorter = {size: replace(config, parallel=in_context).chunk_size for size, config in configs.items()}
    assert shorter == {**sizes, 100: 0, 199: 0}


@torch.no_grad()
def test_all_ranks_of_a_context_group_run_as_many_chunks(tiny):
    """Of 31 tokens ranks have 8 or 7, of four sequences 32 or 28: three chunks of at most 14 tokens everywhere. With
    ZeRO-3 each gathers weights over all of these ranks, and one more or fewer ends the run."""
    chunks = []
    for rank, tokens in enumerate((8, 8, 8, 7)):
        block = DenseBlock(tiny(), mesh_coordinates(ParallelConfig(context=4), 4, rank), chunk_tokens=14)
        block.ffn.register_forward_hook(lambda module, rows, y, rank=rank: chunks.append(rank))
        block.feed_forward(torch.zeros(4, tokens, tiny().dim), 31)
    assert Counter(chunks) == dict.fromkeys(range(4), 3)


def memory(module: nn.Module, tokens: int, dim: int) -> float:
    """Peak bytes of a forward and a backward pass over (1, tokens, dim) above: parameters, their gradients, what is
    saved for the backward, and four tensors like the input (the output, its gradient, the gradients of the chunks of
    the input, and all of them joined)."""
    with FakeTensorMode(allow_non_fake_inputs=True), use_gpu_code(), Meter() as meter:
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        x = torch.zeros(1, tokens, dim, dtype=torch.bfloat16, requires_grad=True)
        before = meter.total
        meter.reset()
        y = module(x)
        saved = meter.total - before - x.nbytes  # without y
        y = y if isinstance(y, Tensor) else y[0]
        y.backward(torch.zeros_like(y))
        return meter.peak - before - saved - 4 * x.nbytes


DIM, SHORT, LONG = 16, 2048, 16384


@pytest.mark.parametrize("layer", ["ffn", "mixture"])
@pytest.mark.launch
def test_memory_for_hidden_rows_does_not_grow_with_the_sequence(layer, tiny):
    """From 2,048 to 16,384 tokens by at most a tenth; all at once more than sevenfold. Bytes of fake tensors, counted
    by the meter of the dry run, with the code that runs on a GPU."""
    # Experts so wide that hidden rows of a chunk are more than the input of 16,384 tokens.
    config = tiny(dim=DIM, n_experts=8, n_experts_per_tok=4, expert_dim=128, n_shared_experts=1)

    def workspace(tokens: int, chunk_tokens: int) -> float:
        if layer == "mixture":
            module: nn.Module = MoE(config, ExpertsConfig(), chunk_tokens=chunk_tokens)
        else:
            module = FeedForward(config, SINGLE, chunk_tokens=chunk_tokens)
        return memory(module.bfloat16(), tokens, DIM)

    whole, in_chunks = ([workspace(tokens, size) for tokens in (SHORT, LONG)] for size in (0, 1024))
    assert whole[1] > 7 * whole[0]
    assert in_chunks[1] < 1.1 * in_chunks[0]


class FeedForward(DenseBlock):
    """Only the FFN of a dense block."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.feed_forward(x, x.shape[1])


@pytest.mark.launch
def test_memory_for_logits_does_not_grow_with_the_sequence():
    """What the loss needs besides what it saves, from 8,192 to 65,536 tokens: at most a tenth more with logits of 256
    tokens at a time, and more than three times as much without."""

    def logits(tokens: int, chunk_tokens: int) -> int:
        embed = Embedding(64 * DIM, DIM, SINGLE, chunk_tokens)
        with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
            x, labels = torch.zeros(1, tokens, DIM, requires_grad=True), torch.zeros(1, tokens, dtype=torch.int64)
            weights = torch.ones(1, tokens)
            meter.reset()
            loss = embed.loss(x, labels, weights)
            assert loss.total.requires_grad
            return meter.peak - meter.total

    (short, long), in_chunks = ([logits(tokens, size) for tokens in (8192, 65536)] for size in (0, 256))
    assert long > 3 * short
    assert in_chunks[1] < 1.1 * in_chunks[0]
