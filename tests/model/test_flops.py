"""FLOPs by formula against PyTorch's own count of the real model's operations."""

import pytest
import torch
from helpers.selection import first_is_quick
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mythos_dist.config.variants import VARIANTS
from mythos_dist.model import ExpertsConfig, Mythos, MythosConfig
from mythos_dist.model.flops import attention_share, forward_flops_per_token, train_flops_per_token

BATCH, SEQ_LEN = 2, 24
COMMON = {
    "vocab_size": 50,
    "dim": 48,
    "max_seq_len": SEQ_LEN,
    "n_experts": 6,
    "n_experts_per_tok": 2,
    "n_shared_experts": 2,
    "expert_dim": 20,
    "lora_rank": 5,
    "prelude_layers": 2,
    "coda_layers": 1,
}
MLA = {"n_heads": 3, "kv_lora_rank": 14, "q_lora_rank": 22, "qk_rope_head_dim": 6, "qk_nope_head_dim": 10}
CONFIGS = [
    MythosConfig(**COMMON, attn_type="gqa", n_heads=6, n_kv_heads=2),
    MythosConfig(**COMMON, attn_type="gqa", n_heads=4, n_kv_heads=4),
    MythosConfig(**COMMON, **MLA, v_head_dim=8),  # narrower than keys: the kernel pads it
    MythosConfig(**COMMON | {"n_shared_experts": 0}, **MLA, v_head_dim=24),  # wider: keys are padded
    MythosConfig(**COMMON, **MLA, v_head_dim=16, kv_sharing="every:2"),
    MythosConfig(**COMMON, attn_type="gqa", n_heads=6, n_kv_heads=2, kv_sharing="first"),
    MythosConfig(
        **COMMON,
        attn_type="gqa",
        n_heads=6,
        n_kv_heads=2,
        gqa_head_dim=10,
        qkv_bias=True,
        qk_norm=True,
        key_norm_weight=True,
        dense_dim=50,
        tie_embeddings=False,
        injection="difference",
    ),
]


def counted(config: MythosConfig, n_loops: int, backward: bool = False, backprop: int | None = None) -> int:
    """FLOPs of one batch by FlopCounterMode. It counts matrix products only, so attention runs as two."""
    model = Mythos(config, experts=ExpertsConfig(backend="reference"))
    input_ids = torch.randint(config.vocab_size, (BATCH, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    # The head computes its gradients in the forward pass, unless gradients are disabled.
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward):
        losses = model(input_ids, n_loops, labels=input_ids, backprop=backprop)
        if backward:
            losses["objective"].backward()
    return counter.get_total_flops()


def score_flops(config: MythosConfig, n_loops: int) -> tuple[float, float]:
    """FLOPs of q k^T and scores * v in all layers of a forward pass: as the math kernel runs them, and as needed.

    The kernel computes all S * S pairs, with the narrower of keys and values padded. Needed are the
    S * (S + 1) / 2 pairs with an earlier token or itself, and each side's own width.
    """
    layers = config.prelude_layers + config.coda_layers + n_loops
    if config.attn_type == "mla":
        key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    else:
        key = value = config.gqa_head_dim or config.dim // config.n_heads
    per_pair = 2.0 * BATCH * config.n_heads * layers
    run = per_pair * SEQ_LEN * SEQ_LEN * 2 * max(key, value)
    needed = per_pair * SEQ_LEN * (SEQ_LEN + 1) / 2 * (key + value)
    return run, needed


@pytest.mark.parametrize("n_loops", first_is_quick([5, 1]))
@pytest.mark.parametrize("config", CONFIGS)
def test_forward_flops_equal_the_matrix_products_of_the_model(config, n_loops):
    """Exactly, after the kernel's S x S scores are replaced by the causal half that the formula counts."""
    run, needed = score_flops(config, n_loops)
    expected = counted(config, n_loops) - run + needed
    assert forward_flops_per_token(config, SEQ_LEN, n_loops) * BATCH * SEQ_LEN == expected
    assert attention_share(config, SEQ_LEN, n_loops) == pytest.approx(needed / expected)


@pytest.mark.parametrize("config", first_is_quick(CONFIGS))
def test_a_training_step_is_three_forward_passes(config):
    """Exactly: every matrix product of the forward has two in the backward. A halting layer that is off has none."""
    run, needed = score_flops(config, 3)
    expected = counted(config, 3, backward=True) - 3 * run + 3 * needed
    assert train_flops_per_token(config, SEQ_LEN, 3) * BATCH * SEQ_LEN == expected


@pytest.mark.parametrize("config", first_is_quick(CONFIGS[:5]))
def test_a_loop_without_gradient_is_one_forward_pass(config):
    """Exactly, for the first 2 of 5 loops."""
    run, needed = (
        once + 2 * thrice for once, thrice in zip(score_flops(config, 5), score_flops(config, 3), strict=True)
    )
    expected = counted(config, 5, backward=True, backprop=3) - run + needed
    assert train_flops_per_token(config, SEQ_LEN, 5, no_grad=2) * BATCH * SEQ_LEN == expected


@pytest.mark.parametrize(
    ("name", "tflop"),
    [("1b", 0.0165), ("3b", 0.0481), ("10b", 0.131), ("50b", 0.719), ("100b", 2.62), ("500b", 17.8), ("1t", 47.3)],
)
def test_the_variants_have_the_flops_of_an_independent_count(name, tflop):
    """TFLOP per token of a step at 4096 tokens, counted before this code was written; three digits, so 1 %."""
    config = MythosConfig(**VARIANTS[name])
    assert train_flops_per_token(config, 4096, config.max_loop_iters) / 1e12 == pytest.approx(tflop, rel=0.01)
