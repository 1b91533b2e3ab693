"""Fixtures: a small model whose logits are far from uniform."""

from collections.abc import Callable

import pytest
import torch

from mythos_dist.config.schema import ActConfig
from mythos_dist.model import Mythos, MythosConfig


@pytest.fixture(scope="session")
def build() -> Callable[..., Mythos]:
    """A function: changed settings of a small config in train mode -> a model whose matrices nearly preserve norms."""

    @torch.no_grad()
    def build_model(act: ActConfig | None = None, **changes) -> Mythos:
        settings = dict(
            vocab_size=40, dim=32, n_heads=4, n_kv_heads=2, max_seq_len=64, max_loop_iters=4, prelude_layers=1,
            coda_layers=1, kv_lora_rank=12, q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
            n_experts=6, n_shared_experts=1, n_experts_per_tok=2, expert_dim=16, lora_rank=4,
        )  # fmt: skip
        model = Mythos(MythosConfig(**settings | changes), act=act)
        generator = torch.Generator().manual_seed(0)
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.2 * noise if value.dim() == 1 else 0.7 * noise / value.shape[-1] ** 0.5)
        return model.eval()

    return build_model


@pytest.fixture(scope="session")
def model(build) -> Mythos:
    return build()
