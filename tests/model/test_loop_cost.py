"""What one more loop launches, and that nothing in it waits for the device."""

from collections import Counter

import pytest
import torch
from helpers.selection import first_is_quick
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mythos_dist.model import ExpertsConfig, Mythos, MythosConfig
from mythos_dist.model.loops import Loops

# What makes the host wait for a result, or makes a shape depend on one.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "repeat_interleave", "is_nonzero")


class Calls(TorchDispatchMode):
    """Counts ATen calls: those that compute, those that return a view and launch nothing, and those that wait."""

    def __init__(self):
        super().__init__()
        self.computing: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns) or name in (
            *("_unsafe_view", "detach", "empty_like", "new_empty", "empty"),
        )
        (self.views if is_view else self.computing)[name] += 1
        masks = args[1] if name in ("index", "index_put_") else []
        if name in WAITS or any(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in masks):
            self.waiting.append(name)
        return func(*args, **kwargs or {})


def model_of(attn_type: str, n_experts: int, backend: str = "grouped") -> Mythos:
    return Mythos(
        MythosConfig(
            vocab_size=64, dim=64, n_heads=4, n_kv_heads=2, max_seq_len=64, max_loop_iters=4, prelude_layers=1,
            coda_layers=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
            n_experts=n_experts, n_experts_per_tok=4, expert_dim=16, n_shared_experts=1, lora_rank=4,
            attn_type=attn_type,
        ),
        experts=ExpertsConfig(backend=backend),
    )  # fmt: skip


def calls_of(model: Mythos, n_loops: int) -> Calls:
    input_ids = torch.arange(64).view(1, 64)
    with Calls() as calls:
        model(input_ids, labels=input_ids, loops=Loops(n_loops))  # as the trainer calls it: ids are not looked at
    return calls


def per_loop(model: Mythos) -> tuple[Counter[str], Counter[str], list[str]]:
    """What the fourth loop adds to the third: computing calls, views, waits."""
    three, four = calls_of(model, 3), calls_of(model, 4)
    return four.computing - three.computing, four.views - three.views, four.waiting


@pytest.mark.parametrize("attn_type", first_is_quick(["gqa", "mla"]))
@pytest.mark.launch
def test_a_loop_launches_as_many_kernels_for_512_experts_as_for_8(attn_type):
    """The same calls, at most 120 that compute (views launch nothing), and none that waits. Running expert after expert
    takes some for each, and waits for each."""
    few, many = (per_loop(model_of(attn_type, n)) for n in (8, 512))
    assert few == many
    computing, _, waits = many
    assert computing.total() <= 120
    assert waits == []
    computing, _, waits = per_loop(model_of(attn_type, 512, "reference"))
    assert computing.total() > 512
    assert len(waits) >= 512


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_no_operation_reads_a_value_on_the_host(attn_type):
    """Forward and backward in bf16 on PyTorch's meta device, whose tensors hold no numbers: whatever wants one raises,
    as the reference backend does. The code is a GPU's: that of CPUs asks for numbers in half precision."""
    with torch.device("meta"):
        input_ids = torch.zeros(1, 64, dtype=torch.long)
        for backend in ("grouped", "reference"):
            model = model_of(attn_type, 8, backend).bfloat16()
            if backend == "reference":
                with pytest.raises(NotImplementedError, match="nonzero"):
                    model(input_ids, 3, labels=input_ids)
            else:
                model(input_ids, 3, labels=input_ids)["objective"].backward()
                assert all(parameter.grad is not None for parameter in model.parameters())
