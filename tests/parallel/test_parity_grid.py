"""The parity grid: training at every layout equals training on one process without DeepSpeed.

fp32, four optimizer steps with clipping that bites, weight decay, accumulation, a router bias that moves, document
masks, another number of loops in every step, gradient through the last two of them. Widths divide by no tensor degree.
Layouts that share a number of ranks share a launch, which runs those of them that were selected. Losses, gradient norms
and sample ids must be those of the one process, initial values bit for bit, and after the last step every parameter and
both of Adam's moments.
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.launch import run_ranks
from helpers.parity import STEPS, change, train_reference, train_under_deepspeed
from helpers.parity_rows import BF16, GRID, LONG, SAME_RESULTS
from helpers.selection import selected

from mythos_dist.config.layout import layout_problems
from mythos_dist.config.rules import problems
from mythos_dist.config.schema import BY_MODE, Config, RopeScaling

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1800)]

CLIP = 0.2
BIAS = {"one expert": [1e3] + [0.0] * 7, "idle ranks": [1e3, 1e3] + [0.0] * 6}  # experts 0, or 0 and 1, get all tokens


def run_of(config: Config, kind: str, conversations: str = "") -> Config:
    """The run that a kind names, at no particular layout. `conversations`: a folder of shards with a loss mask."""
    config = change(
        config,
        model=dict(vocab_size=515, q_lora_rank=18, lora_rank=6, expert_dim=30, max_loop_iters=4),
        train=dict(global_batch=8, micro_batch=1),
        experts=dict(bias_update_rate=0.01, z_loss=0.01, sequence_balance_loss=0.01),
        loops=dict(distribution="poisson", mean=3, maximum=5, backprop=2),
        act=dict(mode="safe", ponder_cost=0.01, kl=0.01),
        # Adam divides by sqrt(v) + eps: with 1e-8 it would blow the rounding of a gradient of 1e-7 up to a step of lr.
        optim=dict(grad_clip=CLIP, eps=1e-6),
        run=dict(seed=18),
    )
    if kind == "shared keys":  # a group of loops begins without gradient, or on another stage
        return change(config, model=dict(kv_sharing="every:2"), train=dict(recompute="loop", recompute_every=2))
    if kind == "first keys":  # all stages use those of the first; a loss after every loop
        loops = dict(distribution="uniform_set", set=(1, 2, 3, 5), mean=None, backprop=None, objective="per_loop")
        return change(config, model=dict(kv_sharing="first", attn_type="gqa"), loops=loops)
    if kind == "keys by sequence":
        model = dict(kv_sharing="every:2", attn_type="gqa", initial_state="e")
        return change(config, model=model, loops=dict(per="sequence"))
    if kind == "normed states":  # scaled residuals, and a penalty on the last loop's change
        model = dict(residual_scale="inverse_sqrt", state_norm=True)
        return change(config, model=model, loops=dict(fixed_point=0.2, per="sequence"))
    if kind == "no injection":  # a plain transformer, whose middle layer is looped
        model = dict(injection="none", lora="none", initial_state="e", attn_type="gqa")
        return change(config, model=model, loops=dict(backprop=None))
    if kind == "retrofit":  # what a pretrained model brings, and an injection that begins as none
        model = dict(injection="difference", lora="none", initial_state="e", attn_type="gqa", loop_layers=2)
        model |= dict(
            norm_eps=1e-5, dense_dim=50, gqa_head_dim=6, qkv_bias=True, key_norm_weight=True, n_shared_experts=0
        )
        model |= dict(tie_embeddings=False, expert_dim=64)
        return change(config, model=model)
    if kind in ("two layers", "three layers"):  # of the looped block, with routers of their own
        model = dict(loop_layers=2, kv_sharing="every:2") if kind == "two layers" else dict(loop_layers=3)
        return change(config, model=model)
    if kind == "gqa":
        return change(config, model=dict(attn_type="gqa"))
    if kind == "no halting":
        return change(config, act=dict(mode="off", ponder_cost=0.0, kl=0.0))
    if kind == "as shipped":
        return change(config, model=BY_MODE["reference"], act=dict(mode="reference"))
    if kind == "ponder":
        loops = dict(distribution="lognormal_poisson", backprop=None, objective="per_loop")
        return change(config, act=dict(mode="ponder", prior=0.3), loops=loops)
    if kind == "per loop":
        others = dict(lora="per_loop")
        loops = dict(distribution="uniform_set", set=(1, 2, 3, 5), mean=None, objective="per_loop", teacher=0.7)
        return change(config, model=others, loops=loops)
    if kind == "sequences":  # each with a depth of its own, half of the run with a mean that grows
        others = dict(initial_state="random", injection="reference", attn_type="gqa")
        loops = dict(per="sequence", curriculum="1-sqrt", curriculum_steps=2)
        return change(config, model=others, loops=loops)
    if kind == "one expert":
        return change(config, model=dict(n_experts_per_tok=1))
    if kind == "odd widths":  # every group of parameters is padded, experts' too
        return change(config, model=dict(dim=36, expert_dim=7, n_experts=6))
    if kind == "muon":  # fused shared experts, a LoRA per loop, matrices that no axis divides
        model = dict(n_shared_experts=2, lora="per_loop", dim=36, expert_dim=7, n_experts=6)
        return change(config, model=model, optim=dict(name="muon", muon_lr=1e-3))
    if kind == "bare":  # a stage without any block, and one without experts
        return change(config, model=dict(prelude_layers=0, coda_layers=0, vocab_size=4000))
    if kind == "two loops":  # as many stages as can be: loops + 2
        return change(config, loops=dict(mean=2))
    if kind == "targets":  # stored for each loop, unequally many: a label of the global batch weighs the same anywhere
        loops = dict(distribution="uniform_set", set=(1, 2, 3, 5), mean=None, objective="per_loop", per="sequence")
        return change(config, loops=loops, data=dict(path="3 targets"))
    if kind == "completions":  # of conversations: labels of prompts do not count
        return change(config, data=dict(path=conversations))
    if kind == "prime":  # a length that nothing divides, of a context that is stretched
        original = config.model.max_seq_len // 2
        scaling = RopeScaling(kind="yarn", factor=2, original_max_seq_len=original, mscale=1.0, mscale_all_dim=1.0)
        model = dict(rope_scaling=scaling, max_seq_len=2 * original)
        return change(config, model=model, train=dict(seq_len=31), data=dict(path=""))
    return config


def at_layout(config: Config, parallel: dict[str, Any], kind: str, ranks: int) -> Config:
    """The run at a layout, with two micro-batches per replica and step; refused if the layout cannot work."""
    recompute: dict[str, dict[str, Any]] = {
        "loop": dict(recompute="loop", recompute_every=2),
        "selective": dict(recompute="selective"),
        "pieces": dict(recompute="loop", chunk_tokens=14),  # divides no number of tokens
        "taught pieces": dict(recompute="selective", chunk_tokens=10),
        "offloaded": dict(recompute="loop", offload="saved"),
        "offloaded sum": dict(recompute="loop", offload="saved", chunk_tokens=24),
    }
    replicas = ranks // math.prod(parallel.get(axis, 1) for axis in ("tensor", "pipe", "context"))
    micro_batch = config.train.global_batch // (2 * replicas)
    config = change(config, parallel=parallel, train=dict(micro_batch=micro_batch, **recompute.get(kind, {})))
    refused = layout_problems(config, ranks) + [line for line in problems(config) if not line.startswith("data.path")]
    assert not refused, refused
    return config


@pytest.fixture(scope="module")
def reference(config, conversations) -> Callable[[str], dict[str, Any]]:
    """A kind's run on one process."""
    return functools.cache(lambda kind: train_reference(run_of(config, kind, str(conversations)), BIAS.get(kind)))


@pytest.fixture(scope="module")
def runs(config, conversations, tmp_path_factory, request) -> Callable[[int], dict[str, list[Any]]]:
    """What every rank of every selected case found, for a number of ranks: one launch each, when first asked for."""
    asked = selected(request, "case")
    resumed = selected(request, "case", "test_a_run_resumes_bit_for_bit")

    @functools.cache
    def launch(ranks: int) -> dict[str, list[Any]]:
        cases = [case[1:] for case in GRID + LONG if case[0] == ranks and name_of(*case) in asked]
        all_runs = [run_of(config, SAME_RESULTS.get(kind, kind), str(conversations)) for _, kind in cases]
        at_layouts = [at_layout(run, *case, ranks) for run, case in zip(all_runs, cases, strict=True)]
        work = [(run, BIAS.get(kind)) for run, (_, kind) in zip(at_layouts, cases, strict=True)]
        try:
            folder = str(tmp_path_factory.mktemp("checkpoints"))
            folders = [f"{folder}/{i}" if name_of(ranks, *case) in resumed else "" for i, case in enumerate(cases)]
            values = run_ranks(ranks, train_under_deepspeed, work, folders, seconds=2000)
        except AssertionError as error:
            failure = error  # remembered: every case of this launch fails with it
            return defaultdict(lambda: [failure])
        return {name_of(ranks, *case): list(each) for case, each in zip(cases, zip(*values, strict=True), strict=True)}

    return launch


def name_of(ranks: int, parallel: dict[str, Any], kind: str) -> str:
    axes = " ".join(f"{axis}={degree}" for axis, degree in parallel.items())
    return f"{ranks} ranks, {axes or 'data'}, {kind}"


CASES = [
    *(name_of(*case) for case in GRID),
    *(pytest.param(name_of(*case), marks=pytest.mark.long) for case in LONG),
]


def resumed_cases() -> list[Any]:
    """CASES; the mark `long` for those whose axes, ZeRO stage and optimizer another one resumes: a checkpoint does not
    depend on what a step computes from the config and its number."""
    states, cases = set(), []
    for ranks, parallel, kind in GRID + LONG:
        axes = sorted(f"{axis}={size}" if axis == "zero" else axis for axis, size in parallel.items())
        state = (*(axis for axis in axes if axis != "sequence"), kind == "muon")
        marks = pytest.mark.long if state in states or (ranks, parallel, kind) in LONG else ()
        cases.append(pytest.param(name_of(ranks, parallel, kind), marks=marks))
        states.add(state)
    return cases


@pytest.mark.parametrize("kind", sorted({kind for *_, kind in GRID} - set(SAME_RESULTS)))
def test_the_reference_run_covers_what_it_should(kind, reference):
    """Clipping is active, the number of loops varies, and the special runs do what their names say."""
    run = reference(kind)
    assert min(run["grad_norm"]) > CLIP
    assert min(run["expert_share"]) > 0.01, "routed experts must count in the norm"
    if kind == "mla":
        assert all(a != b for a, b in itertools.pairwise(run["n_loops"]))
        assert min(run["n_loops"]) <= 2, "a pipeline of four stages must meet a step with fewer loops than stages"
    if kind in BIAS:
        assert run["idle"] == [{"one expert": 7, "idle ranks": 6}[kind]] * STEPS


def test_every_pair_of_axes_and_every_kind_of_a_long_row_is_in_another_row():
    """Of kinds at a layout with an axis."""

    def pairs(rows: list[tuple[int, dict[str, Any], str]]) -> set[tuple[str, ...]]:
        named = [
            sorted(f"zero={degree}" if axis == "zero" else axis for axis, degree in row.items()) for _, row, _ in rows
        ]
        return {pair for axes in named for pair in itertools.combinations(axes, 2)}

    assert pairs(LONG) <= pairs(GRID)
    assert {kind for *_, kind in LONG} <= {kind for _, axes, kind in GRID if axes}


@pytest.mark.parametrize("case", CASES)
def test_training_at_a_layout_equals_one_process(case, runs, reference):
    kind = case.rsplit(", ", 1)[1]
    expected = reference(SAME_RESULTS.get(kind, kind))
    held = defaultdict(list)
    copies: dict[tuple, list[torch.Tensor]] = {}
    for got in runs(int(case[0]))[case]:
        if isinstance(got, AssertionError):
            raise got
        assert got["n_loops"] == expected["n_loops"]
        assert got["ids"] == expected["ids"]
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        if got["bias"] is not None:
            assert torch.equal(got["bias"], expected["bias"])
        for name, (start, stop) in got["places"].items():
            place = tuple(slice(*ends) for ends in zip(start, stop, strict=True))
            held[name].append(place)
            copy = copies.setdefault((name, *start, *stop), got["final"][name])
            assert all(map(torch.equal, copy, got["final"][name])), f"copies of {name} have drifted apart"
            assert torch.equal(got["initial"][name], expected["initial"][name][place]), name
            for i, (ours, whole) in enumerate(zip(got["final"][name], expected["final"][name], strict=True)):
                if whole[place].numel():
                    what = f"moment {i}" if i else "parameter"
                    # What began with zeros is as large as Adam's steps, which magnify the rounding of small gradients.
                    least = 1e-30 if i else 0.05
                    difference = (ours - whole[place]).abs().max() / whole.abs().max().clamp(min=least)
                    assert difference <= 1e-4, f"{name}, {what}: {difference:.1e}"
    for name, whole in expected["initial"].items():
        seen = torch.zeros(whole.shape, dtype=torch.bool)
        for place in held[name]:
            seen[place] = True
        assert seen.all(), f"no rank holds all of {name}"


@pytest.mark.parametrize("case", resumed_cases())
def test_a_run_resumes_bit_for_bit(case, runs):
    """From the checkpoint after half of the steps, on ranks with other initial values: all later results are equal."""
    for got in runs(int(case[0]))[case]:
        if isinstance(got, AssertionError):
            raise got
        assert_resumed(got)


def assert_resumed(got: dict[str, Any]) -> None:
    resumed = got["resumed"]
    for key in ("loss", "grad_norm", "n_loops", "skipped"):
        assert resumed[key] == got[key][STEPS // 2 :], key
    assert got["bias"] is None or torch.equal(resumed["bias"], got["bias"])
    assert resumed["final"].keys() == got["final"].keys()
    for name, tensors in got["final"].items():
        assert all(map(torch.equal, resumed["final"][name], tensors)), name


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, [(dict(zero=2), "bf16"), (dict(zero=2), "fp16"), (dict(zero=3), "fp16"), (dict(tensor=2), "bf16")]),
        (4, [(dict(pipe=2, expert=2), "fp16")]),
        pytest.param(2, [(dict(), "bf16"), (dict(), "fp16"), (dict(zero=3), "bf16")], marks=pytest.mark.long),
        pytest.param(2, [(dict(tensor=2), "fp16")], marks=pytest.mark.long),
        pytest.param(4, [(dict(pipe=2, expert=2), "bf16")], marks=pytest.mark.long),
        pytest.param(4, [(dict(expert=2, zero=3), dtype) for dtype in ("bf16", "fp16")], marks=pytest.mark.long),
    ],
    ids=str,
)
def test_half_precision_resumes_bit_for_bit(config, tmp_path, ranks, cases):
    """With fp16's loss scale: it starts so high that steps are skipped before and after the checkpoint."""
    runs = [change(run_of(config, "mla"), train=dict(dtype=dtype)) for _, dtype in cases]
    work = [(at_layout(run, at, "mla", ranks), None) for run, (at, _) in zip(runs, cases, strict=True)]
    folders = [str(tmp_path / str(i)) for i in range(len(work))]
    for rank in run_ranks(ranks, train_under_deepspeed, work, folders, seconds=1200):
        for (_, dtype), got in zip(cases, rank, strict=True):
            if dtype == "fp16":
                before, after = got["skipped"][: STEPS // 2], got["skipped"][STEPS // 2 :]
                assert any(before) and any(after) and not all(got["skipped"]), got["skipped"]
            assert_resumed(got)


@pytest.mark.parametrize("worlds", [(1, 2), pytest.param((1, 4, 8), marks=pytest.mark.long)], ids=str)
def test_bf16_follows_bf16_at_every_layout(config, worlds):
    """Against one rank in bf16. Half precision rounds differently at each layout: 2e-2."""
    expected: dict[str, dict[str, Any]] = {}
    for ranks in worlds:
        cases = [(parallel, kind) for world, parallel, kind in BF16 if world == ranks]
        half = [change(run_of(config, kind), train=dict(dtype="bf16")) for _, kind in cases]
        work = [(at_layout(run, *case, ranks), None) for run, case in zip(half, cases, strict=True)]
        for (parallel, kind), got in zip(
            cases, run_ranks(ranks, train_under_deepspeed, work, seconds=800)[0], strict=True
        ):
            known = expected.setdefault(kind, got)
            assert got["loss"] == pytest.approx(known["loss"], rel=2e-2), name_of(ranks, parallel, kind)
            assert got["grad_norm"] == pytest.approx(known["grad_norm"], rel=5e-2), name_of(ranks, parallel, kind)
