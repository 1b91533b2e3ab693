"""Rotary positions beyond the trained length: frequencies, factors and attention are those of transformers."""

import math

import pytest
import torch
from helpers.selection import first_is_quick
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mythos_dist.config.schema import BY_MODE, MythosConfig, RopeScaling
from mythos_dist.model import KVCache, Mythos
from mythos_dist.model.attention import GQAttention, MLAttention, build_context
from mythos_dist.model.rope import (
    from_hugging_face,
    query_factor,
    rope_frequencies,
    softmax_scale,
    to_hugging_face,
)
from mythos_dist.parallel.mesh import SINGLE

DEEPSEEK = {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
SCALINGS = {
    "linear": {"kind": "linear", "factor": 4.0, "original_max_seq_len": 16},
    "yarn": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16},
    "DeepSeek-V3": DEEPSEEK,
    "other mscales": DEEPSEEK | {"mscale": 0.707, "mscale_all_dim": 1.3},
}


def config_of(scaling, **changes) -> MythosConfig:
    """A model of 64 tokens, four times those of `scaling`."""
    settings = dict(
        vocab_size=40, dim=32, n_heads=4, n_kv_heads=2, max_seq_len=64, max_loop_iters=2, prelude_layers=1,
        coda_layers=1, kv_lora_rank=12, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        n_experts=4, n_experts_per_tok=2, expert_dim=16, lora_rank=4, rope_theta=100.0, rope_scaling=scaling,
    )  # fmt: skip
    return MythosConfig(**settings | changes)


@st.composite
def scalings(draw) -> RopeScaling:
    """Any scaling that the config accepts for a context of factor x original_max_seq_len."""
    settings: dict = {
        "kind": draw(st.sampled_from(["linear", "yarn", "yarn", "yarn", "llama3"])),
        "original_max_seq_len": draw(st.integers(1, 1 << 17)),
        "factor": draw(st.floats(1, 64)),
    }
    if settings["kind"] == "llama3":  # transformers has no defaults for these
        low = draw(st.floats(0.1, 8))
        settings |= {"low_freq_factor": low, "high_freq_factor": low * draw(st.floats(1.5, 8))}
    if settings["kind"] == "yarn":
        optional = {
            "beta_fast": st.floats(8, 64),
            "beta_slow": st.floats(0.1, 8),
            "truncate": st.booleans(),
            "attention_factor": st.floats(0.5, 2),
            "mscale_all_dim": st.floats(0.1, 2),
        }
        settings |= {name: draw(values) for name, values in optional.items() if draw(st.booleans())}
        if "mscale_all_dim" in settings and draw(st.booleans()):
            settings["mscale"] = draw(st.floats(0.1, 2))
    return RopeScaling(**settings)


# llama3: 1.08e-6 of the scaled frequency
ROUNDED = RopeScaling("llama3", factor=12.0, original_max_seq_len=4604, low_freq_factor=2.0, high_freq_factor=4.0)


@example(scaling=ROUNDED, pairs=53, theta=748774.0)
@given(scaling=scalings(), pairs=st.integers(1, 64), theta=st.floats(1.5, 1e7))
def test_frequencies_and_attention_factor_equal_transformers(scaling, pairs, theta):
    """To 1e-6 relative: only the order of two products differs in fp32. With llama3 the share of a frequency that is
    kept is a difference of nearly equal numbers, so its error is one of the frequency before it is scaled."""
    from transformers import PretrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    longest = round(scaling.factor * scaling.original_max_seq_len)
    assume(longest <= 1 << 30)
    ours = config_of(scaling, attn_type="mla", qk_rope_head_dim=2 * pairs, rope_theta=theta, max_seq_len=longest)
    theirs = PretrainedConfig(
        rope_theta=theta, head_dim=2 * pairs, hidden_size=32, num_attention_heads=4, max_position_embeddings=longest,
        rope_scaling=to_hugging_face(scaling),
    )  # fmt: skip
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling.kind](theirs, torch.device("cpu"))
    unscaled = theta ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    errors = (rope_frequencies(ours).double() - frequencies.double()).abs()
    limit = 2e-6 * unscaled if scaling.kind == "llama3" else 1e-6 * frequencies.double()
    assert (errors <= limit).all()
    assert math.sqrt(query_factor(ours)) == pytest.approx(factor, rel=1e-6)
    assert RopeScaling(**from_hugging_face(to_hugging_face(scaling))) == scaling


def theirs_of(config: MythosConfig, **settings):
    """Settings of transformers' models for `config`."""
    return dict(
        hidden_size=config.dim, num_attention_heads=config.n_heads, rope_theta=config.rope_theta,
        max_position_embeddings=config.max_seq_len, rope_scaling=to_hugging_face(config.rope_scaling),
        attn_implementation="eager", **settings,
    )  # fmt: skip


def causal(S: int) -> torch.Tensor:
    return torch.full((1, 1, S, S), -torch.inf).triu(1)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the order of summation: fp32, relative to the largest element."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))


def drawn(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a module, all of which matter."""
    generator = torch.Generator().manual_seed(5)
    return {key: 0.3 * torch.randn(value.shape, generator=generator) for key, value in module.state_dict().items()}


@pytest.mark.launch  # a second of imports per class of transformers
@pytest.mark.parametrize("name", SCALINGS)
def test_mla_with_scaling_is_the_attention_of_deepseek_v3(name):
    """Its scores are multiplied by mscale_all_dim's factor squared, rotary channels by the attention factor."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3Attention,
        DeepseekV3Config,
        DeepseekV3RotaryEmbedding,
    )

    config = config_of(SCALINGS[name], **BY_MODE["reference"])
    theirs_config = DeepseekV3Config(
        **theirs_of(config), num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=12, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, rope_interleave=True,
    )  # fmt: skip
    theirs, ours = DeepseekV3Attention(theirs_config, 0), MLAttention(config, SINGLE)
    names = {
        "q_a_proj": "q_down", "q_a_layernorm": "q_norm", "q_b_proj": "q_up", "kv_a_proj_with_mqa": "kv_down",
        "kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_up", "o_proj": "wo",
    }  # fmt: skip
    state = {f"{names[key.split('.')[0]]}.weight": value for key, value in drawn(theirs).items()}
    ours.load_state_dict(state)
    theirs.load_state_dict({f"{their}.weight": state[f"{our}.weight"] for their, our in names.items()})
    x = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(64).unsqueeze(0)
    cos_and_sin = DeepseekV3RotaryEmbedding(theirs_config)(x, positions)
    expected, _ = theirs(x, position_embeddings=cos_and_sin, attention_mask=causal(64))
    context = build_context(config, torch.Size([2, 64]), torch.device("cpu"))
    close(ours(x, context, "prelude.0")[0], expected)


@pytest.mark.launch
@pytest.mark.parametrize("name", ["linear", "yarn", "other mscales"])
def test_gqa_with_scaling_is_the_attention_of_llama(name):
    """Which rotates channel i with channel i + d / 2; ours are neighbors."""
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRotaryEmbedding

    config = config_of(SCALINGS[name], attn_type="gqa", **BY_MODE["reference"])
    theirs_config = LlamaConfig(**theirs_of(config), num_key_value_heads=2)
    theirs, ours = LlamaAttention(theirs_config, 0), GQAttention(config, SINGLE)
    state = drawn(ours)
    ours.load_state_dict(state)
    order = torch.cat([torch.arange(0, 8, 2), torch.arange(1, 8, 2)])
    rotated = {key: state[f"{key}.weight"].view(-1, 8, 32)[:, order].flatten(0, 1) for key in ("wq", "wk")}
    theirs.load_state_dict(
        {
            "q_proj.weight": rotated["wq"],
            "k_proj.weight": rotated["wk"],
            "v_proj.weight": state["wv.weight"],
            "o_proj.weight": state["wo.weight"],
        }
    )
    x = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    cos_and_sin = LlamaRotaryEmbedding(theirs_config)(x, torch.arange(64).unsqueeze(0))
    expected, _ = theirs(x, position_embeddings=cos_and_sin, attention_mask=causal(64))
    context = build_context(config, torch.Size([2, 64]), torch.device("cpu"))
    close(ours(x, context, "prelude.0")[0], expected)


@pytest.mark.parametrize("name", first_is_quick(SCALINGS))
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_decoding_with_a_cache_equals_one_pass(enliven, name, attn_type, qk_norm):
    """MLA attends to cached latents, whose scores have a scale of their own in the code."""
    config = config_of(SCALINGS[name], attn_type=attn_type, qk_norm=qk_norm)
    model = enliven(Mythos(config)).eval()
    with torch.no_grad():
        input_ids = torch.randint(40, (2, 60), generator=torch.Generator().manual_seed(1))
        cache, parts = KVCache(), []
        for part in (input_ids[:, :40], *input_ids[:, 40:].split(1, dim=1)):
            parts.append(model(part, 2, cache=cache))
        expected = model(input_ids, 2)
        unscaled = Mythos(config_of(None, attn_type=attn_type, qk_norm=qk_norm)).eval()
        unscaled.load_state_dict(model.state_dict())
        difference = (unscaled(input_ids, 2) - expected).abs().max()
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
    assert difference > 1e-2, "the scaling changes nothing here, so the test would not see it missing"


def test_without_scaling_scale_and_factor_are_those_of_plain_attention():
    for attn_type, width in (("gqa", 8), ("mla", 16)):
        config = config_of(None, attn_type=attn_type)
        assert softmax_scale(config) == width**-0.5 and query_factor(config) == 1.0
