"""OpenMythos' weights go into our model and come back."""

import pytest
import torch
import yaml

from mythos_dist.errors import UserError
from mythos_dist.model import Mythos, MythosConfig
from mythos_dist.model.open_mythos import from_open_mythos, to_open_mythos

SMALL = {
    "vocab_size": 31,
    "dim": 24,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_seq_len": 16,
    "max_loop_iters": 3,
    "prelude_layers": 1,
    "coda_layers": 2,
    "kv_lora_rank": 10,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "n_experts": 5,
    "n_experts_per_tok": 2,
    "expert_dim": 7,
    "lora_rank": 3,
    "mode": "reference",
}
CASES = [
    MythosConfig(**SMALL, attn_type=attn_type, n_shared_experts=shared)
    for attn_type in ("gqa", "mla")
    for shared in (0, 1, 3)
]
TABLES = {"freqs_cis", "freqs_cis_mla"}


@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.attn_type}-{c.n_shared_experts}")
def test_conversion_round_trip_is_exact(config, build_reference, enliven):
    """Names, shapes and values; only the rotary tables are dropped."""
    theirs = enliven(build_reference(config)).state_dict()
    back = to_open_mythos(from_open_mythos(theirs, config), config)
    assert back.keys() == theirs.keys() - TABLES
    for name, value in back.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.attn_type}-{c.n_shared_experts}")
def test_the_reference_runs_with_exported_weights(config, build_pair, build_reference, enliven):
    """Only rotary tables are missing; the logits are those of the model that the weights came from, bit for bit."""
    ours, source = build_pair(config)
    target = enliven(build_reference(config), seed=1)
    input_ids = torch.arange(8).view(1, 8)
    assert not torch.equal(target(input_ids), source(input_ids))
    result = target.load_state_dict(to_open_mythos(ours.state_dict(), config), strict=False)
    assert set(result.missing_keys) == TABLES
    assert result.unexpected_keys == []
    assert torch.equal(target(input_ids), source(input_ids))


@pytest.mark.parametrize(
    "name",
    [
        "recurrent.block.ffn.routed_experts.3.up.weight",
        "recurrent.block.ffn.shared_experts.1.down.weight",
        "recurrent.block.attn.q_up_rope.weight",
    ],
)
def test_a_missing_expert_or_projection_is_named(name, build_reference):
    config = MythosConfig(**SMALL, attn_type="mla")
    state = build_reference(config).state_dict()
    del state[name]
    with pytest.raises(UserError, match=name):
        from_open_mythos(state, config)


def test_weights_are_rejected_by_a_model_with_unsupported_loop_settings(build_reference):
    """The weights would load but compute something else: the error lists the settings to change."""
    state = build_reference(MythosConfig(**SMALL)).state_dict()
    with pytest.raises(UserError) as caught:
        Mythos(MythosConfig(**SMALL | {"mode": "train", "injection": "reference"})).load_open_mythos(state)
    message = str(caught.value)
    assert "do not work with model.loop_signal=false, model.initial_state=zero, model.qk_norm=true;" in message
    settings = message.split("; set ")[1].split(" to train")[0].split()
    loops = {key[6:]: yaml.safe_load(value) for key, value in (one.split("=") for one in settings)}
    Mythos(MythosConfig(**SMALL | {"mode": "train"} | loops)).load_open_mythos(state)


@pytest.mark.parametrize(
    ("name", "ours_called"),
    [
        ("prelude.0.attn_norm.weight", "prelude.0.attn_norm.weight"),
        ("recurrent.block.ffn.router_bias", "recurrent.block.ffn.router.bias"),
        ("embed.weight", "embed.weight"),
    ],
)
def test_any_missing_tensor_raises_a_user_error(name, ours_called, build_pair):
    ours, reference = build_pair(MythosConfig(**SMALL))
    state = reference.state_dict()
    del state[name]
    with pytest.raises(UserError, match=ours_called):
        ours.load_open_mythos(state)


@pytest.mark.parametrize(
    "change",
    [
        {"n_experts": 4},
        {"n_experts": 6},
        {"n_heads": 3},
        {"vocab_size": 30},
        {"prelude_layers": 2},
        {"n_shared_experts": 1},
    ],
)
def test_weights_of_another_config_raise_a_user_error(change, build_pair, build_reference):
    """Too many experts, too few, heads that do not divide, another vocabulary, missing and superfluous layers."""
    ours, _ = build_pair(MythosConfig(**SMALL | change))
    with pytest.raises(UserError, match=r"model\.\*"):
        ours.load_open_mythos(build_reference(MythosConfig(**SMALL)).state_dict())
