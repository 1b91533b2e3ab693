"""`mode: reference` gives OpenMythos 0.5.0's logits and gradients, over configurations that hypothesis draws."""

from collections import Counter
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import Phase, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mythos_dist.model import ExpertsConfig, KVCache, Mythos, MythosConfig
from mythos_dist.model.attention import build_context
from mythos_dist.model.open_mythos import from_open_mythos

EXAMPLES = 220
# fp32 rounds at 6e-8; sums over some hundred terms in another order, through up to 6 loops, stay below this.
TOLERANCE = 1e-5
# A choice (which expert, whether to halt) closer to its tie than this may fall either way in fp32: not comparable.
MARGIN = 1e-5


@dataclass(frozen=True)
class Case:
    config: MythosConfig
    n_loops: int
    shape: torch.Size  # (B, S)
    halt_bias: float
    router_bias: bool
    seed: int


@st.composite
def cases(draw) -> Case:
    """Small configurations of every kind that the reference can be built with."""
    attn_type = draw(st.sampled_from(["gqa", "mla"]))
    n_kv_heads = draw(st.integers(1, 3))
    n_heads = n_kv_heads * draw(st.integers(1, 3))
    gqa_dim = n_heads * draw(st.sampled_from([8, 10, 12]))
    per_token = draw(st.integers(1, 8))
    max_loops = draw(st.integers(1, 4))
    config = MythosConfig(
        mode="reference",
        attn_type=attn_type,
        vocab_size=draw(st.integers(27, 60)),
        dim=gqa_dim if attn_type == "gqa" else draw(st.integers(9, 48)),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        max_seq_len=16,
        max_loop_iters=max_loops,
        prelude_layers=draw(st.integers(0, 2)),
        coda_layers=draw(st.integers(0, 2)),
        kv_lora_rank=draw(st.integers(5, 16)),
        q_lora_rank=draw(st.integers(5, 16)),
        qk_rope_head_dim=draw(st.sampled_from([2, 4, 8])),
        qk_nope_head_dim=draw(st.integers(1, 9)),
        v_head_dim=draw(st.integers(1, 20)),
        n_experts=per_token + draw(st.integers(0, 8)),
        n_shared_experts=draw(st.integers(0, 8)),
        n_experts_per_tok=per_token,
        expert_dim=draw(st.integers(4, 12)),
        act_threshold=draw(st.sampled_from([0.5, 0.9, 0.99, 1.0])),
        rope_theta=draw(st.sampled_from([10.0, 500000.0])),
        lora_rank=draw(st.integers(1, 8)),
    )
    return Case(
        config=config,
        n_loops=draw(st.integers(1, max_loops + 2)),
        shape=torch.Size((draw(st.integers(1, 3)), draw(st.integers(4, 9)))),  # 27 tokens at most
        halt_bias=draw(st.sampled_from([-6.0, -2.0, 0.0, 4.0])),
        router_bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


class Watch:
    """How close the reference's choices were to a tie, and how many tokens halted."""

    def __init__(self, model: nn.Module, config: MythosConfig):
        self.config, self.model = config, model
        self.margin = float("inf")
        self.mass: Tensor | float = 0.0
        self.loops = 0
        self.halt_terms = 0.0  # what the halting bias' gradient is the sum of, by absolute value
        model.recurrent.act.register_forward_hook(self._halting)
        model.recurrent.block.ffn.router.register_forward_hook(self._router)

    def _router(self, module: nn.Module, inputs: tuple, logits: Tensor) -> None:
        if (k := self.config.n_experts_per_tok) < self.config.n_experts:
            biased = (logits + self.model.recurrent.block.ffn.router_bias).topk(k + 1).values
            self.margin = min(self.margin, float((biased[..., k - 1] - biased[..., k]).detach().min()))

    def _halting(self, module: nn.Module, inputs: tuple, p: Tensor) -> None:
        threshold = self.config.act_threshold
        running = torch.as_tensor(self.mass < threshold).expand_as(p)
        self.mass = self.mass + p.detach() * running
        p.register_hook(lambda grad: self._add_halt_terms(grad * p.detach() * (1 - p.detach())))
        if running.any():
            self.margin = min(self.margin, float((self.mass - threshold)[running].abs().min()))
        self.loops += 1

    def _add_halt_terms(self, terms: Tensor) -> None:
        self.halt_terms += float(terms.abs().sum())

    @property
    def halted(self) -> Tensor:
        return self.mass >= self.config.act_threshold


def scales(case: Case, watch: Watch, gradients: dict[str, Tensor]) -> dict[str, float]:
    """What the error of each gradient is measured against: its own norm, but for sums whose terms cancel.

    Two parameters are single numbers, and their gradients sums of signed terms: the terms count. Two gradients vanish
    by construction and are rounding noise in both models (float64 gives 1e-15 for the first, and for the second what
    the norm's eps leaves): there the whole gradient's norm counts.
    """
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
    norms["recurrent.injection.log_dt"] = float(gradients["recurrent.injection.log_A"].abs().sum())
    norms["recurrent.act.halt.bias"] = watch.halt_terms
    everything = sum(norm**2 for norm in norms.values()) ** 0.5
    if case.config.n_experts_per_tok == 1:  # a single weight, renormalized, is always 1
        norms["recurrent.block.ffn.router.weight"] = everything
    if case.config.coda_layers == 0 and case.n_loops == 1:  # a weight on the only state, and then the final norm
        norms["recurrent.act.halt.weight"] = norms["recurrent.act.halt.bias"] = everything
    return norms


def classes(case: Case, watch: Watch) -> set[str]:
    """The kinds that a case belongs to; the test wants all of them."""
    config, loops = case.config, case.n_loops - case.config.max_loop_iters
    halted = float(watch.halted.float().mean())
    names = {
        config.attn_type,
        "loops " + ("below" if loops < 0 else "above" if loops > 0 else "at") + " max_loop_iters",
        "tokens " + ("all halt" if halted == 1 else "never halt" if halted == 0 else "halt or not"),
        f"prelude {config.prelude_layers}",
        f"coda {config.coda_layers}",
        f"{config.n_experts_per_tok} experts per token",
        f"{config.n_shared_experts} shared experts",
        f"group of {config.n_heads // config.n_kv_heads} queries" if config.attn_type == "gqa" else "mla",
    }
    if watch.loops < case.n_loops:
        names.add("reference leaves the loop early")
    if config.ffn_dim % 2:
        names.add("odd FFN")
    if config.expert_dim % 2:
        names.add("odd expert")
    if case.router_bias:
        names.add("router bias")
    if config.attn_type == "mla":
        names.add("values wider" if config.v_head_dim > config.head_dim else "values not wider")
    return names


WANTED = {
    *("gqa", "mla", "odd FFN", "odd expert", "router bias", "values wider", "values not wider"),
    *("reference leaves the loop early", "tokens all halt", "tokens never halt", "tokens halt or not"),
    *(f"loops {where} max_loop_iters" for where in ("below", "at", "above")),
    *(f"{part} {layers}" for part in ("prelude", "coda") for layers in range(3)),
    *(f"{k} experts per token" for k in range(1, 9)),
    *(f"{n} shared experts" for n in range(9)),
    *(f"group of {n} queries" for n in range(1, 4)),
}


def gradients_by_our_names(model: nn.Module, config: MythosConfig) -> dict[str, Tensor]:
    """The reference's gradients; zero where it has none."""
    theirs = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return from_open_mythos(theirs, config)


def exact_gradients(main, fp64: nn.Module, case: Case, input_ids: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """The reference's gradients in float64. Its rotation would go through fp32, so it is replaced for the time."""

    def rotate(x: Tensor, table: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * table[None, :, None]).flatten(-2)

    with mock.patch.object(main, "apply_rope", rotate):
        fp64.double()(input_ids, case.n_loops).backward(direction.double())
    return gradients_by_our_names(fp64, case.config)


@pytest.mark.parametrize("theta", [10.0, 500000.0, 2e6])
def test_rotary_angles_equal_the_references_to_the_bit(open_mythos, theta):
    """Also after cached tokens, where all rows have the same length and where not."""
    config = MythosConfig(dim=64, n_heads=2, n_kv_heads=2, attn_type="gqa", rope_theta=theta, max_seq_len=300)
    expected = open_mythos.main.precompute_rope_freqs(32, 300, theta)
    rope = build_context(config, torch.Size([1, 300]), torch.device("cpu")).rope
    assert torch.equal(rope.squeeze(1), expected)
    cache = KVCache(rows=2)
    for lengths in ([7, 7], [250, 3]):
        cache.lengths = lengths
        rope = build_context(config, torch.Size([2, 4]), torch.device("cpu"), cache=cache).rope.squeeze(-2)
        for row, length in zip(rope.expand(2, 4, -1), lengths, strict=True):
            assert torch.equal(row, expected[length : length + 4])


@pytest.mark.launch
def test_logits_and_every_gradient_equal_the_reference(open_mythos, build_reference, enliven):
    """Both backends, fp32, relative 1e-5; cases whose discrete choices lie within 1e-5 of a tie are left out.

    A few gradients are sums that cancel so far that the reference's own fp32 is 1e-5 from its float64. There ours
    must be within 1e-5 of float64, or no further than twice the reference's distance (both are draws of one noise).
    """
    drawn: Counter[str] = Counter()

    # No shrinking: a smaller case is a worse conditioned one, and fails for another reason.
    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, phases=[Phase.generate])
    @given(cases())
    def check(case: Case) -> None:
        config = case.config
        generator = torch.Generator().manual_seed(case.seed)
        reference = enliven(build_reference(config), case.seed, case.halt_bias)
        if not case.router_bias:
            reference.recurrent.block.ffn.router_bias.zero_()
        watch = Watch(reference, config)
        # No token stands twice: among equal tokens attention does not matter and its gradients are rounding noise.
        input_ids = torch.randperm(config.vocab_size, generator=generator)[: case.shape.numel()].view(case.shape)
        expected = reference(input_ids, case.n_loops)
        drawn["seen"] += 1
        assume(watch.margin > MARGIN)
        drawn["compared"] += 1
        for name in classes(case, watch):
            drawn[name] += 1
            event(name)

        direction = torch.randn(expected.shape, generator=generator)
        expected.backward(direction)
        gradients = gradients_by_our_names(reference, config)
        allowed = {name: TOLERANCE * scale for name, scale in scales(case, watch, gradients).items()}
        exact: dict[str, Tensor] = {}
        for backend in ("grouped", "reference"):
            ours = Mythos(config, experts=ExpertsConfig(backend=backend))
            ours.load_open_mythos(reference.state_dict())
            logits = ours(input_ids, case.n_loops)
            assert float((logits - expected).detach().norm()) <= TOLERANCE * float(expected.detach().norm())
            logits.backward(direction)
            assert gradients.keys() == dict(ours.named_parameters()).keys()
            for name, parameter in ours.named_parameters():
                drawn["gradients"] += 1
                error = float((parameter.grad - gradients[name]).norm())
                if error <= allowed[name]:
                    continue
                drawn["judged in float64"] += 1
                if not exact:
                    fp64 = build_reference(config)
                    fp64.load_state_dict(reference.state_dict())
                    exact = exact_gradients(open_mythos.main, fp64, case, input_ids, direction)
                theirs = float((gradients[name] - exact[name]).norm())
                assert float((parameter.grad - exact[name]).norm()) <= max(allowed[name], 2 * theirs), (backend, name)

    check()
    assert set() == WANTED - drawn.keys(), "these kinds of configuration were not drawn"
    assert drawn["compared"] >= 40
    assert drawn["compared"] >= 0.9 * drawn["seen"]
    assert drawn["judged in float64"] <= 0.01 * drawn["gradients"]
