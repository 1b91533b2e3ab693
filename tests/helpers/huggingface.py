"""Small models of all kinds for tests of exports and of the class for transformers."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from mythos_dist.checkpoint.canonical import write_full_tensors
from mythos_dist.checkpoint.manifest import (
    BUFFER,
    PARAMETER,
    CheckpointManifest,
    Lineage,
    TensorEntry,
    library_versions,
)
from mythos_dist.config.schema import ActConfig, Config, MythosConfig
from mythos_dist.model import Mythos

SWITCHES = {
    "loop_signal": [False, True],
    "lora": ["shared", "per_loop", "none"],
    "injection": ["reference", "parcae", "none", "difference"],
    "initial_state": ["e", "zero", "random"],
    "qk_norm": [False, True],
    "kv_sharing": ["all", "all", "every:2", "first"],
    "residual_scale": ["init", "inverse_sqrt", "inverse"],
    "state_norm": [False, True],
    "loop_layers": [1, 1, 2, 3],
    "norm_eps": [1e-6, 1e-2],
    "tie_embeddings": [True, True, False],
    "dense_dim": [0, 24],
}
_YARN = {"kind": "yarn", "factor": 8, "original_max_seq_len": 8}
SCALINGS = [
    None,
    {"kind": "linear", "factor": 8, "original_max_seq_len": 8},
    _YARN,
    _YARN | {"mscale": 1, "mscale_all_dim": 1},
    _YARN | {"mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False, "beta_fast": 4},
    {"kind": "llama3", "factor": 4, "original_max_seq_len": 16, "low_freq_factor": 0.5, "high_freq_factor": 2.0},
    _YARN | {"attention_factor": 1.5, "beta_slow": 0.5},
]
WIDTHS: dict[str, Any] = {
    "vocab_size": 40,
    "dim": 32,
    "n_heads": 4,
    "max_seq_len": 64,
    "max_loop_iters": 3,
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "lora_rank": 4,
}


@st.composite
def model_settings(draw) -> tuple[MythosConfig, ActConfig]:
    """A small model in either mode, with any switches of the loops, any halting, and widths that align or do not."""
    mode = draw(st.sampled_from(["reference", "train", "train", "train"]))
    settings = WIDTHS | {
        "mode": mode,
        "attn_type": draw(st.sampled_from(["gqa", "mla"])),
        "n_kv_heads": draw(st.sampled_from([1, 2, 4])),
        "prelude_layers": draw(st.integers(0, 2)),
        "coda_layers": draw(st.integers(0, 2)),
        "qk_rope_head_dim": draw(st.sampled_from([2, 4])),
        "qk_nope_head_dim": draw(st.sampled_from([6, 8])),
        "v_head_dim": draw(st.sampled_from([6, 8, 14])),
        "n_experts": draw(st.integers(2, 7)),
        "n_experts_per_tok": draw(st.integers(1, 2)),
        "n_shared_experts": draw(st.integers(0, 2)),
        "expert_dim": draw(st.sampled_from([10, 16])),
        "act_threshold": draw(st.sampled_from([0.6, 0.99, 1.0])),
        "rope_theta": draw(st.sampled_from([10.0, 500000.0])),
        "rope_scaling": draw(st.sampled_from(SCALINGS)),
    }
    act = "reference"
    if mode == "train":
        settings |= {name: draw(st.sampled_from(values)) for name, values in SWITCHES.items()}
        if settings["attn_type"] == "gqa":
            settings |= {"gqa_head_dim": draw(st.sampled_from([0, 6, 12])), "qkv_bias": draw(st.booleans())}
            settings["key_norm_weight"] = settings["qk_norm"] and draw(st.booleans())
        if settings["injection"] in ("none", "difference"):
            settings["initial_state"] = "e"
        act = draw(st.sampled_from(["off", "safe", "ponder", "reference"]))
    return MythosConfig(**settings), ActConfig(mode=act)


@torch.no_grad()
def redraw(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights for which every parameter matters, as those of `tests/model/conftest.py`."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("norm.weight"):
            value.copy_(1 + 0.2 * noise)
        elif name.endswith("halt.bias"):
            value.fill_(-1.0)
        elif "injection" in name or value.dim() == 1:
            value.copy_(0.3 * noise)
        else:
            value.copy_(noise if "scale" in name else 0.7 * noise / value.shape[-1] ** 0.5)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Up to the order of summation: `tolerance` of the largest element."""
    scale = float(expected.detach().abs().max()) + 1e-6
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=tolerance)


def save_run(run_dir: Path, model: Mythos, config: Config, step: int = 7, tokens: int = 1234) -> Path:
    """A run whose only checkpoint has the weights of `model`; returns `run_dir`."""
    state = model.state_dict()
    parameters = dict(model.named_parameters())
    manifest = CheckpointManifest(
        step=step,
        tokens=tokens,
        start=1,
        layout={},
        config=asdict(config),
        data="",
        versions=library_versions(),
        optimizer={"steps": step, "skipped_steps": 0, "loss_scale": {}},
        tensors={
            name: TensorEntry(tuple(value.shape), (PARAMETER if name in parameters else BUFFER,))
            for name, value in state.items()
        },
        files={},
        lineage=Lineage(tokens=tokens),
    )

    def blocks(_: str, name: str) -> Iterator[memoryview]:
        yield state[name].contiguous().flatten().numpy().data

    write_full_tensors(run_dir, manifest, blocks, workers=1)
    return run_dir
