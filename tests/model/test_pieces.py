"""Layers that work in pieces of the tokens give the same results, and their memory does not grow with the sequence."""

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
from mythos_dist.parallel.mesh import SINGLE
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


@pytest.mark.parametrize("recompute", [Recompute(), Recompute("loop", 2), Recompute("selective")], ids=str)
@pytest.mark.parametrize("chunk_tokens", [1, 7, 25, 49])
def test_work_in_pieces_changes_no_result(recompute, chunk_tokens, tiny, enliven):
    """Pieces that divide nothing, and cross sequences: the same experts for every token; losses to 1e-6, gradients to
    1e-5 of the parameter's largest, because weights' gradients are summed in another order."""
    expected, gradients = train(tiny(), enliven, recompute, 0)
    losses, in_pieces = train(tiny(), enliven, recompute, chunk_tokens)
    assert torch.equal(losses["expert_counts"], expected["expert_counts"])
    for name in ("objective", "cross_entropy", "token_losses"):
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        assert (in_pieces[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@torch.no_grad()
def test_passes_without_gradient_work_in_pieces_too(tiny, enliven):
    """The same logits, to 1e-5: products of fewer rows may round differently."""
    ids = torch.randint(tiny().vocab_size, (2, 25), generator=torch.Generator().manual_seed(0))
    expected, logits = (enliven(Mythos(tiny(), chunk_tokens=size))(ids) for size in (0, 8))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_size_that_does_not_divide_a_micro_batch_is_the_whole():
    sizes = {None: 0, 0: 0, 100: 100, 199: 199, 200: 0, 10**6: 0}
    configs = {size: Config(train=TrainConfig(seq_len=100, micro_batch=2, chunk_tokens=size)) for size in sizes}
    assert {size: config.piece_tokens for size, config in configs.items()} == sizes
    in_context = ParallelConfig(context=2)
    shorter = {size: replace(config, parallel=in_context).piece_tokens for size, config in configs.items()}
    assert shorter == {**sizes, 100: 0, 199: 0}


def memory(module: nn.Module, tokens: int, dim: int) -> float:
    """Peak bytes of a forward and a backward pass over (1, tokens, dim) above: parameters, their gradients, what is
    saved for the backward, and four tensors like the input (the output, its gradient, the gradients of the pieces of
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


DIM, SHORT, LONG = 16, 8192, 65536


@pytest.mark.parametrize("layer", ["ffn", "mixture"])
def test_memory_for_hidden_rows_does_not_grow_with_the_sequence(layer, tiny):
    """From 8,192 to 65,536 tokens by at most a tenth; all at once more than sevenfold. Bytes of fake tensors, counted
    by the meter of the dry run, with the code that runs on a GPU."""
    # Experts so wide that hidden rows of a piece are more than the input of 65,536 tokens.
    config = tiny(dim=DIM, n_experts=8, n_experts_per_tok=4, expert_dim=128, n_shared_experts=1)

    def workspace(tokens: int, chunk_tokens: int) -> float:
        if layer == "mixture":
            module: nn.Module = MoE(config, ExpertsConfig(), chunk_tokens=chunk_tokens)
        else:
            module = FeedForward(config, SINGLE, chunk_tokens=chunk_tokens)
        return memory(module.bfloat16(), tokens, DIM)

    whole, in_pieces = ([workspace(tokens, size) for tokens in (SHORT, LONG)] for size in (0, 4096))
    assert whole[1] > 7 * whole[0]
    assert in_pieces[1] < 1.1 * in_pieces[0]


class FeedForward(DenseBlock):
    """Only the FFN of a dense block."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.feed_forward(x)


def test_memory_for_logits_does_not_grow_with_the_sequence():
    """What the loss needs besides what it saves, from 8,192 to 65,536 tokens: at most a tenth more with logits of 64
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

    (short, long), in_pieces = ([logits(tokens, size) for tokens in (SHORT, LONG)] for size in (0, 64))
    assert long > 3 * short
    assert in_pieces[1] < 1.1 * in_pieces[0]
