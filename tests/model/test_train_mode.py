"""What `mode: train` fixes of the reference, each shown on both models: ours holds, the reference does not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mythos_dist.config.schema import ActConfig
from mythos_dist.errors import UserError
from mythos_dist.model import ExpertsConfig, Mythos
from mythos_dist.model.attention import build_context
from mythos_dist.model.mythos import IGNORED
from mythos_dist.model.recompute import Recompute
from mythos_dist.model.recurrence import LoopOutputs

SAFE = ActConfig(mode="safe")


def tokens(config, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_pure_bf16_trains(attn_type, tiny, build_pair):
    """Without autocast; bf16 keeps 8 bits, so losses agree to 2 %, and every gradient is finite and points alike.

    The reference cannot run: its halting promotes the state to fp32, and the next matrix is bf16.
    """
    config = tiny(attn_type=attn_type)
    ours, reference = build_pair(config)
    input_ids, labels = tokens(config, 2, 12), tokens(config, 2, 12, seed=1)
    exact = ours(input_ids, labels=labels)
    exact["objective"].backward()
    gradients = {name: p.grad.clone() for name, p in ours.named_parameters()}

    ours.to(torch.bfloat16).zero_grad()
    rounded = ours(input_ids, labels=labels)
    rounded["objective"].backward()
    assert rounded["cross_entropy"].item() == pytest.approx(exact["cross_entropy"].item(), rel=0.02)
    for name, parameter in ours.named_parameters():
        assert parameter.grad.dtype == torch.bfloat16
        assert parameter.grad.isfinite().all(), name
    flat = torch.cat([p.grad.float().flatten() for p in ours.parameters()])
    assert torch.cosine_similarity(flat, torch.cat([g.flatten() for g in gradients.values()]), dim=0) > 0.98

    with pytest.raises(RuntimeError, match="dtype"):
        reference.bfloat16()(input_ids)


def loops_run(model: nn.Module, input_ids: Tensor, n_loops: int) -> int:
    """The number of calls of the recurrent block."""
    calls = []
    handle = model.recurrent.block.register_forward_hook(lambda *_: calls.append(1))
    model(input_ids, n_loops)
    handle.remove()
    return len(calls)


def test_training_runs_all_loops_after_all_tokens_have_halted(tiny, build_pair):
    """Our loops do not depend on halting; in the reference one rank's tokens decide when it exits."""
    config = tiny()
    input_ids = tokens(config, 2, 8)
    seen = []
    for halt_bias in (-6.0, 0.0, 30.0):
        ours, reference = build_pair(config, halt_bias=halt_bias)
        seen.append(loops_run(reference, input_ids, 5))
        assert loops_run(ours, input_ids, 5) == 5
        assert ours(input_ids, 5, labels=input_ids)["expert_counts"].shape == (5, config.n_experts)
    assert seen[0] == 5
    assert seen[-1] == 1


def mixing_weights(model: nn.Module, input_ids: Tensor, n_loops: int) -> Tensor:
    """The weights (n_loops, N) of the states in the recurrent output, by least squares: one system per token."""
    states, outputs = [], []

    def keep_state(module, inputs):
        states.append(inputs[0].detach())

    def keep_output(module, inputs, output):
        outputs.append(output if isinstance(output, Tensor) else output[0].output)

    handles = [
        model.recurrent.act.register_forward_pre_hook(keep_state),
        model.recurrent.register_forward_hook(keep_output),
    ]
    with torch.no_grad():
        model(input_ids, n_loops)
    for handle in handles:
        handle.remove()
    basis = torch.stack(states, dim=-1).flatten(0, 1).double()  # (N, D, n_loops)
    target = outputs[0].flatten(0, 1).double().unsqueeze(-1)  # (N, D, 1)
    return torch.linalg.lstsq(basis, target).solution.squeeze(-1).T


@pytest.mark.parametrize("halt_bias", [-6.0, -1.0, 6.0])
def test_halting_weights_sum_to_one_at_any_number_of_loops(halt_bias, tiny, build_pair):
    """States and output are fp32; solving for their weights loses a few digits, so 1e-4."""
    config = tiny()
    ours, reference = build_pair(config, act=SAFE, halt_bias=halt_bias)
    input_ids = tokens(config, 2, 8)
    for n_loops in (1, 2, 3, 6):
        weights = mixing_weights(ours, input_ids, n_loops)
        torch.testing.assert_close(weights.sum(0), torch.ones(16, dtype=torch.float64), atol=1e-4, rtol=0)
        assert (weights > -1e-4).all()
    lost = 1 - mixing_weights(reference, input_ids, 1).sum(0)
    if halt_bias < 6:
        assert (lost > 0.2).all(), "the reference loses the remainder after its last loop"


def test_reference_mode_loses_the_same_mass(tiny, build_pair):
    """Parity means keeping the flaw: in reference mode the weights are the reference's."""
    config = tiny(mode="reference")
    ours, reference = build_pair(config)
    input_ids = tokens(config, 2, 8)
    torch.testing.assert_close(
        mixing_weights(ours, input_ids, 1), mixing_weights(reference, input_ids, 1), atol=1e-5, rtol=0
    )


def test_the_bias_changes_by_its_rate_against_the_load(tiny):
    """Exactly rate * sign(mean - load), over the sum of all loops; an expert with the mean load stays."""
    model = Mythos(tiny(n_experts=4), experts=ExpertsConfig(bias_update_rate=0.25))
    counts = torch.tensor([[0, 8, 4, 4], [2, 6, 8, 0]])  # mean 8 over both loops
    model.update_router_bias(counts)
    assert model.recurrent.block.ffn.router.bias.tolist() == [0.25, -0.25, -0.25, 0.25]
    model.update_router_bias(torch.tensor([[5, 5, 9, 1]]))
    assert model.recurrent.block.ffn.router.bias.tolist() == [0.25, -0.25, -0.5, 0.5]


def test_reference_mode_and_rate_zero_keep_the_bias(tiny):
    for config, experts in (
        (tiny(mode="reference"), ExpertsConfig()),
        (tiny(), ExpertsConfig(bias_update_rate=0.0)),
    ):
        model = Mythos(config, experts=experts)
        model.update_router_bias(torch.arange(config.n_experts).unsqueeze(0))
        assert not model.recurrent.block.ffn.router.bias.any()


def imbalance(counts: Tensor) -> float:
    """The largest expert load over the mean load."""
    load = counts.sum(0).double()
    return float(load.max() / load.mean())


@pytest.mark.launch
def test_bias_updates_balance_a_skewed_router(tiny, build_pair):
    """All tokens favor two of eight experts (load 4 x the mean, the worst that top-2 allows); 60 updates fix it.

    The reference has the same buffer and no code that moves it: after optimizer steps it is still zero.
    """
    config = tiny(n_experts=8)
    ours, reference = build_pair(config, experts=ExpertsConfig(bias_update_rate=0.1))
    input_ids = tokens(config, 4, 32)
    ours.recurrent.block.ffn.router.bias.zero_()
    ours.recurrent.block.ffn.router.bias[:2] = 5.0
    before = ours(input_ids, labels=input_ids)["expert_counts"]
    assert imbalance(before) == 4.0
    with torch.no_grad():
        for _ in range(60):
            ours.update_router_bias(ours(input_ids, labels=input_ids)["expert_counts"])
    assert imbalance(ours(input_ids, labels=input_ids)["expert_counts"]) < 1.5

    reference.recurrent.block.ffn.router_bias.zero_()
    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-3)
    for _ in range(3):
        reference(input_ids).logsumexp(-1).mean().backward()
        optimizer.step()
    assert not reference.recurrent.block.ffn.router_bias.any()


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, lambda m: m.to(torch.bfloat16)])
def test_the_router_bias_stays_exact_under_casts(cast, tiny):
    """bf16 would round 1.001 to 1, and an update of 1e-3 would never arrive."""
    model = Mythos(tiny())
    exact = torch.linspace(1, 1.001, 6)
    model.recurrent.block.ffn.router.bias.copy_(exact)
    bias = cast(model).recurrent.block.ffn.router.bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, exact)
    assert torch.equal(model.state_dict()["recurrent.block.ffn.router.bias"], exact)


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_recomputation_changes_neither_gradients_nor_counts(attn_type, tiny):
    """Exactly: the same operations in the same order. Each token is counted once per loop and slot."""
    config = tiny(attn_type=attn_type)
    experts = ExpertsConfig(z_loss=0.1, sequence_balance_loss=0.1)
    input_ids, documents = tokens(config, 2, 12), torch.arange(24).view(2, 12) // 5
    results = []
    for recompute in (Recompute(), Recompute("loop"), Recompute("loop", 2), Recompute("selective")):
        model = Mythos(config, experts=experts, recompute=recompute)
        losses = model(input_ids, labels=input_ids, document_ids=documents)
        losses["objective"].backward()
        results.append((losses, {name: p.grad for name, p in model.named_parameters()}))
    (losses, gradients), *others = results
    assert losses["expert_counts"].sum(1).tolist() == [2 * 12 * config.n_experts_per_tok] * config.max_loop_iters
    for again, recomputed in others:
        assert torch.equal(losses["objective"], again["objective"])
        assert torch.equal(losses["expert_counts"], again["expert_counts"])
        for name, gradient in gradients.items():
            assert torch.equal(gradient, recomputed[name]), name


def bytes_saved(run: Callable[[], object]) -> int:
    """The bytes that autograd saves in `run` for the backward, parameters included, each storage once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def test_recomputation_saves_less_for_the_backward(tiny):
    """Half the bytes or fewer at three loops: one loop's activations instead of three loops'."""

    def saved(recompute: str) -> int:
        model = Mythos(config, recompute=Recompute(recompute))
        parameters = sum(p.untyped_storage().nbytes() for p in model.parameters())
        return bytes_saved(lambda: model(input_ids, labels=input_ids)) - parameters

    config = tiny(vocab_size=3, prelude_layers=0, coda_layers=0)
    input_ids = tokens(config, 4, 64)
    assert saved("loop") < 0.5 * saved("none")


def test_the_loss_is_the_mean_over_labels_that_are_not_ignored(tiny):
    """Against log_softmax of the logits, picked by hand; labels of -100 are ignored, and all ignored give zero."""
    config = tiny()
    model = Mythos(config)
    input_ids, labels = tokens(config, 2, 6), tokens(config, 2, 6, seed=1)
    labels[0, 1:4] = labels[1, 5] = IGNORED
    logits = model(input_ids).double().log_softmax(-1)
    picked = [-logits[b, s, labels[b, s]] for b in range(2) for s in range(6) if labels[b, s] != -100]
    losses = model(input_ids, labels=labels)
    assert losses["tokens"].item() == len(picked) == 8
    assert losses["objective"].item() == pytest.approx(sum(picked).item() / 8, rel=1e-5)  # fp32 against float64
    assert losses["cross_entropy"].item() == losses["objective"].item()

    nothing = model(input_ids, labels=torch.full_like(labels, IGNORED))
    nothing["objective"].backward()
    assert nothing["objective"].item() == 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_no_rotary_table_is_stored_and_a_cast_keeps_positions_right(tiny, build_pair):
    """The state is the parameters and the router's bias. In bf16 the logits stay within bf16's rounding (3 %).

    The reference stores two tables, and a cast to bf16 keeps only their cosines.
    """
    config = tiny()
    ours, reference = build_pair(config)
    parameters = {name for name, _ in ours.named_parameters()}
    assert set(ours.state_dict()) == parameters | {"recurrent.block.ffn.router.bias"}
    assert {"freqs_cis", "freqs_cis_mla"} <= set(reference.state_dict())

    input_ids = tokens(config, 2, 64)
    attention = ours.prelude["0"].attn
    context = build_context(config, input_ids.shape, input_ids.device)
    x = torch.randn(2, 64, config.dim, generator=torch.Generator().manual_seed(0))
    exact, _ = attention(x, context, "")
    rounded = attention.to(torch.bfloat16)(x.bfloat16(), context, "")[0].float()
    assert (rounded - exact).norm() < 0.03 * exact.norm()

    exact = reference.prelude[0].attn(x, reference.freqs_cis_mla, reference._causal_mask(64, x.device))
    with pytest.warns(UserWarning, match="discards the imaginary part"):
        reference.to(torch.bfloat16)
    cast = reference.prelude[0].attn
    # Back in fp32, so that only the lost half of the table can make a difference.
    turned = cast.float()(x, reference.freqs_cis_mla.float(), reference._causal_mask(64, x.device))
    assert (turned - exact).norm() > 0.03 * exact.norm()


def test_a_config_that_cannot_be_built_names_all_its_problems(tiny):
    """At construction, in Python as from YAML."""
    with pytest.raises(UserError) as raised:
        tiny(attn_type="gqa", n_heads=5, n_experts_per_tok=7)
    assert len(raised.value.problems) == 3
    for setting in ("model.dim=32", "model.n_kv_heads=2", "model.n_experts_per_tok=7"):
        assert setting in str(raised.value)


@pytest.mark.parametrize("backprop", [1, 2, 4, 9])
def test_truncated_gradients_equal_detached_states(backprop, tiny):
    """Hooks detach the state after each of the first loops, and the halting weights computed from it."""
    config = tiny()
    input_ids = tokens(config, 2, 8)

    def gradients(model: Mythos, **settings) -> dict[str, Tensor]:
        model(input_ids, 4, labels=input_ids, **settings)["objective"].backward()
        return {name: p.grad for name, p in model.named_parameters()}

    cut = Mythos(config, act=SAFE)
    run = cut.recurrent._loop

    def loop(t: int, *arguments) -> LoopOutputs:
        outputs = run(t, *arguments)
        if t < 4 - backprop:  # all but e, which every loop gets from the prelude
            state, names = outputs.activations, ("h", "output", "cum_halting", "aux_loss")
            state = state._replace(**{name: getattr(state, name).detach() for name in names})
            outputs = outputs._replace(activations=state)
        return outputs

    cut.recurrent._loop = loop  # type: ignore[method-assign]
    expected = gradients(cut)
    for name, gradient in gradients(Mythos(config, act=SAFE), backprop=backprop).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_no_grad_loops_save_nothing_for_the_backward(tiny):
    """What a pass saves does not grow with the number of no-grad loops."""

    def saved(n_loops: int) -> int:
        return bytes_saved(lambda: model(input_ids, n_loops, labels=input_ids, backprop=2))

    model = Mythos(tiny())
    input_ids = tokens(model.config, 2, 16)
    assert saved(9) == pytest.approx(saved(3), rel=0.02)


def test_without_halting_the_output_is_the_last_state(tiny):
    """The coda gets the last loop's state unchanged; the halting layer gets gradients of zeros."""
    model = Mythos(tiny(), act=ActConfig(mode="off"))
    states = []
    model.recurrent.register_forward_hook(lambda module, inputs, output: states.append(output[0]))
    input_ids = tokens(model.config, 2, 8)
    model(input_ids, 3, labels=input_ids)["objective"].backward()
    assert torch.equal(states[0].h.float(), states[0].output)
    assert not any(p.grad.any() for p in model.recurrent.act.parameters())
