"""The parity grid: training at every layout equals training on one process without DeepSpeed.

fp32, three optimizer steps with clipping that bites, weight decay, accumulation, a router bias that moves, document
masks, another number of loops in every step, gradient through the last two of them. Widths divide by no tensor degree.
Layouts that share a number of ranks share a launch, which runs those of them that were selected. Losses, gradient norms
and sample ids must be those of the one process, initial values bit for bit, and after the last step every parameter and
both of Adam's moments.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.launch import run_ranks
from helpers.parity import STEPS, change, train_reference, train_under_deepspeed
from helpers.parity_kinds import BIAS, CLIP, at_layout, bias_of, parts, run_of, sequences_of, with_equal_results
from helpers.parity_rows import BF16, GRID, LONG
from helpers.selection import selected

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def reference(config, conversations) -> Callable[[str, int], dict[str, Any]]:
    """A kind's run on one process, with a number of sequences in each step."""
    return functools.cache(
        lambda kind, sequences: train_reference(run_of(config, kind, str(conversations), sequences), bias_of(kind))
    )


@pytest.fixture(scope="module")
def runs(config, conversations, tmp_path_factory, request) -> Callable[[int], dict[str, list[Any]]]:
    """What every rank of every selected case found, for a number of ranks: one launch each, when first asked for."""
    asked = selected(request, "case")
    resumed = selected(request, "case", "test_a_run_resumes_bit_for_bit")

    @functools.cache
    def launch(ranks: int) -> dict[str, list[Any]]:
        cases = [case[1:] for case in GRID + LONG if case[0] == ranks and name_of(*case) in asked]
        work = [
            (
                at_layout(run_of(config, kind, str(conversations), sequences_of(parallel, ranks)), parallel, ranks),
                bias_of(kind),
            )
            for parallel, kind in cases
        ]
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


SEQUENCES = {name_of(*case): sequences_of(case[1], case[0]) for case in GRID + LONG}
CASES = [
    *(name_of(*case) for case in GRID),
    *(pytest.param(name_of(*case), marks=pytest.mark.long) for case in LONG),
]


def resumed_cases() -> list[Any]:
    """CASES; the mark `long` where earlier rows resume with each two of the axes, ZeRO stages and optimizers: a
    checkpoint does not depend on what a step computes from the config and its number."""
    known, cases = set(), []
    for ranks, parallel, kind in GRID + LONG:
        axes = {f"{axis}={size}" if axis == "zero" else axis for axis, size in parallel.items()} - {"sequence"}
        state = sorted(axes | ({"muon"} if "muon" in parts(kind) else set()))
        pairs = set(itertools.combinations_with_replacement(state, 2))
        marks = pytest.mark.long if pairs <= known or (ranks, parallel, kind) in LONG else ()
        cases.append(pytest.param(name_of(ranks, parallel, kind), marks=marks))
        known |= pairs
    return cases


@pytest.mark.parametrize(
    ("kind", "sequences"),
    sorted({(with_equal_results(kind), sequences_of(parallel, ranks)) for ranks, parallel, kind in GRID}),
)
def test_the_reference_run_covers_what_it_should(kind, sequences, reference):
    """Clipping is active, the number of loops varies, and the special runs do what their names say."""
    run = reference(kind, sequences)
    assert min(run["grad_norm"]) > CLIP
    assert min(run["expert_share"]) > 0.01, "routed experts must count in the norm"
    if kind == "mla":
        assert all(a != b for a, b in itertools.pairwise(run["n_loops"]))
    if kind in ("mla", "bare + two loops"):
        assert min(run["n_loops"]) <= 2, "a pipeline of four stages must meet a step with fewer loops than stages"
    for part in BIAS.keys() & set(parts(kind)):
        assert run["idle"] == [{"one expert": 7, "idle ranks": 6}[part]] * STEPS


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_at_a_layout_equals_one_process(case, runs, reference):
    compare(runs(int(case[0]))[case], reference(with_equal_results(case.rsplit(", ", 1)[1]), SEQUENCES[case]))


def compare(ranks: list[Any], expected: dict[str, Any]) -> None:
    """What every rank found, or an error, against the run on one process."""
    held = defaultdict(list)
    copies: dict[tuple, list[torch.Tensor]] = {}
    for got in ranks:
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


@pytest.mark.parametrize("case", resumed_cases(), ids=str)
def test_a_run_resumes_bit_for_bit(case, runs):
    """From the checkpoint after half of the steps, on ranks with other initial values: all later results are equal."""
    for got in runs(int(case[0]))[case]:
        if isinstance(got, AssertionError):
            raise got
        assert_resumed(got)


def assert_resumed(got: dict[str, Any]) -> None:
    resumed = got["resumed"]
    for key in ("loss", "grad_norm", "n_loops", "skipped"):
        assert resumed[key] == got[key][len(got[key]) // 2 :], key
    assert got["bias"] is None or torch.equal(resumed["bias"], got["bias"])
    assert resumed["final"].keys() == got["final"].keys()
    for name, tensors in got["final"].items():
        assert all(map(torch.equal, resumed["final"][name], tensors)), name


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, [(dict(zero=2), "bf16"), (dict(zero=3), "fp16"), (dict(tensor=2), "bf16")]),
        (4, [(dict(pipe=2, expert=2), "fp16")]),
        pytest.param(2, [(dict(), "bf16"), (dict(), "fp16"), (dict(zero=3), "bf16")], marks=pytest.mark.long),
        pytest.param(2, [(dict(zero=2), "fp16"), (dict(tensor=2), "fp16")], marks=pytest.mark.long),
        pytest.param(4, [(dict(pipe=2, expert=2), "bf16")], marks=pytest.mark.long),
        pytest.param(4, [(dict(expert=2, zero=3), dtype) for dtype in ("bf16", "fp16")], marks=pytest.mark.long),
    ],
    ids=str,
)
def test_half_precision_resumes_bit_for_bit(config, tmp_path, ranks, cases):
    """With fp16's loss scale: it starts so high that steps are skipped before and after the checkpoint."""
    num_steps = 4
    runs = [change(run_of(config, "mla"), train=dict(dtype=dtype)) for _, dtype in cases]
    work = [(at_layout(run, at, ranks), None) for run, (at, _) in zip(runs, cases, strict=True)]
    folders = [str(tmp_path / str(i)) for i in range(len(work))]
    for rank in run_ranks(ranks, train_under_deepspeed, work, folders, num_steps, seconds=1200):
        for (_, dtype), got in zip(cases, rank, strict=True):
            if dtype == "fp16":
                before, after = got["skipped"][: num_steps // 2], got["skipped"][num_steps // 2 :]
                assert any(before) and any(after) and not all(got["skipped"]), got["skipped"]
            assert_resumed(got)


@pytest.mark.parametrize("worlds", [(1, 2), pytest.param((1, 4, 8), marks=pytest.mark.long)], ids=str)
def test_bf16_follows_bf16_at_every_layout(config, worlds):
    """Against one rank in bf16. Half precision rounds differently at each layout: 2e-2."""
    expected: dict[str, dict[str, Any]] = {}
    kinds = {kind for world, _, kind in BF16 if world in worlds[1:]}
    for ranks in worlds:
        cases = [(parallel, kind) for world, parallel, kind in BF16 if world == ranks and kind in kinds]
        half = [change(run_of(config, kind), train=dict(dtype="bf16")) for _, kind in cases]
        work = [(at_layout(run, parallel, ranks), None) for run, (parallel, _) in zip(half, cases, strict=True)]
        for (parallel, kind), got in zip(
            cases, run_ranks(ranks, train_under_deepspeed, work, seconds=800)[0], strict=True
        ):
            known = expected.setdefault(kind, got)
            assert got["loss"] == pytest.approx(known["loss"], rel=2e-2), name_of(ranks, parallel, kind)
            assert got["grad_norm"] == pytest.approx(known["grad_norm"], rel=5e-2), name_of(ranks, parallel, kind)
