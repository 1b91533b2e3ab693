"""Switches that change what a loop computes or is trained for: injection=none, residual_scale, state_norm, fixed_point.

References: transformers' Llama, whose layers have the block's weights; formulas written out by hand.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mythos_dist.config.rules import problems
from mythos_dist.config.schema import ActConfig, Config, LoopsConfig, MythosConfig
from mythos_dist.errors import UserError
from mythos_dist.model import Mythos
from mythos_dist.model.loops import Loops

# Every block has the same dense FFN: one expert, whose gate is 1.
DENSE: dict[str, Any] = dict(
    attn_type="gqa", vocab_size=40, dim=24, n_heads=4, n_kv_heads=2, max_seq_len=32, prelude_layers=1, coda_layers=1,
    n_experts=1, n_experts_per_tok=1, n_shared_experts=0, expert_dim=32, rope_theta=100.0,
)  # fmt: skip
PLAIN: dict[str, Any] = dict(injection="none", lora="none", qk_norm=False)


def llama_of(model: Mythos, n_loops: int, factor: float) -> Any:
    """transformers' Llama with the same layers, the looped block once for each loop, its outputs times `factor`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    settings = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim,
        num_hidden_layers=2 + n_loops * c.loop_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, max_position_embeddings=c.max_seq_len,
        rope_theta=c.rope_theta, rms_norm_eps=c.norm_eps, tie_word_embeddings=True,
    )  # fmt: skip
    ours = model.state_dict()
    theirs = {"model.embed_tokens.weight": ours["embed.weight"], "model.norm.weight": ours["norm.weight"]}
    head_dim = c.dim // c.n_heads

    def halves(weight: Tensor) -> Tensor:
        """Rotated pairs are adjacent here, and half a head apart in Llama."""
        return weight.view(-1, head_dim // 2, 2, c.dim).transpose(1, 2).reshape(weight.shape)

    looped = ["recurrent.block", *(f"recurrent.blocks.{i}" for i in range(1, c.loop_layers))]
    for i, layer in enumerate(["prelude.0", *looped * n_loops, "coda.0"]):
        experts = layer in looped
        for name, own in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            weight = ours[f"{layer}.ffn.experts.{own}"][0] if experts else ours[f"{layer}.ffn.{name}.weight"]
            if experts and name == "down":
                weight = weight.T * factor
            theirs[f"model.layers.{i}.mlp.{name}_proj.weight"] = weight
        for name in "qkvo":
            weight = ours[f"{layer}.attn.w{name}.weight"]
            if name in "qk":
                weight = halves(weight)
            elif name == "o" and experts:
                weight = weight * factor
            theirs[f"model.layers.{i}.self_attn.{name}_proj.weight"] = weight
        theirs[f"model.layers.{i}.input_layernorm.weight"] = ours[f"{layer}.attn_norm.weight"]
        theirs[f"model.layers.{i}.post_attention_layernorm.weight"] = ours[f"{layer}.ffn_norm.weight"]
    llama = LlamaForCausalLM(settings)
    missing, unexpected = llama.load_state_dict(theirs, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied to the embedding
    return llama.eval()


@pytest.mark.parametrize(
    ("n_loops", "layers", "scale", "factor"),
    [
        (1, 1, "init", 1),
        (3, 1, "init", 1),
        (3, 1, "inverse", 1 / 3),
        (4, 1, "inverse_sqrt", 0.5),
        (1, 2, "init", 1),
        (2, 3, "init", 1),
        (3, 2, "inverse", 1 / 3 / 2**0.5),
        (4, 4, "inverse_sqrt", 0.25),
    ],
)
def test_without_injection_it_is_a_llama_whose_layers_share_weights(n_loops, layers, scale, factor, enliven: Callable):
    """With one loop a plain transformer, for any number of looped layers. Residuals are scaled as if output projections
    were smaller."""
    config = MythosConfig(**DENSE, **PLAIN, max_loop_iters=n_loops, residual_scale=scale, loop_layers=layers)
    model = enliven(Mythos(config, act=ActConfig(mode="off"))).eval()
    ids = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = llama_of(model, n_loops, factor)(ids).logits
        torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.generate(ids[:, :4], 6, temperature=0)[:, 4:], greedy(model, ids[:, :4], 6))


def test_width_of_dense_ffns_and_epsilon_of_norms_are_llamas(enliven: Callable):
    """An epsilon as large as the mean squares, so that a norm without it would be another."""
    config = MythosConfig(**DENSE | dict(expert_dim=20), **PLAIN, max_loop_iters=1, dense_dim=20, norm_eps=0.3)
    model = enliven(Mythos(config, act=ActConfig(mode="off"))).eval()
    ids = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), llama_of(model, 1, 1)(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_difference_is_injected_from_the_second_loop_on(enliven: Callable):
    """Against h = block(h + b * (e - h)); the first loop is exactly that of a model without injection, for any b."""
    config = MythosConfig(**DENSE, **PLAIN | dict(injection="difference"), max_loop_iters=3, loop_layers=2)
    assert not Mythos(config).recurrent.injection.B.any(), "0 at first: a loop repeats the block"
    model = enliven(Mythos(config, act=ActConfig(mode="off"))).eval()
    plain = Mythos(MythosConfig(**DENSE, **PLAIN, max_loop_iters=3, loop_layers=2), act=ActConfig(mode="off")).eval()
    plain.load_state_dict({k: value for k, value in model.state_dict().items() if "injection" not in k})
    ids = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(ids, 1), plain(ids, 1))
        context, recurrent = model.context(ids), model.recurrent
        e = model.prelude["0"](model.embed.lookup(ids), context, "prelude.0")
        h = e
        for _ in range(3):
            h = (1 - recurrent.injection.B) * h + recurrent.injection.B * e
            for layer in recurrent.layers:
                h = layer(h, context, "any")[0]
        logits = model.embed.logits(model.norm(model.coda["0"](h, context, "coda.0")))
        torch.testing.assert_close(model(ids, 3), logits, rtol=1e-4, atol=1e-4)


def greedy(model: Mythos, ids: Tensor, new: int) -> Tensor:
    """The most probable next tokens, each from a pass over all tokens before it."""
    start = ids.shape[1]
    for _ in range(new):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids[:, start:]


def test_without_injection_the_prelude_is_the_initial_state():
    assert MythosConfig(**DENSE, **PLAIN).initial_state == "e"
    for injection in ("none", "difference"):
        message = rf"model\.initial_state=zero with model\.injection={injection}.*initial_state=e"
        with pytest.raises(UserError, match=message):
            MythosConfig(**DENSE, **PLAIN | dict(injection=injection), initial_state="zero")


def test_scaled_residuals_need_no_small_initial_values():
    """Output projections of the looped block are as large as its other matrices, those of other blocks divided."""
    sizes: dict[str, Any] = DENSE | dict(dim=128, max_loop_iters=6)
    for scale, divided in (("init", True), ("inverse", False)):
        settings: dict[str, Any] = sizes | dict(residual_scale=scale)
        state = Mythos(MythosConfig(**settings)).state_dict()
        full, divisor = (2 / (5 * 128)) ** 0.5, (2 * (1 + 6 + 1)) ** 0.5
        expected = {"recurrent.block": full / divisor if divided else full, "coda.0": full / divisor}
        for block, std in expected.items():
            assert float(state[f"{block}.attn.wo.weight"].std()) == pytest.approx(std, rel=0.05)


def states_after(model: Mythos, ids: Tensor, n_loops: int) -> Tensor:
    """h (B, S, D) after the last of n loops."""
    states = []
    hook = model.recurrent.register_forward_hook(lambda module, inputs, output: states.append(output[0].h))
    model(ids, n_loops)
    hook.remove()
    return states[0]


def test_normed_states_have_an_rms_of_1_after_every_loop(enliven: Callable):
    """Against the block alone, applied to what it returned divided by its RMS."""
    model = enliven(Mythos(MythosConfig(**DENSE, **PLAIN, max_loop_iters=2, state_norm=True)))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        context = model.context(ids)
        h = model.prelude["0"](model.embed.lookup(ids), context, "prelude.0")
        for _ in range(3):
            u = model.recurrent.block(h, context, "recurrent")[0]
            h = u / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(states_after(model, ids, 3), h, rtol=1e-5, atol=1e-5)


def test_the_fixed_point_penalty_follows_its_formula(enliven: Callable):
    """Value and gradient, against the states of two passes; of sequences with other numbers of loops their mean."""
    config = MythosConfig(**DENSE, lora="none", max_loop_iters=4)
    model = enliven(Mythos(config, act=ActConfig(mode="off"), fixed_point=0.5))
    ids = torch.arange(24).view(3, 8)

    def gradient(objective: Tensor) -> Tensor:
        names, parameters = zip(*model.named_parameters(), strict=True)
        found = torch.autograd.grad(objective, parameters, allow_unused=True)
        return found[names.index("recurrent.block.attn.wv.weight")]

    def penalty(row: int, n_loops: int) -> Tensor:
        if n_loops == 1:
            return torch.zeros(())
        last, previous = (states_after(model, ids[row : row + 1], n) for n in (n_loops, n_loops - 1))
        return ((last - previous) ** 2).sum(-1).div((last**2).sum(-1).detach()).mean()

    for depths in ([4, 4, 4], [3, 1, 4]):
        loops = Loops(4, depths=None if depths == [4, 4, 4] else torch.tensor(depths))
        added = model(ids, labels=ids, loops=loops)["objective"] - objective_without_penalty(model, ids, loops)
        expected = 0.5 * torch.stack([penalty(row, depth) for row, depth in enumerate(depths)]).mean()
        assert float(expected.detach()) > 1e-3
        torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient(added), gradient(expected), rtol=1e-3, atol=1e-6)


def objective_without_penalty(model: Mythos, ids: Tensor, loops: Loops) -> Tensor:
    """The objective of the same parameters without the penalty."""
    weight, model.recurrent.fixed_point = model.recurrent.fixed_point, 0.0
    objective = model(ids, labels=ids, loops=loops)["objective"]
    model.recurrent.fixed_point = weight
    return objective


def test_switches_without_effect_and_other_models_are_refused():
    found = problems(Config(model=MythosConfig(), loops=LoopsConfig(mean=1, fixed_point=0.1)))
    assert any("loops.fixed_point=0.1 has no effect with one loop" in line for line in found)
    found = problems(Config(model=MythosConfig(injection="none"), loops=LoopsConfig(mean=4, backprop=2)))
    assert any("loops.backprop=2 with model.injection=none" in line for line in found)
    changes: list[dict[str, Any]] = [dict(residual_scale="inverse"), dict(state_norm=True)]
    for change in changes:
        with pytest.raises(UserError, match=r"is not OpenMythos', which model\.mode=reference requires"):
            MythosConfig(mode="reference", **change)
        with pytest.raises(UserError, match="OpenMythos' weights do not work with"):
            Mythos(MythosConfig(**DENSE, **change)).load_open_mythos({})
