"""A looped block of several layers (model.loop_layers): what is per loop, and what each layer has of its own.

References: the layers applied one after the other, formulas by hand, passes without a cache. Equality with
transformers' Llama is tested in test_loop_switches.py, every layout in the parity grid.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.kv_cache import elements_per_token
from torch import Tensor

from mythos_dist.config.schema import ActConfig, ExpertsConfig, MythosConfig
from mythos_dist.errors import UserError
from mythos_dist.model import KVCache, Mythos
from mythos_dist.model.kv_cache import cache_bytes_per_token

SMALL: dict[str, Any] = dict(
    vocab_size=40, dim=32, n_heads=4, n_kv_heads=2, max_seq_len=64, prelude_layers=1, coda_layers=1, kv_lora_rank=12,
    q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_experts=6, n_experts_per_tok=2,
    n_shared_experts=1, expert_dim=16, lora_rank=4, max_loop_iters=4,
)  # fmt: skip
LAYERS = ("recurrent.block", "recurrent.blocks.1", "recurrent.blocks.2")
OFF = ActConfig(mode="off")


def tokens(*shape: int) -> Tensor:
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(3))


def record_calls(model: Mythos, layer: str, part: str) -> list[tuple[Any, Any]]:
    """The inputs and outputs of a part of a looped layer, call by call."""
    calls: list[tuple[Any, Any]] = []
    model.get_submodule(f"{layer}.{part}").register_forward_hook(lambda _, *call: calls.append(call))  # type: ignore[arg-type]
    return calls


def test_layers_follow_each_other_and_the_rest_is_once_per_loop(enliven: Callable):
    """h after three loops against h = decay * h + scale * B e + lora(layer 2(layer 1(layer 0(norm(h + e)))))."""
    model = enliven(Mythos(MythosConfig(**SMALL, loop_layers=3), act=OFF))
    ids, recurrent = tokens(2, 9), model.recurrent
    with torch.no_grad():
        context = model.context(ids)
        e = recurrent.e_norm(model.prelude["0"](model.embed.lookup(ids), context, "prelude.0"))
        decay, scale, injected = recurrent.injection(e)
        h = torch.zeros_like(e)
        for t in range(3):
            u = recurrent.norm(h + e)
            for layer in LAYERS:
                u = model.get_submodule(layer)(u, context, "any")[0]
            h = decay * h + scale * injected + recurrent.lora(u, t)
        logits = model.embed.logits(model.norm(model.coda["0"](h, context, "coda.0")))
        torch.testing.assert_close(model(ids, 3), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["mla", "gqa"])
@pytest.mark.parametrize("sharing", ["all", "every:2", "first"])
def test_each_layer_has_its_own_keys_and_cache_entries(sharing, attention, enliven: Callable):
    """Loops that share keys get what the same layer has computed; cached passes equal the pass over all tokens, and the
    cache holds what the plan says."""
    config = MythosConfig(**SMALL, loop_layers=3, kv_sharing=sharing, attn_type=attention)
    model = enliven(Mythos(config, act=OFF)).eval()
    ids, calls = tokens(2, 10), [record_calls(model, layer, "attn") for layer in LAYERS]
    with torch.no_grad():
        expected = model(ids, 4)
        for of_layer in calls:
            for t, (inputs, (_, own)) in enumerate(of_layer):
                first = t - t % {"all": 1, "every:2": 2, "first": 4}[sharing]
                assert (inputs[3] is None) == (first == t)
                if first != t:
                    assert torch.equal(inputs[3].kv, of_layer[first][1][1]) and own is not None
        cache = KVCache()
        parts = [model(part, 4, cache=cache) for part in ids.split([4, 1, 5], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
    elements = sum(elements_per_token(cache).values())
    assert elements == cache_bytes_per_token(config, 4, element_bytes=1)


def test_each_router_has_its_own_load_and_auxiliary_loss(enliven: Callable):
    """The z-loss is a sum over layers and a mean over loops; biases follow the tokens that the layer's router chose."""
    experts = ExpertsConfig(z_loss=0.3, bias_update_rate=0.125)
    model = enliven(Mythos(MythosConfig(**SMALL, loop_layers=3), act=OFF, experts=experts))
    routers: list[Any] = [model.get_submodule(f"{layer}.ffn.router") for layer in LAYERS]
    for i, router in enumerate(routers):
        router.bias.zero_()
        router.bias[i] = 100.0  # all tokens choose this expert
    calls, ids = [record_calls(model, layer, "ffn.router") for layer in LAYERS], tokens(2, 8)
    out: Any = model(ids, 3, labels=ids)
    squares = [
        (inputs[0].flatten(0, 1) @ router.weight.T).logsumexp(-1).square().mean()
        for router, of_layer in zip(routers, calls, strict=True)
        for inputs, _ in of_layer
    ]
    auxiliary = float(out["objective"].detach() - out["cross_entropy"])
    assert auxiliary == pytest.approx(0.3 * float(sum(squares)) / 3, rel=1e-4)

    chosen = [torch.stack([index.flatten().bincount(minlength=6) for _, (_, index, _) in calls[i]]) for i in range(3)]
    assert torch.equal(out["expert_counts"], torch.cat(chosen, dim=1))
    before = [router.bias.clone() for router in routers]
    model.update_router_bias(out["expert_counts"])
    for router, old, counts in zip(routers, before, chosen, strict=True):
        load = counts.sum(0).double()
        assert torch.equal(router.bias, old + 0.125 * torch.sign(load.mean() - load).float())


@pytest.mark.parametrize("sharing", ["all", "every:2"])
def test_an_early_exit_fills_the_cache_of_every_layer(sharing, enliven: Callable):
    """Rows that exit by themselves, in a batch, get the tokens that they get alone."""
    config = MythosConfig(**SMALL, loop_layers=2, kv_sharing=sharing)
    model = enliven(Mythos(config, act=ActConfig(mode="safe"))).eval()
    ids = tokens(3, 6)
    settings: dict[str, Any] = dict(temperature=0, n_loops=4, exit="latent", exit_threshold=0.9)
    together = model.generate(ids, 8, **settings)
    assert torch.equal(together, torch.cat([model.generate(row, 8, **settings) for row in ids.split(1)]))


def test_one_layer_has_the_names_that_it_always_had():
    one, three = (set(Mythos(MythosConfig(**SMALL, loop_layers=n)).state_dict()) for n in (1, 3))
    assert not any("blocks" in name for name in one) and one < three
    added = {name.replace("recurrent.block.", f"{layer}.") for name in one for layer in LAYERS[1:] if ".block." in name}
    assert three - one == added


def test_layers_begin_with_different_values_of_the_right_size():
    """Output projections are divided for the depth of 1 + 4 * 2 + 1 layers."""
    sizes: dict[str, Any] = SMALL | dict(dim=128)
    state = Mythos(MythosConfig(**sizes, loop_layers=2)).state_dict()
    first, second = (state[f"{layer}.attn.wo.weight"] for layer in LAYERS[:2])
    assert not torch.equal(first, second)
    assert float(second.std()) == pytest.approx((2 / (5 * 128)) ** 0.5 / (2 * 10) ** 0.5, rel=0.05)


def test_open_mythos_has_one_looped_layer():
    with pytest.raises(UserError, match=r"model\.loop_layers=2 is not OpenMythos'.*model\.mode=train"):
        MythosConfig(**SMALL, loop_layers=2, mode="reference")
    others: dict[str, Any] = dict(
        loop_signal=True, injection="reference", initial_state="e", qk_norm=False, init="reference"
    )
    model = Mythos(MythosConfig(**SMALL, loop_layers=2, **others))
    with pytest.raises(UserError, match=r"do not work with model\.loop_layers=2; set .*model\.loop_layers=1"):
        model.load_open_mythos({})
