"""Fixtures: our model and the reference, with weights for which every parameter matters."""

from collections.abc import Callable
from dataclasses import asdict, fields

import pytest
import torch
from torch import nn

from mythos_dist.config.schema import BY_MODE, ActConfig
from mythos_dist.model import ExpertsConfig, Mythos, MythosConfig


@pytest.fixture(scope="session")
def build_reference(open_mythos) -> Callable[[MythosConfig], nn.Module]:
    """A function: config -> `open_mythos.OpenMythos` with the same settings."""
    names = {field.name for field in fields(open_mythos.main.MythosConfig)}

    def build(config: MythosConfig) -> nn.Module:
        settings = {name: value for name, value in asdict(config).items() if name in names}
        return open_mythos.main.OpenMythos(open_mythos.main.MythosConfig(**settings))

    return build


@pytest.fixture(scope="session")
def enliven() -> Callable[..., nn.Module]:
    """A function that redraws the weights of our model or the reference, and returns the model.

    At N(0, 0.02) attention is nearly uniform and the gradient of its queries is rounding noise. Here matrices nearly
    preserve the norm of their input, and norms, injection, router bias and halting differ between channels.
    """

    @torch.no_grad()
    def draw(model: nn.Module, seed: int = 0, halt_bias: float = -1.0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_complex():
                continue  # the reference's rotary tables
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("norm.weight"):
                value.copy_(1 + 0.2 * noise)
            elif name.endswith("halt.bias"):
                value.fill_(halt_bias)
            elif "injection" in name or value.dim() == 1:
                value.copy_(0.3 * noise)
            elif "scale" in name:
                value.copy_(noise)
            else:
                value.copy_(0.7 * noise / value.shape[-1] ** 0.5)
        return model

    return draw


@pytest.fixture(scope="session")
def build_pair(build_reference, enliven) -> Callable[..., tuple[Mythos, nn.Module]]:
    """A function: config -> (our model, the reference), with the same redrawn weights."""

    def build(
        config: MythosConfig,
        *,
        act: ActConfig | None = None,
        experts: ExpertsConfig | None = None,
        seed: int = 0,
        halt_bias: float = -1.0,
    ) -> tuple[Mythos, nn.Module]:
        reference = enliven(build_reference(config), seed, halt_bias)
        ours = Mythos(config, act=act, experts=experts)
        ours.load_open_mythos(reference.state_dict())
        return ours, reference

    return build


@pytest.fixture(scope="session")
def tiny() -> Callable[..., MythosConfig]:
    """A function: changed settings -> a small config, OpenMythos' except for its mode.

    Values are narrower than keys, as in 1b.
    """

    def config(**changes) -> MythosConfig:
        settings = {
            "attn_type": "mla",
            "vocab_size": 40,
            "dim": 32,
            "n_heads": 4,
            "n_kv_heads": 2,
            "max_seq_len": 64,
            "max_loop_iters": 3,
            "prelude_layers": 1,
            "coda_layers": 1,
            "kv_lora_rank": 12,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_experts": 6,
            "n_shared_experts": 1,
            "n_experts_per_tok": 2,
            "expert_dim": 16,
            "lora_rank": 4,
            **BY_MODE["reference"],
        }
        return MythosConfig(**settings | changes)

    return config
