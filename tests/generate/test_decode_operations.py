"""The operations of a decode step, which at batch 1 on a CPU take as long to launch as weights take to read."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mythos_dist.generate.engine import DecodingEngine
from mythos_dist.generate.sampling import Sampling
from mythos_dist.parallel import few_rows


class _Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


def _operations(model, n_loops: int) -> int:
    """Of a decode step of one row, which holds some tokens."""
    engine = DecodingEngine(model, None, n_loops=n_loops, max_batch=1)
    engine.submit(list(range(20)), Sampling(max_new_tokens=9, temperature=0))
    for _ in range(3):
        engine.step()
    with _Count() as count:
        engine.step()
    return count.operations


@pytest.mark.parametrize("attn_type, most", [("mla", 180), ("gqa", 136)])
def test_a_loop_of_one_row_launches_few_operations(attn_type, most, build, monkeypatch):
    """Launching one takes some 2 us on a CPU and 5 on a GPU, and a token launches those of a loop in each of its loops:
    a change that adds some should justify them. Products are counted as they are for large weights, and with PyTorch's
    own `F.linear`: DeepSpeed's ZeRO-3 replaces it in every process in which an engine was built."""
    monkeypatch.setattr(few_rows, "LEAST_WEIGHT", 0)
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    model = build(attn_type=attn_type)
    assert (_operations(model, 7) - _operations(model, 3)) / 4 <= most


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_operations_for_one_row_give_the_logits_of_a_full_forward(attn_type, build, monkeypatch):
    """Up to rounding: norms and experts of a single row have operations of their own."""
    monkeypatch.setattr(few_rows, "LEAST_WEIGHT", 0)
    model, ids = build(attn_type=attn_type), torch.tensor([[3]])
    with torch.no_grad():
        expected = model(ids)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
