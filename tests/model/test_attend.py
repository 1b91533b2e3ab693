"""Which kernel runs attention, what it is called with, and how much memory it takes."""

import itertools
import sys

import pytest
import torch
from helpers import flash_attn_stub
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mythos_dist.config.schema import ActConfig
from mythos_dist.errors import UserError
from mythos_dist.model import KVCache, Mythos, MythosConfig, attend
from mythos_dist.model.attend import choose_kernel, find_documents

BF16 = torch.bfloat16
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def flash(monkeypatch) -> list[str]:
    """flash-attn's stand-in in place of the package; the names of the functions that were called."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_stub)
    flash_attn_stub.calls.clear()
    return flash_attn_stub.calls


def heads(generator: torch.Generator, B: int, T: int, n: int, width: int) -> Tensor:
    return torch.randn(B, T, n, width, generator=generator).to(BF16).requires_grad_()


@pytest.mark.parametrize("lengths", [None, [[5, 1, 3], [9]]])
@pytest.mark.parametrize(("d", "v_dim", "kv_heads"), [(8, 8, 2), (12, 8, 4), (6, 10, 4)])
def test_flash_attn_equals_sdpa(d, v_dim, kv_heads, lengths, flash):
    """GQA, and MLA with values narrower and wider than keys; whole rows, and documents. bf16, outputs and gradients."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        heads(generator, 2, 9, 4, d),
        heads(generator, 2, 9, kv_heads, d),
        heads(generator, 2, 9, kv_heads, v_dim),
    ]
    documents = None
    if lengths:
        ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
        documents = find_documents(ids)
    results = {}
    for kernel in ("flash_attn", "sdpa"):
        out = attend.attend(*leaves, kernel, documents)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results[kernel] = [out, *torch.autograd.grad(out, leaves, direction.to(BF16))]
    assert flash == ["flash_attn_varlen_func" if lengths else "flash_attn_func"]
    for ours, theirs in zip(*results.values(), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).float().norm() <= 0.01 * theirs.float().norm()


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_a_model_with_flash_attn_equals_sdpa(attn_type, flash, tiny, monkeypatch):
    """Loss and gradients of a bf16 model with documents, and what it generates with a cache, against sdpa."""
    config = tiny(attn_type=attn_type)
    model = Mythos(config, act=ActConfig(mode="safe"), seed=1).to(BF16)
    input_ids = torch.arange(24).view(2, 12)
    document_ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    results = {}
    for kernel in ("flash_attn", "sdpa"):
        monkeypatch.setattr("mythos_dist.model.mythos.choose_kernel", lambda *_, kernel=kernel: kernel)
        model.zero_grad()
        losses = model(input_ids, labels=input_ids, document_ids=document_ids)
        losses["objective"].backward()
        cache = KVCache()
        with torch.no_grad():
            logits = [model(part, cache=cache) for part in input_ids.split([7, 4, 1], dim=1)]
        results[kernel] = [losses["objective"], *(p.grad for p in model.parameters()), torch.cat(logits, dim=1)]
    layers = 2 + config.max_loop_iters
    assert flash == ["flash_attn_varlen_func"] * layers + ["flash_attn_func"] * 3 * layers
    for ours, theirs in zip(*results.values(), strict=True):
        assert (ours - theirs).float().norm() <= 0.03 * theirs.float().norm() + 1e-6


def test_auto_selects_flash_attn_only_where_it_can_run(monkeypatch):
    """A GPU from Ampere on, half precision, heads up to 256 channels, the package: all or sdpa; by default silently,
    as an error with every reason if it was asked for."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "a V100")
    monkeypatch.setattr(attend, "unavailable", lambda _: None)
    config, wide = MythosConfig(), MythosConfig(qk_nope_head_dim=200)
    assert choose_kernel("auto", GPU, BF16, config) == "flash_attn"
    assert choose_kernel("flash_attn", GPU, torch.float16, config) == "flash_attn"
    assert choose_kernel("sdpa", GPU, BF16, config) == "sdpa"
    for device, dtype, model in ((CPU, BF16, config), (GPU, torch.float32, config), (GPU, BF16, wide)):
        assert choose_kernel("auto", device, dtype, model) == "sdpa"
        with pytest.raises(UserError, match=r"train.attention=flash_attn cannot run: .*; set train.attention=auto"):
            choose_kernel("flash_attn", device, dtype, model)

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (7, 0))
    monkeypatch.setattr(attend, "unavailable", lambda _: "flash_attn cannot be imported (No module)")
    assert choose_kernel("auto", GPU, BF16, config) == "sdpa"
    with pytest.raises(UserError) as error:
        choose_kernel("flash_attn", GPU, torch.float32, wide)
    for reason in ("a V100 is older", "train.dtype=fp32", "264 channels", "No module", "launch/install_gpu.sh"):
        assert reason in str(error.value)


def peak_bytes(S: int, attn_type: str) -> int:
    """The most that one attention layer's forward and backward hold at once, by the allocator's own events."""
    config = MythosConfig(
        vocab_size=8, dim=32, n_heads=2, n_kv_heads=1, max_seq_len=S, prelude_layers=1, coda_layers=0, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=12, v_head_dim=8, n_experts=2, n_experts_per_tok=1,
        expert_dim=4, n_shared_experts=0, lora_rank=2, attn_type=attn_type,
    )  # fmt: skip
    model = Mythos(config)
    layer, x = model.prelude["0"].attn, torch.randn(1, S, 32)
    context = model.context(torch.zeros(1, S, dtype=torch.long))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        layer(x, context, "")[0].sum().backward()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.launch
def test_attention_memory_is_linear_in_the_sequence_length(attn_type):
    """1,024 to 8,192 tokens: each doubling adds twice what the last one did, within a tenth (the kernel has buffers of
    fixed size, too). With the scores of the two heads each would add four times as much."""
    peaks = [peak_bytes(S, attn_type) for S in (1024, 2048, 4096, 8192)]
    steps = [after - before for before, after in itertools.pairwise(peaks)]
    assert steps[1] == pytest.approx(2 * steps[0], rel=0.1)
    assert steps[2] == pytest.approx(2 * steps[1], rel=0.1)
