"""Broken layout rules are refused with a reason, and every proposed value works."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.selection import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_dist.config.layout import divisors, layout_problems, nearest
from mythos_dist.config.load import load_config
from mythos_dist.config.rules import problems
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError

RANKS = "the number of ranks"
Case = dict[str, Any]  # path -> value, and RANKS -> number


BASE = dataclasses.replace(Config(), data=dataclasses.replace(Config().data, path="shards"))


def config_of(case: Case) -> Config:
    sections: dict[str, dict[str, Any]] = {}
    for path, value in case.items():
        if path != RANKS:
            section, _, key = path.partition(".")
            sections.setdefault(section, {})[key] = value
    changed = {name: dataclasses.replace(getattr(BASE, name), **values) for name, values in sections.items()}
    return dataclasses.replace(BASE, **changed)


def lines(case: Case) -> list[str]:
    """All refusals: on any number of ranks and, if it is known, on this one."""
    config = config_of(case)
    return problems(config) + (layout_problems(config, case[RANKS]) if RANKS in case else [])


def refusals(case: Case) -> list[str]:
    """Refusals whose remedies consider the number of ranks, if it is known."""
    config = config_of(case)
    return layout_problems(config, case[RANKS]) if RANKS in case else problems(config)


def kind(line: str) -> str:
    """A refusal without values and remedies, to recognize it after values have changed."""
    return re.sub(r" \(model.max_loop_iters=\d+\)|=\w+|\d+", "", line.split(";")[0])


def proposals(line: str) -> Iterator[tuple[str, list[Any], bool]]:
    """The proposals of a refusal: path, values, and whether they are sufficient."""
    form = r"(with further changes )?set ([\w. ]+?) to (?:one of \[(.+?)\]|(\w+))(?:, or |$)"
    remedies = line.split("; ")[1]
    matches = list(re.finditer(form, remedies))
    assert "".join(match[0] for match in matches) == remedies, "all of the text was parsed"
    words = {"true": True, "false": False}
    for match in matches:
        values = [int(v) if v.isdigit() else words.get(v, v) for v in (match[3] or match[4]).split(", ")]
        yield match[2], values, not match[1]


def uneven(n: int, size: int) -> bool:
    """Whether n is not a multiple of `size`."""
    return n not in range(0, n + 1, size)


def count_broken_rules(case: Case) -> int:
    """An independent implementation of the rules."""
    mean = case["model.max_loop_iters"] if case["loops.mean"] is None else case["loops.mean"]
    tensor, pipe, expert = case["parallel.tensor"], case["parallel.pipe"], case["parallel.expert"]
    batch, micro_batch, context = case["train.global_batch"], case["train.micro_batch"], case["parallel.context"]
    pieces = case["train.seq_len"] // (tensor if case["parallel.sequence"] else 1)
    wrong = [
        case["loops.maximum"] is not None and case["loops.maximum"] < mean,
        case["loops.distribution"] == "fixed" and case["loops.backprop"] is not None and case["loops.backprop"] > mean,
        case["train.recompute"] in ("none", "selective") and case["train.recompute_every"] > 1,
        case["parallel.zero"] in (2, 3) and pipe > 1,
        case["parallel.zero"] == 3 and case["optim.name"] == "muon",
        len(range(pipe)[1:-1]) > mean,
        uneven(case["model.n_experts"], expert),
        uneven(case["model.n_heads"], tensor),
        expert > 1 and uneven(case["model.dim"], tensor),
        case["parallel.sequence"] and uneven(case["train.seq_len"], tensor),
        context > 1 and pieces < 2 * context,
        case["train.seq_len"] > case["model.max_seq_len"],
        uneven(batch, micro_batch),
    ]
    if RANKS not in case:
        return sum(wrong)
    if uneven(case[RANKS], pipe * context * tensor):
        return sum(wrong) + 1
    replicas = len(range(0, case[RANKS], pipe * context * tensor))
    return sum(wrong) + uneven(replicas * context, expert) + uneven(batch, micro_batch * replicas)


WORKS: Case = {
    "model.max_seq_len": 16,
    "model.n_experts_per_tok": 1,
    "model.max_loop_iters": 4,
    "model.n_heads": 12,
    "model.dim": 24,
    "model.n_experts": 12,
    "loops.distribution": "fixed",
    "loops.mean": None,
    "loops.maximum": None,
    "loops.backprop": None,
    "parallel.tensor": 2,
    "parallel.pipe": 2,
    "parallel.context": 1,
    "parallel.expert": 2,
    "parallel.sequence": True,
    "parallel.zero": 1,
    "optim.name": "adamw",
    "train.recompute": "none",
    "train.recompute_every": 1,
    "train.seq_len": 12,
    "train.micro_batch": 1,
    "train.global_batch": 12,
    RANKS: 24,
}
NUMBERS = [path for path, value in WORKS.items() if type(value) is int and path not in (RANKS, "parallel.zero")]
AXIS = st.integers(1, 6)
ANY: dict[str, st.SearchStrategy] = {
    "model.max_loop_iters": st.integers(1, 4),
    "model.n_heads": st.integers(1, 12),
    "model.dim": st.integers(8, 30),
    "model.n_experts": st.integers(1, 12),
    "loops.distribution": st.sampled_from(["fixed", "poisson"]),
    "loops.mean": st.none() | st.integers(1, 5),
    "loops.maximum": st.none() | st.integers(1, 9),
    "loops.backprop": st.none() | st.integers(1, 5),
    "parallel.tensor": AXIS,
    "parallel.pipe": AXIS,
    "parallel.context": AXIS,
    "parallel.expert": AXIS,
    "parallel.sequence": st.booleans(),
    "parallel.zero": st.sampled_from([1, 2, 3]),
    "optim.name": st.sampled_from(["adamw", "muon"]),
    "train.recompute": st.sampled_from(["none", "loop", "selective"]),
    "train.recompute_every": st.integers(1, 3),
    "train.seq_len": st.integers(1, 17),
    "train.micro_batch": st.integers(1, 4),
    "train.global_batch": st.integers(1, 24),
    RANKS: st.integers(1, 48),
}


@st.composite
def cases(draw: st.DrawFn, most: int = len(ANY)) -> Case:
    """A valid layout with up to `most` settings changed, on a known or an unknown number of ranks."""
    changed = draw(st.sets(st.sampled_from(list(ANY)), max_size=most))
    case = WORKS | {path: draw(ANY[path]) for path in ANY if path in changed}
    if draw(st.booleans()):
        del case[RANKS]
    return case


@settings(derandomize=True, deadline=None, max_examples=examples(300))
@given(cases())
def test_a_layout_is_refused_exactly_when_a_rule_is_broken(case):
    """Against the independent rules: one line per broken rule."""
    assert len(lines(case)) == count_broken_rules(case)


@settings(derandomize=True, deadline=None, max_examples=examples(200))
@given(cases())
def test_every_proposed_value_satisfies_its_rule_and_breaks_no_other_unless_it_says_so(case):
    before = {kind(line) for line in lines(case)}
    for line in refusals(case):
        if "longer than the context" in line:
            continue  # it names bounds, not values
        proposed = list(proposals(line))
        assert proposed
        for path, values, enough in proposed:
            for value in values:
                after = {kind(line) for line in lines(case | {path: value})}
                assert kind(line) not in after
                assert (after <= before) == enough


@settings(derandomize=True, deadline=None, max_examples=examples(200))
@given(cases(most=3))
def test_the_nearest_values_are_proposed(case):
    """If one rule is broken: of all numbers up to 900, the nearest below and above that satisfy all rules."""
    if count_broken_rules(case) != 1 or not (messages := refusals(case)) or "longer than the context" in messages[0]:
        return
    for path, values, enough in proposals(messages[0]):
        if type(case[path]) is not int or path == "parallel.zero":
            continue  # not a number
        working = [n for n in range(1, 901) if not count_broken_rules(case | {path: n})]
        if path == "train.micro_batch":
            assert values == working
        elif enough:
            below, above = [n for n in working if n < case[path]], [n for n in working if n > case[path]]
            assert values == below[-1:] + above[:1]
        else:
            assert working == []


@pytest.mark.launch
@settings(derandomize=True, deadline=None, max_examples=examples(200))
@given(cases(), st.sets(st.sampled_from(NUMBERS)))
def test_numbers_below_one_are_refused_once(tmp_path_factory, case, too_small):
    """No other line is about them, nor about the defaults that replace them."""
    values = {path: value for path, value in (case | dict.fromkeys(too_small, 0)).items() if path != RANKS}
    overrides = [f"{path}={'null' if value is None else value}" for path, value in values.items()]
    path = tmp_path_factory.getbasetemp() / "below_one.yaml"
    path.write_text("data: {path: shards}")
    try:
        load_config(path, overrides)
        messages = []
    except UserError as error:
        messages = error.problems
    for path in too_small:
        assert [line for line in messages if f"{path}=" in line] == [f"{path}=0 must be at least 1"]


DEFAULT_LOOPS = "loops.mean=null (model.max_loop_iters=16)"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "parallel.tensor=3",
            "model.n_heads=16 is not divisible by parallel.tensor=3: each tensor rank computes the same number of "
            "complete heads; set parallel.tensor to one of [2, 4]",
        ),
        (
            "parallel.tensor=17",
            "model.n_heads=16 is not divisible by parallel.tensor=17: each tensor rank computes the same number of "
            "complete heads; set parallel.tensor to 16",
        ),
        (
            "parallel.pipe=4 parallel.zero=3",
            "parallel.zero=3 does not work with parallel.pipe=4: DeepSpeed's PipelineEngine cannot shard gradients or "
            "parameters; set parallel.zero to 1, or set parallel.pipe to 1",
        ),
        (
            "parallel.pipe=19",
            f"parallel.pipe=19 is more than {DEFAULT_LOOPS} + 2: every stage except the first and the last must run "
            "a loop; set parallel.pipe to 18",
        ),
        (
            "parallel.pipe=4 loops.mean=1",
            "parallel.pipe=4 is more than loops.mean=1 + 2: every stage except the first and the last must run a "
            "loop; set parallel.pipe to 3",
        ),
        (
            "parallel.expert=6",
            "model.n_experts=64 is not divisible by parallel.expert=6: each rank of an expert group holds the same "
            "number of experts; set parallel.expert to one of [4, 8]",
        ),
        (
            "parallel.expert=2 parallel.tensor=4 model.dim=30",
            "model.dim=30 is not divisible by parallel.tensor=4: with parallel.expert=2 each tensor rank sends an "
            "equal part of every row; set parallel.tensor to 2, or set parallel.expert to 1",
        ),
        (
            "parallel.sequence=true parallel.tensor=4 train.seq_len=1021",
            "train.seq_len=1021 is not divisible by parallel.tensor=4: with parallel.sequence=true each tensor rank "
            "holds an equal part of the sequence; set train.seq_len to one of [1020, 1024], or set parallel.tensor to "
            "1, or set parallel.sequence to false",
        ),
        (
            "parallel.context=300 train.seq_len=512",
            "parallel.context=300 is too many for train.seq_len=512: each rank gets at least two pieces of a sequence, "
            "of 1 or more tokens; set parallel.context to 256, or set train.seq_len to 600",
        ),
        (
            "parallel.context=2 model.dropout=0.1",
            "model.dropout=0.1 does not work with parallel.context=2: attention computes the scores of keys piece by "
            "piece, and again in the backward pass, where their dropout would be another; set model.dropout to 0.0, or "
            "set parallel.context to 1",
        ),
        (
            "train.recompute_every=2",
            "train.recompute_every=2 has no effect with train.recompute=none: only `loop` recomputes several loops at "
            "once; set train.recompute to loop, or set train.recompute_every to 1",
        ),
        (
            "loops.maximum=3",
            f"loops.maximum=3 is less than {DEFAULT_LOOPS}: no step runs more than the maximum; "
            "set loops.maximum to 16, or set loops.mean to 3",
        ),
        (
            "loops.backprop=17",
            f"loops.backprop=17 is more than {DEFAULT_LOOPS}, and a step with loops.distribution=fixed never runs "
            "more; set loops.backprop to 16",
        ),
    ],
)
def test_a_refusal_is_one_line_with_values_reason_and_remedy(overrides, message, tmp_path):
    (tmp_path / "config.yaml").write_text("data: {path: shards}")
    with pytest.raises(UserError) as raised:
        load_config(tmp_path / "config.yaml", overrides.split())
    assert raised.value.problems == [message]


@pytest.mark.parametrize(
    ("ranks", "case", "message"),
    [
        (
            12,
            {"parallel.tensor": 4, "parallel.pipe": 2},
            "the number of ranks, 12, is not divisible by parallel.pipe=2 x parallel.tensor=4 = 8, the ranks of one "
            "replica; set parallel.pipe to 3, or set the number of ranks to one of [8, 16], "
            "or with further changes set parallel.tensor to 2",
        ),
        (
            8,
            {"parallel.tensor": 2, "parallel.expert": 8},
            "the number of replicas, 4 (8 ranks / parallel.pipe=1 / parallel.tensor=2), is not divisible by "
            "parallel.expert=8, the replicas that share one copy of the experts; "
            "set parallel.expert to 4, or set the number of ranks to 16",
        ),
        (
            4,
            {"parallel.expert": 8, "train.global_batch": 4},
            "the number of replicas, 4 (4 ranks / parallel.pipe=1 / parallel.tensor=1), is not divisible by "
            "parallel.expert=8, the replicas that share one copy of the experts; "
            "set parallel.expert to 4, or with further changes set the number of ranks to 8",
        ),
        (
            12,
            {"parallel.context": 8},
            "the number of ranks, 12, is not divisible by parallel.pipe=1 x parallel.context=8 x parallel.tensor=1 = "
            "8, the ranks of one replica; set parallel.context to one of [6, 12], or set the number of ranks to one of "
            "[8, 16]",
        ),
        (
            8,
            {"parallel.context": 4, "parallel.expert": 16},
            "data x context, 8 ranks (8 ranks / parallel.pipe=1 / parallel.tensor=1), is not divisible by "
            "parallel.expert=16, the ranks that share one copy of the experts; "
            "set parallel.expert to 8, or set the number of ranks to 16",
        ),
        (
            8,
            {"parallel.tensor": 2, "parallel.pipe": 2, "train.micro_batch": 8},
            "train.global_batch=8 is not divisible by train.micro_batch=8 x 2 (replicas) = 16: every replica runs the "
            "same number of micro-batches; set train.micro_batch to one of [1, 2, 4], or set train.global_batch to 16",
        ),
        (
            3,
            {},
            "train.global_batch=8 is not divisible by train.micro_batch=1 x 3 (replicas) = 3: every replica runs the "
            "same number of micro-batches; set train.global_batch to one of [6, 9]",
        ),
    ],
)
def test_a_refusal_on_a_number_of_ranks(ranks, case, message):
    assert problems(config_of(case)) == []
    assert layout_problems(config_of(case), ranks) == [message]


def test_every_broken_rule_is_reported_at_once():
    case = {
        "parallel.tensor": 3,
        "parallel.pipe": 19,
        "parallel.expert": 5,
        "parallel.zero": 2,
        "parallel.sequence": True,
        "train.recompute_every": 2,
        "loops.maximum": 1,
        "loops.backprop": 17,
    }
    messages = problems(config_of(case))
    assert len(messages) == len(set(messages)) == 9
    for path in case:
        assert any(f"{path}=" in line for line in messages), path


@pytest.mark.parametrize(
    "case",
    [
        # Sharded widths are padded.
        {"parallel.tensor": 4, "model.vocab_size": 1001, "model.lora_rank": 3, "model.dim": 2050},
        {"parallel.tensor": 4, "model.q_lora_rank": 7, "model.kv_lora_rank": 5, "model.expert_dim": 9},
        # Key-value heads that do not divide are replicated.
        {"parallel.tensor": 16, "model.attn_type": "gqa", "model.n_kv_heads": 2},
        {"parallel.sequence": True, "train.seq_len": 1021},  # nothing is sharded without tensor parallelism
        {"loops.distribution": "poisson", "loops.backprop": 17},  # some steps run more than the mean
        {"loops.maximum": 16, "loops.backprop": 16, "train.recompute": "loop", "train.recompute_every": 4},
        {"parallel.pipe": 18, "model.prelude_layers": 0, "model.coda_layers": 0},
        {"parallel.zero": 3, "parallel.tensor": 16, "parallel.expert": 64, "parallel.sequence": True},
    ],
)
def test_valid_layouts_are_not_refused(case):
    assert problems(config_of(case)) == []


def test_nearest():
    assert nearest(5, [8, 1, 2, 4]) == [4, 8]
    assert nearest(9, [1, 2, 4, 8]) == [8]
    assert nearest(1, [1, 2, 4]) == [2]
    assert nearest(3, [3]) == []


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]
