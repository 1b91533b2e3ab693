"""Keys and values that loops share (model.kv_sharing): attention and gradients, depths, caches, recomputation.

References: the looped block's attention written out with an explicit mask, finite differences, passes of the same
model.
"""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.kv_cache import elements_per_token
from helpers.selection import examples, first_is_quick
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mythos_dist.config.compare import differences
from mythos_dist.config.rules import problems
from mythos_dist.config.schema import ActConfig, Config, LoopsConfig, MythosConfig
from mythos_dist.errors import UserError
from mythos_dist.model import KVCache, Mythos
from mythos_dist.model.kv_cache import cache_bytes_per_token
from mythos_dist.model.loop_recorder import LoopRecorder
from mythos_dist.model.loops import Loops
from mythos_dist.model.recompute import Recompute
from mythos_dist.parallel.mesh import SINGLE

SHARING = ("every:2", "every:3", "first")
ATTENTIONS = ("mla", "gqa")


def tokens(config: MythosConfig, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: Mythos, objective: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    objective.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def rms(x: Tensor, weight: Tensor | float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """Adjacent pairs of the channels of x (B, S, H, R), by position / theta^(2i / R)."""
    S, R = x.shape[1], x.shape[3]
    angle = torch.arange(S).view(S, 1, 1) / theta ** (torch.arange(0, R, 2) / R)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1).flatten(-2)


def attention_by_hand(model: Mythos, x: Tensor, x_of_keys: Tensor) -> Tensor:
    """The looped block's attention, with queries of x and keys and values of another loop's x (B, S, D)."""
    c, attn = model.config, model.recurrent.block.attn
    B, S, _ = x.shape
    weights = dict(attn.named_parameters())
    query_norm = weights["qk_norm.weight"]
    if c.attn_type == "gqa":
        q = rotate(rms((x @ weights["wq.weight"].T).view(B, S, c.n_heads, -1), query_norm), c.rope_theta)
        k = rotate(rms((x_of_keys @ weights["wk.weight"].T).view(B, S, c.n_kv_heads, -1), 1.0), c.rope_theta)
        v = (x_of_keys @ weights["wv.weight"].T).view(B, S, c.n_kv_heads, -1)
        k, v = (part.repeat_interleave(c.n_heads // c.n_kv_heads, dim=2) for part in (k, v))
    else:
        q = rms(x @ weights["q_down.weight"].T, weights["q_norm.weight"]) @ weights["q_up.weight"].T
        q = rms(q.view(B, S, c.n_heads, -1), query_norm)
        nope = c.qk_nope_head_dim
        q = torch.cat([q[..., :nope], rotate(q[..., nope:], c.rope_theta)], -1)
        latent, rotary = (x_of_keys @ weights["kv_down.weight"].T).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        up = (rms(latent, weights["kv_norm.weight"]) @ weights["kv_up.weight"].T).view(B, S, c.n_heads, -1)
        rotary = rotate(rotary.unsqueeze(2), c.rope_theta).expand(-1, -1, c.n_heads, -1)
        k, v = rms(torch.cat([up[..., :nope], rotary], -1), 1.0), up[..., nope:]
    scores = torch.einsum("bshd,bthd->bhst", q, k) / q.shape[-1] ** 0.5
    scores = scores + torch.full((S, S), -torch.inf).triu(1)
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v).flatten(2) @ weights["wo.weight"].T


def loops_by_hand(model: Mythos, ids: Tensor, n_loops: int, group: int) -> Tensor:
    """The logits; the first of every `group` loops has the input of the keys and values of all of them."""
    block, recurrent = model.recurrent.block, model.recurrent
    e = h = model.prelude["0"](model.embed.weight[ids], model.context(ids), "")
    decay = torch.exp(-torch.exp(recurrent.injection.log_dt + recurrent.injection.log_A))
    inputs: list[Tensor] = []
    for t in range(n_loops):
        x = rms(h + e, recurrent.norm.weight)
        inputs.append(rms(x, block.attn_norm.weight))
        x = x + attention_by_hand(model, inputs[t], inputs[t // group * group])
        x = x + block.ffn(rms(x, block.ffn_norm.weight))[0]
        h = decay * h + recurrent.injection.B * e + x
    out = model.coda["0"](h, model.context(ids), "")
    return rms(out, model.norm.weight) @ model.embed.weight.T


@pytest.mark.parametrize("attn_type", ATTENTIONS)
@pytest.mark.parametrize(("sharing", "group"), [("all", 1), ("every:2", 2), ("every:3", 3), ("first", 100)])
def test_loops_attend_to_the_keys_of_their_groups_first_loop(attn_type, sharing, group, tiny, enliven):
    """Logits and gradients of five loops against the loops written out."""
    config = tiny(attn_type=attn_type, kv_sharing=sharing, qk_norm=True, lora="none", loop_signal=False)
    model = enliven(Mythos(config, act=ActConfig(mode="off")))
    ids, labels = tokens(config, 2, 9), tokens(config, 2, 9, seed=1)
    expected = loops_by_hand(model, ids, 5, group)
    torch.testing.assert_close(model(ids, 5), expected, rtol=1e-4, atol=1e-4)
    ours = gradients(model, model(ids, 5, labels=labels)["objective"])
    theirs = gradients(model, F.cross_entropy(expected.flatten(0, 1), labels.flatten()))
    ours = {name: gradient for name, gradient in ours.items() if "act.halt" not in name}  # zeros: it is off
    assert_equal_gradients(ours, theirs)
    if sharing != "all":
        other = model(ids, 5) - loops_by_hand(model, ids, 5, 1)
        assert other.abs().max() > 0.01, "sharing makes a difference"


@pytest.mark.parametrize("attn_type", first_is_quick(ATTENTIONS))
@pytest.mark.parametrize("sharing", SHARING)
def test_gradients_equal_finite_differences(attn_type, sharing, tiny, enliven):
    """Of all weights of the looped block's attention, along a random direction; every expert is chosen, so the loss is
    smooth. fp32, so 1 %."""
    config = tiny(attn_type=attn_type, kv_sharing=sharing, qk_norm=True, n_experts_per_tok=6)
    model = enliven(Mythos(config, act=ActConfig(mode="safe")))
    ids, generator = tokens(config, 2, 8), torch.Generator().manual_seed(1)
    got = gradients(model, model(ids, 5, labels=ids)["objective"])
    for name, parameter in model.recurrent.block.attn.named_parameters():
        gradient = got[f"recurrent.block.attn.{name}"]
        # Half along the gradient: along a random direction alone the difference may be as small as rounding errors.
        noise = torch.randn(parameter.shape, generator=generator)
        direction = gradient / gradient.norm() + noise / noise.norm()
        step, losses = 3e-3 * parameter.detach().norm(), []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
                losses.append(model(ids, 5, labels=ids)["objective"].double())
                parameter -= sign * step * direction
        difference = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close(difference.float(), (gradient * direction).sum(), rtol=1e-2, atol=1e-5, msg=name)


@pytest.mark.parametrize("attn_type", ATTENTIONS)
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("no_grad", first_is_quick([2, 0]))
def test_a_group_follows_each_sequences_own_loops(attn_type, sharing, no_grad, tiny, enliven):
    """A batch whose sequences have 2, 5 and 4 loops, against each sequence with that many: loss and gradients."""
    model = enliven(Mythos(tiny(attn_type=attn_type, kv_sharing=sharing), act=ActConfig(mode="off")))
    ids, labels = tokens(model.config, 3, 8), tokens(model.config, 3, 8, seed=1)
    depths = [2, 5, 4]
    combined = model(ids, labels=labels, loops=Loops(5, no_grad, torch.tensor(depths)))["objective"]
    got = gradients(model, combined)
    alone = []
    for row, depth in enumerate(depths):
        loops, one = Loops(depth, max(0, depth - (5 - no_grad))), slice(row, row + 1)
        alone.append(model(ids[one], labels=labels[one], loops=loops)["objective"])
    mean = torch.stack(alone).mean()
    torch.testing.assert_close(combined, mean, rtol=1e-5, atol=0)
    assert_equal_gradients(got, gradients(model, mean))


@pytest.mark.parametrize("attn_type", first_is_quick(ATTENTIONS))
@pytest.mark.parametrize("recompute", [Recompute("loop"), Recompute("loop", 2), Recompute("selective")], ids=str)
@pytest.mark.parametrize("loops", [Loops(5, readouts=True), Loops(5, 2), Loops(5, 2, torch.tensor([2, 5, 4]))], ids=str)
def test_recomputation_changes_nothing(attn_type, recompute, loops, tiny, enliven):
    """Also with a readout per loop, with loops without gradient, and with loops per sequence."""
    config = tiny(attn_type=attn_type, kv_sharing="every:3")
    results = []
    for one in (Recompute(), recompute):
        model = enliven(Mythos(config, act=ActConfig(mode="safe"), recompute=one))
        ids = tokens(config, 3, 8)
        results.append(gradients(model, model(ids, labels=ids, loops=loops)["objective"]))
    assert_equal_gradients(results[1], results[0])


@pytest.mark.parametrize("attn_type", ATTENTIONS)
def test_keys_of_a_group_that_began_without_gradient_have_none(attn_type, tiny, enliven):
    """Loops 2 to 4 have gradient, and the groups begin in loops 0 and 3: the projections learn from loop 3 alone."""
    model = enliven(Mythos(tiny(attn_type=attn_type, kv_sharing="every:3"), act=ActConfig(mode="off")))
    ids, seen = tokens(model.config, 2, 8), []
    projection = model.recurrent.block.attn.kv_projections()[0]
    projection.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    model(ids, 5, backprop=3, labels=ids)["objective"].backward()
    assert seen == [False, True]


@settings(max_examples=examples(25), deadline=None)
@given(data=st.data())
def test_cached_equals_uncached(data, tiny, enliven):
    """Logits of a text read in chunks, with any sharing, and one cache entry per group of loops. A cache whose loops
    share entries as the model's do is exact as well."""
    sharing, n_loops = data.draw(st.sampled_from(["all", "first", "every:2", "every:3"])), data.draw(st.integers(1, 6))
    changes = {
        "attn_type": data.draw(st.sampled_from(ATTENTIONS)),
        "kv_sharing": sharing,
        "qk_norm": data.draw(st.booleans()),
        "lora": data.draw(st.sampled_from(["shared", "per_loop", "none"])),
        "injection": data.draw(st.sampled_from(["parcae", "reference"])),
        "initial_state": data.draw(st.sampled_from(["e", "zero", "random"])),
        "n_kv_heads": data.draw(st.sampled_from([1, 2, 4])),
    }
    mode = data.draw(st.sampled_from(["off", "safe", "ponder"]))
    model = enliven(Mythos(tiny(**changes), act=ActConfig(mode=mode)), seed=data.draw(st.integers(0, 99))).eval()
    B, S = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 10))
    cache_mode = data.draw(st.sampled_from(["all", {"first": "last"}.get(sharing, sharing)]))
    ids, cache = tokens(model.config, B, S), KVCache(mode=cache_mode)
    cuts = sorted(data.draw(st.sets(st.integers(1, S - 1))))
    with torch.no_grad():
        expected = model(ids, n_loops)
        chunks = [ids[:, i:j] for i, j in itertools.pairwise([0, *cuts, S])]
        got = torch.cat([model(chunk, n_loops, cache=cache) for chunk in chunks], dim=1)
    if model.config.initial_state != "random":  # drawn for a chunk from its first token on
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    groups = -(-n_loops // {"all": 1, "first": 6, "every:2": 2, "every:3": 3}[sharing])
    held = elements_per_token(cache)
    assert len([key for key in held if key.startswith("recurrent")]) == groups
    assert cache_bytes_per_token(model.config, n_loops, cache_mode, 4) == 4 * sum(held.values())


@pytest.mark.parametrize("sharing", SHARING)
def test_cached_equals_uncached_with_loops_per_sequence(sharing, tiny, enliven):
    """Groups then begin in different loops of the pass, so every loop has an entry."""
    model = enliven(Mythos(tiny(kv_sharing=sharing), act=ActConfig(mode="off"))).eval()
    ids, cache, loops = tokens(model.config, 3, 8), KVCache(), Loops(5, depths=torch.tensor([2, 5, 4]))
    with torch.no_grad():
        expected = model(ids, loops=loops)
        got = torch.cat([model(chunk, loops=loops, cache=cache) for chunk in ids.split([5, 1, 2], dim=1)], dim=1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_recorder_measures_the_last_loop_with_the_keys_of_its_group(tiny, enliven):
    """A gain for every mode, and the pass's result does not depend on the recorder."""
    for sharing in ("all", *SHARING):
        model = enliven(Mythos(tiny(kv_sharing=sharing), act=ActConfig(mode="off"))).eval()
        ids = tokens(model.config, 2, 8)
        with torch.no_grad():
            expected = model(ids, 4)
            model.recurrent.recorder = recorder = LoopRecorder(SINGLE)
            assert torch.equal(model(ids, 4), expected)
        assert len(recorder.rows) == 4
        assert torch.isfinite(recorder.gains[0]) and recorder.gains[0] > 0


WRONG = ["last", "every", "every:1", "every:513", "every:02", "every:2.0", "every:-2", "every:99999999999", "ALL", ""]


@pytest.mark.parametrize("wrong", WRONG)
def test_other_values_are_refused(wrong, tiny):
    with pytest.raises(UserError, match=r"model\.kv_sharing=.*'all', 'first' or 'every:N' with N from 2 to 512"):
        tiny(kv_sharing=wrong)


def test_the_last_loops_keys_cannot_be_trained_and_the_message_says_what_can(tiny):
    with pytest.raises(UserError, match="'first' caches as little"):
        tiny(kv_sharing="last")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
def test_truncated_gradients_are_refused_if_a_step_can_lack_a_loop_that_computes_keys(size):
    """For all small numbers of loops, against the loops with gradient of every step that can be drawn."""
    model = MythosConfig(kv_sharing={1: "all", 100: "first"}.get(size, f"every:{size}"))
    for backprop, maximum in itertools.product(range(1, 7), range(1, 7)):
        loops = LoopsConfig(distribution="poisson", mean=1, maximum=maximum, backprop=backprop)
        found = [line for line in problems(Config(model=model, loops=loops)) if "kv_sharing" in line]
        lacking = [n for n in range(1, maximum + 1) if all(t % size for t in range(max(0, n - backprop), n))]
        assert bool(found) == bool(lacking), (backprop, maximum)
        if found:
            assert f"loops.backprop to null or at least {min(size, maximum)}" in found[0]


def test_a_resume_does_not_change_what_loops_share():
    """Also of a run from before the setting existed, which computed keys and values in every loop."""
    now = Config(model=MythosConfig(kv_sharing="first"))
    for before in ({"model": {"dim": 2048}}, {"model": {"kv_sharing": "all"}}):
        assert list(differences(before, now)) == [("model.kv_sharing", "all", "first")]
    assert list(differences({"model": {"dim": 2048}}, Config())) == []


def test_reference_mode_computes_keys_in_every_loop(tiny):
    with pytest.raises(UserError, match=r"kv_sharing=first is not OpenMythos'.*model\.mode=train"):
        replace(tiny(), mode="reference", kv_sharing="first")


def test_weights_for_openmythos_need_keys_of_every_loop(tiny):
    with pytest.raises(UserError, match=r"model\.kv_sharing=first"):
        Mythos(tiny(kv_sharing="first")).load_open_mythos({})


def test_the_most_loops_of_a_step():
    model = MythosConfig(max_loop_iters=6)
    assert LoopsConfig().most_of(model) == 6
    assert LoopsConfig(distribution="poisson", mean=3).most_of(model) == 12
    assert LoopsConfig(distribution="poisson", mean=3, maximum=5).most_of(model) == 5
    assert LoopsConfig(distribution="uniform_set", set=(1, 7)).most_of(model) == 28
