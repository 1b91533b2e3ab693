"""Options of the loops: depths per sequence, readouts, halting, initial states and injection.

References: other passes of the same model (one sequence alone, a pass that ends at that loop), closed formulas, and
sums written out by hand.
"""

import math
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_dist.config.schema import ActConfig, MythosConfig
from mythos_dist.model import Mythos
from mythos_dist.model.loop_recorder import LoopRecorder
from mythos_dist.model.loops import Loops
from mythos_dist.model.mythos import IGNORED
from mythos_dist.model.recompute import Recompute
from mythos_dist.parallel.mesh import SINGLE

MODES = ("off", "reference", "safe")


def tokens(config: MythosConfig, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, objective: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    objective.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", [*MODES, "ponder"])
@pytest.mark.parametrize("backprop", [None, 2])
def test_sequences_with_different_depths_equal_separate_passes(mode, backprop, tiny, enliven):
    """Loss and gradients of a batch whose sequences have 1, 3 and 4 loops, against each sequence with that many. With
    readouts each last one teaches the others of its sequence."""
    if mode == "ponder" and backprop:
        pytest.skip("config.rules refuses it")
    readouts = mode == "ponder"
    model = enliven(Mythos(tiny(), act=ActConfig(mode=mode, ponder_cost=0.1 * (mode != "off")), teacher=0.5))
    ids, labels = tokens(model.config, 3, 8), tokens(model.config, 3, 8, seed=1)
    depths = [3, 1, 4]
    no_grad = 0 if backprop is None else 4 - backprop
    combined = model(ids, labels=labels, loops=Loops(4, no_grad, torch.tensor(depths), readouts=readouts))
    got = gradients(model, combined["objective"])
    alone = []
    for row, depth in enumerate(depths):
        loops = Loops(depth, 0 if backprop is None else max(0, depth - backprop), readouts=readouts)
        one = slice(row, row + 1)
        alone.append(model(ids[one], labels=labels[one], loops=loops))
    mean = torch.stack([one["objective"] for one in alone]).mean()
    torch.testing.assert_close(combined["objective"], mean, rtol=1e-5, atol=0)
    for name, expected in gradients(model, mean).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recompute", [Recompute(), Recompute("loop", 2)])
def test_each_readouts_loss_equals_a_pass_that_ends_there(mode, recompute, tiny, enliven):
    """The first three loops have their own targets; the fourth uses those of the third."""
    model = enliven(Mythos(tiny(), act=ActConfig(mode=mode), recompute=recompute))
    ids, labels = tokens(model.config, 2, 8), tokens(model.config, 2, 3, 8, seed=1)
    labels[:, :, 0] = IGNORED
    labels[0, 1] = IGNORED  # a loop with fewer labels than the others has the same weight
    losses = model(ids, labels=labels, loops=Loops(4, readouts=True))
    got = gradients(model, losses["objective"])
    each = [model(ids, n, labels=labels[:, min(n, 3) - 1]) for n in (1, 2, 3, 4)]
    expected = torch.stack([one["objective"] for one in each]).mean()
    torch.testing.assert_close(losses["objective"], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["cross_entropy"], each[-1]["cross_entropy"], rtol=1e-5, atol=0)
    assert torch.equal(losses["correct"], each[-1]["correct"])
    for n, one in enumerate(each, 1):  # a pass without readouts uses its last loop's targets
        assert torch.equal(model(ids, n, labels=labels)["objective"], one["objective"])
    for name, gradient in gradients(model, expected).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_last_loop_teaches_the_others(tiny, enliven):
    """The mean over loops of the loss of a pass that ends there, plus KL(distribution of the last || its own)."""
    model = enliven(Mythos(tiny(), act=ActConfig(mode="off"), teacher=0.5))
    ids, labels = tokens(model.config, 2, 8), tokens(model.config, 2, 8, seed=1)
    labels[0, 2] = IGNORED
    losses = model(ids, labels=labels, loops=Loops(3, readouts=True))
    got = gradients(model, losses["objective"])
    log_p = [model(ids, n).float().log_softmax(-1)[labels != IGNORED] for n in (1, 2, 3)]
    divergences = [F.kl_div(one, log_p[-1].detach(), log_target=True, reduction="batchmean") for one in log_p]
    losses_of = [F.nll_loss(one, labels[labels != IGNORED]) for one in log_p]
    assert min(divergences[:2]) > 0.001 and divergences[2] == 0
    expected = sum(one + 0.5 * other for one, other in zip(losses_of, divergences, strict=True)) / 3
    torch.testing.assert_close(losses["objective"], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["cross_entropy"], losses_of[-1], rtol=1e-5, atol=0)
    model.zero_grad()
    expected.backward()
    for name, parameter in model.named_parameters():  # logits do not depend on the halting layer
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_no_grad_loops_have_no_readout(tiny, enliven):
    model = enliven(Mythos(tiny(), act=ActConfig(mode="off")))
    ids = tokens(model.config, 2, 8)
    objective = model(ids, labels=ids, loops=Loops(4, 2, readouts=True))["objective"]
    each = [model(ids, n, labels=ids)["objective"] for n in (3, 4)]
    torch.testing.assert_close(objective, torch.stack(each).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("prior", [None, 0.3])
def test_ponder_weights_losses_by_halting_probability(prior, tiny, enliven):
    """Sum over loops of p_n * loss_n, plus the halting loss, written out per token."""
    act = ActConfig(mode="ponder", ponder_cost=0.05, kl=0.2, prior=prior)
    model = enliven(Mythos(tiny(), act=act))
    ids, N = tokens(model.config, 2, 8), 4
    halting = []
    handle = model.recurrent.act.halt.register_forward_hook(lambda module, inputs, output: halting.append(output))
    objective = model(ids, labels=ids, loops=Loops(N, readouts=True))["objective"]
    handle.remove()
    plain = Mythos(model.config, act=ActConfig(mode="off"))
    plain.load_state_dict(model.state_dict())
    expected, left = torch.zeros(16), torch.ones(16)
    for n in range(1, N + 1):
        stop = torch.sigmoid(halting[n - 1]).view(-1)
        p = left * stop if n < N else left
        left = left - p
        loss = F.cross_entropy(plain(ids, n).flatten(0, 1), ids.flatten(), reduction="none")
        geometric = 0 if prior is None else prior * (1 - prior) ** (n - 1) if n < N else (1 - prior) ** (N - 1)
        expected += p * (loss + 0.05 * n + 0.2 * (p / (1 / N if prior is None else geometric)).log())
    torch.testing.assert_close(objective, expected.mean(), rtol=1e-5, atol=0)


def test_ponder_inference_exits_at_the_threshold(tiny, enliven):
    config = tiny(act_threshold=0.6)
    model = enliven(Mythos(config, act=ActConfig(mode="ponder"))).eval()
    ids, probabilities = tokens(config, 2, 8), []
    model.recurrent.act.halt.register_forward_hook(lambda module, inputs, output: probabilities.append(output))
    with torch.no_grad():
        logits = model(ids, 5)
        stop = torch.sigmoid(torch.stack(probabilities)).view(len(probabilities), 2, 8)
        reached = (1 - (1 - stop).cumprod(0) >= 0.6).int()
        left = torch.where(reached.any(0), reached.argmax(0), 4)  # the loop of each token
        states = []
        plain = Mythos(config, act=ActConfig(mode="off")).eval()
        plain.load_state_dict(model.state_dict())
        plain.recurrent.register_forward_hook(lambda module, inputs, output: states.append(output[0].h))
        for n in range(1, 6):
            plain(ids, n)
        mixed = torch.stack(states).gather(0, left[None, ..., None].expand(1, 2, 8, config.dim))[0]
        plain.recurrent.register_forward_hook(
            lambda module, inputs, output: (output[0]._replace(output=mixed), *output[1:])
        )
        torch.testing.assert_close(logits, plain(ids, 5), rtol=1e-5, atol=1e-5)
    assert len(set(left.flatten().tolist())) > 1, "tokens exit at different loops"


@pytest.mark.parametrize("mode", ["reference", "safe", "ponder"])
def test_inference_skips_loops_after_all_tokens_have_halted(mode, tiny, enliven):
    """The result equals that of all loops; with gradient, or with a cache, all loops run."""
    model = enliven(Mythos(tiny(), act=ActConfig(mode=mode)), halt_bias=30.0).eval()
    ids, calls = tokens(model.config, 2, 8), []
    model.recurrent.block.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        short = model(ids, 6)
    assert len(calls) == 1
    all_loops = model(ids, 6)
    assert len(calls) == 7
    torch.testing.assert_close(short, all_loops, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert model(ids, 6, labels=ids)["expert_counts"].shape == (6, model.config.n_experts)


def test_parcaes_injection_follows_its_formula(tiny):
    """With a block that adds nothing, h after n loops is A^n h0 + (1 + A + ... + A^(n-1)) * dt * (B @ norm(e))."""
    config = tiny(injection="parcae", lora="none", initial_state="zero")
    model = Mythos(config, act=ActConfig(mode="off"), seed=3)
    recurrent = model.recurrent
    assert torch.equal(recurrent.injection.B.weight, torch.eye(config.dim))
    with torch.no_grad():
        recurrent.injection.B.weight += 0.1 * torch.randn(config.dim, config.dim)
        recurrent.injection.delta += torch.linspace(-1, 1, config.dim)
        recurrent.injection.log_A += torch.linspace(1, -1, config.dim)
        block = recurrent.block
        for weight in (block.attn.wo.weight, block.ffn.experts.w2, block.ffn.shared.down.weight):
            weight.zero_()
        recurrent.norm.weight.zero_()  # u = block(0) = 0
    states = []
    recurrent.register_forward_hook(lambda module, inputs, output: states.append(output[0]))
    model(tokens(config, 2, 8), 5)
    (state,) = states
    dt = torch.log1p(torch.exp(recurrent.injection.delta))
    A = torch.exp(-dt * torch.exp(recurrent.injection.log_A))
    expected = sum(A**n for n in range(5)) * dt * (state.e @ recurrent.injection.B.weight.T)
    torch.testing.assert_close(state.h, expected, rtol=1e-4, atol=1e-6)
    assert ((state.e**2).mean(-1) - 1).abs().max() < 1e-2, "e is normalized"


def test_parcaes_injection_is_initialized_to_its_decay(tiny):
    A, dt, _ = Mythos(tiny(injection="parcae")).recurrent.injection(torch.zeros(1, 1, 32))
    torch.testing.assert_close(A, torch.full_like(A, 0.447), rtol=1e-4, atol=0)
    torch.testing.assert_close(dt, torch.full_like(dt, -math.log(0.447)), rtol=1e-4, atol=0)


def test_random_states_depend_on_the_sequences_seed_only(tiny):
    """Alone or at any index of a batch; other seeds give other states, with standard deviation sqrt(2 / 5)."""
    model = Mythos(tiny(initial_state="random"), act=ActConfig(mode="off"))
    starts = []
    handle = model.recurrent.register_forward_pre_hook(lambda module, inputs: starts.append(inputs[0].h))
    ids = tokens(model.config, 3, 8)
    model(ids, loops=Loops(2, seeds=torch.tensor([7, 8, 9])))
    model(ids[1:2], loops=Loops(2, seeds=torch.tensor([8])))
    handle.remove()
    assert torch.equal(starts[0][1], starts[1][0])
    assert not torch.equal(starts[0][0], starts[0][1])
    assert starts[0].std().item() == pytest.approx(math.sqrt(2 / 5), rel=0.1)
    zero = Mythos(tiny(initial_state="zero"))
    zero.recurrent.register_forward_pre_hook(lambda module, inputs: starts.append(inputs[0].h))
    zero(ids, 1)
    assert not starts[-1].any()


def test_lora_per_loop_and_none(tiny, enliven):
    """Equal matrices in all loops equal the shared form with a scale of 1; `none` has no parameters."""
    shared = enliven(Mythos(tiny(), act=ActConfig(mode="off")))
    own = Mythos(tiny(lora="per_loop"), act=ActConfig(mode="off"))
    state = shared.state_dict()
    state["recurrent.lora.scale"].fill_(1.0)
    T = shared.config.max_loop_iters
    theirs = {name: value for name, value in state.items() if name != "recurrent.lora.scale"}
    for name in ("recurrent.lora.down", "recurrent.lora.B"):
        theirs[name] = state[name].expand(T, -1, -1)
    own.load_state_dict(theirs)
    ids = tokens(shared.config, 2, 8)
    torch.testing.assert_close(own(ids, T + 2), shared(ids, T + 2), rtol=1e-5, atol=1e-5)
    assert not [name for name, _ in Mythos(tiny(lora="none")).named_parameters() if "lora" in name]


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_with_qk_norm_attention_ignores_the_scale_of_queries_and_keys(attn_type, tiny, enliven):
    model = enliven(Mythos(tiny(attn_type=attn_type, qk_norm=True)))
    ids = tokens(model.config, 2, 8)
    before = model(ids)
    scaled = [p for name, p in model.named_parameters() if name.endswith(("wq.weight", "wk.weight", "q_up.weight"))]
    assert len(scaled) >= 3
    with torch.no_grad():
        for weight in scaled:
            weight *= 7
    torch.testing.assert_close(model(ids), before, rtol=1e-3, atol=1e-3)


def test_depth_scaled_matrices_have_huginns_std(tiny):
    config = replace(tiny(init="depth_scaled"), dim=256, n_experts=8, expert_dim=64)
    wide = math.sqrt(2 / (5 * 256))
    layers = config.prelude_layers + config.max_loop_iters + config.coda_layers
    for name, parameter in Mythos(config).named_parameters():
        if parameter.numel() < 4096 or not name.startswith(("prelude", "coda", "recurrent.block")):
            continue
        writes = name.endswith(("wo.weight", "down.weight", "w2")) and "q_down" not in name and "kv_down" not in name
        expected = wide / math.sqrt(2 * layers) if writes else wide
        assert parameter.std().item() == pytest.approx(expected, rel=0.1), name


def test_loop_recorder_statistics_equal_those_of_the_states(tiny, enliven):
    """Norms, changes and cosines against the states themselves; the weights of halting sum to 1 in safe mode."""
    model = enliven(Mythos(tiny(), act=ActConfig(mode="safe"))).eval()
    ids, states = tokens(model.config, 2, 8), []
    model.recurrent.recorder = recorder = LoopRecorder(SINGLE)
    loop = model.recurrent._loop
    model.recurrent._loop = lambda t, loops, before, *rest: states.append(before.h) or loop(t, loops, before, *rest)
    with torch.no_grad():
        model(ids, 3)
    rows = torch.stack([recorder.rows[t] for t in range(3)])
    assert rows[:, 0].tolist() == [16] * 3
    before, after = states[1], states[2]
    means = dict(zip(LoopRecorder.COLUMNS, (rows[1] / 16).tolist(), strict=True))
    assert means["state_norm"] == pytest.approx(after.norm(dim=-1).mean().item(), rel=1e-5)
    change = ((after - before).norm(dim=-1) / after.norm(dim=-1)).mean().item()
    assert means["residual_ratio"] == pytest.approx(change, rel=1e-5)
    cosines = F.cosine_similarity(after.unsqueeze(2), after.unsqueeze(1), dim=-1)
    assert means["token_correlation"] == pytest.approx(cosines.mean().item(), rel=1e-5)
    assert rows[:, 4].sum().item() == pytest.approx(16, rel=1e-5)
    assert (
        recorder.rho == torch.exp(-torch.exp(model.recurrent.injection.log_dt + model.recurrent.injection.log_A)).max()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimated_gain_is_the_largest_eigenvalue(dtype):
    """Of a linear map with one dominant eigenvalue, in fp32 and bf16."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    values = torch.full((16,), 0.1)
    values[0] = 1.7
    matrix = (basis * values) @ basis.T
    recorder = LoopRecorder(SINGLE)
    recorder.estimate_gain(
        lambda h: (h.float() @ matrix).to(dtype),
        torch.randn(2, 4, 16, generator=generator).to(dtype),
        torch.arange(4).expand(2, -1),
    )
    assert float(recorder.gains[0]) == pytest.approx(1.7, rel=0.02)


def test_readouts_of_earlier_stages_are_not_held_by_recomputed_groups(tiny):
    """A pipeline stage receives them for every micro-batch in flight: it appends its own, and they are freed."""
    model = Mythos(tiny(), recompute=Recompute("loop"))
    ids, loops = tokens(model.config, 1, 8), Loops(2, readouts=True)
    context = model.context(ids)
    activations = model.recurrent.start(model.embed.lookup(ids), loops, context)
    activations, _ = model.recurrent(activations, range(1), loops, context)
    received = activations.readouts.clone()
    alive = weakref.ref(received)
    activations, _ = model.recurrent(activations._replace(readouts=received), range(1, 2), loops, context)
    assert activations.readouts.shape[0] == 2 and torch.equal(activations.readouts[:1], received)
    del received
    assert alive() is None
