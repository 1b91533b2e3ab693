"""Random configs: whatever is given is a Config or a UserError, within two seconds of processor time.

    FUZZ_EXAMPLES=4000 python -m pytest tests/config/test_fuzz.py

tries more of them. What is accepted goes through the rules of layouts and, where it is small enough for a rank to
exist, through the planner; and it must come back from its own dump.
"""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.selection import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mythos_dist.config.dump import dump_config
from mythos_dist.config.fields import Kind, kinds_of
from mythos_dist.config.layout import layout_problems
from mythos_dist.config.load import SECTIONS, load_config
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.ops.plan.clusters import load_cluster
from mythos_dist.ops.plan.estimate import Estimate

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", examples(120)))
LIMIT = 2.0  # seconds of this process, which other processes do not lengthen
CLUSTER = load_cluster(REPOSITORY / "configs" / "clusters" / "h100_80gb.yaml")
FUZZ = settings(
    deadline=None,
    max_examples=EXAMPLES,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)

ABSURD = st.sampled_from(
    [
        *["0", "-1", "-0", "1", "2", "7", "97", "1e3", "1e300", "-1e300", "1e-300", "1e999", "1e99999999999999999999"],
        *[".nan", "nan", ".inf", "-.inf", "inf", "2147483647", "2147483648", "9223372036854775808", "9" * 5001],
        *["true", "false", "null", "~", "", "yes", "off", "None", "0x_", "0x1F", "0o17", "1_000", "010", "1:30:45"],
        *["2024-02-30", "2024-01-15", "12:30:45", "007", "[]", "{}", "[1, 2]", "[a]", "{a: 1}", "{a: {b: [1]}}"],
        *["[" * 200 + "]" * 200, "{a: " * 200, "!!set {a}", "!!bool maybe", "!!binary x", "!!python/name:os.system"],
        *["&a [*a]", "*a", "'", '"', "'a'", '"\\0"', "a #b", "a: b", "- a", "? a", "|", ">", "%", "@", "`", "\t", "é"],
        *["~/x", "~nobody/x", "./~", "a=b", "{007: 1, 2024-01-15: 2}", "{a: .nan}", "{a: -1}", "{'': 1}", "kill@3:1"],
    ]
)


def value_of(kind: Kind) -> st.SearchStrategy[str]:
    """Texts of values that a field takes, at its bounds and inside."""
    if kind.choices:
        return st.sampled_from([str(choice) for choice in kind.choices])
    if kind.type is bool:
        return st.sampled_from(["true", "false"])
    if kind.type is str:
        return st.text(st.characters(exclude_characters="\n"), max_size=12)
    if kind.section:
        fields = {name: value_of(one) for name, one in kinds_of(kind.section).items()}
        return st.fixed_dictionaries({}, optional=fields).map(
            lambda values: "{" + ", ".join(f"{name}: {value}" for name, value in values.items()) + "}"
        )
    if kind.item and kind.type is tuple:
        size: dict[str, Any] = {"min_size": kind.length, "max_size": kind.length} if kind.length else {"max_size": 4}
        return st.lists(value_of(kind.item), **size).map(lambda items: f"[{', '.join(items)}]")
    if kind.item:
        return st.lists(value_of(kind.item), max_size=3).map(
            lambda items: "{" + ", ".join(f"f{i}: {weight}" for i, weight in enumerate(items)) + "}"
        )
    assert kind.range
    least, most = kind.range.least, min(kind.range.most, 1e12)
    if kind.type is int:
        small = st.integers(int(least), min(int(most), int(least) + 70))
        composite = st.sampled_from([n for n in (256, 512, 1024, 4096, 65536, 720720, 735134400) if n <= most] or [1])
        return (small | composite | st.integers(int(least), int(most)) | st.just(int(most))).map(str)
    return st.floats(least, most, allow_nan=False).map(repr)


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    """Settings of known and unknown names with right, extreme and absurd values."""
    lines = []
    for _ in range(draw(st.integers(0, 9))):
        section = draw(st.sampled_from([*SECTIONS, *SECTIONS, "modle", "", "base"]))
        names = list(kinds_of(SECTIONS[section])) if section in SECTIONS else ["x"]
        key = draw(st.sampled_from([*names, *names, "variant", "zzz", ""]))
        kind = kinds_of(SECTIONS[section]).get(key) if section in SECTIONS else None
        value = draw(ABSURD if kind is None or draw(st.integers(0, 3)) == 0 else value_of(kind))
        lines.append(f"{section}.{key}={value}")
    return lines + draw(st.lists(st.text(max_size=8), max_size=1))


def judge(path: Path, lines: list[str], ranks: int) -> Config | None:
    """The Config, or None where it was refused, in words that fit a terminal."""
    began = time.process_time()
    config = None
    try:
        config = load_config(path, lines)
        refused = layout_problems(config, ranks)
        if not refused and ranks <= 1 << 16 and config.train.global_batch <= 1 << 24:
            estimate = Estimate(config, ranks, CLUSTER)
            assert estimate.step_seconds > 0 and estimate.largest_stage.bytes > 0
    except UserError as error:
        assert len(str(error)) < 40_000
        assert all(word not in str(error) for word in ("Input should", "Traceback", "<class", "object at 0x"))
    spent = time.process_time() - began
    assert spent < LIMIT, f"{spent:.1f} s"
    return config


@FUZZ
@given(lines=overrides(), ranks=st.sampled_from([1, 2, 6, 8, 64, 720, 4096]))
def test_random_overrides_are_accepted_or_refused(tmp_path, lines, ranks):
    path = tmp_path / "config.yaml"
    path.write_text("data: {path: shards}")
    config = judge(path, lines, ranks)
    if config is not None:
        again = tmp_path / "again.yaml"
        again.write_text(dump_config(config), encoding="utf-8")
        assert load_config(again) == config


def test_every_choice_alone_is_accepted_or_refused(tmp_path):
    """Random settings rarely hit the one value that a rule is about."""
    path = tmp_path / "config.yaml"
    path.write_text("data: {path: shards}")
    for section, cls in SECTIONS.items():
        for key, kind in kinds_of(cls).items():
            for choice in kind.choices or ():
                judge(path, [f"{section}.{key}={choice}"], 1)


SCALAR = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4) | st.dates()
)
TREE = st.recursive(
    SCALAR,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from([*SECTIONS, "base", "x"]) | st.text(max_size=4) | st.integers(), inner, max_size=4
        )
    ),
    max_leaves=20,
)


@st.composite
def documents(draw: st.DrawFn) -> str:
    """Whole files: trees as PyYAML writes them, sections with texts of any kind below them, and fragments of syntax."""
    form = draw(st.integers(0, 2))
    if form == 0:
        return yaml.safe_dump(draw(TREE))
    if form == 1:
        sections: dict[str, list[Any]] = {}
        for line in draw(overrides()):
            name, _, value = line.partition("=")
            section, _, key = name.partition(".")
            sections.setdefault(section, []).append(f"  {key}: {value}")
        return "\n".join(line for name, lines in sections.items() for line in (f"{name}:", *lines))
    pieces = [
        "train:",
        " steps: 3",
        "\n",
        " ",
        "- ",
        "{",
        "}",
        "[",
        "]",
        "&a ",
        "*a",
        "<<: ",
        "!!set ",
        "!!int ",
        "'",
        '"',
    ]
    pieces += [
        "#",
        "|",
        ">",
        ": ",
        ", ",
        "? ",
        "---\n",
        "...\n",
        "%YAML 1.1\n",
        "\t",
        "model",
        "base: config.yaml\n",
        "x",
        "1",
    ]
    return "".join(draw(st.lists(st.sampled_from(pieces) | st.text(max_size=3), max_size=25)))


@FUZZ
@given(document=documents() | st.binary(max_size=40), ranks=st.sampled_from([1, 8, 4096]))
def test_random_files_are_accepted_or_refused(tmp_path, document, ranks):
    path = tmp_path / "config.yaml"
    path.write_bytes(document if isinstance(document, bytes) else document.encode("utf-8", "surrogatepass"))
    judge(path, ["data.path=shards"], ranks)


@FUZZ
@given(document=documents(), key=st.sampled_from(["gpus_per_node", "memory_gb", "name"]), value=ABSURD)
def test_random_files_of_clusters_are_accepted_or_refused(tmp_path, document, key, value):
    path = tmp_path / "cluster.yaml"
    good = (REPOSITORY / "configs" / "clusters" / "laptop.yaml").read_text()
    changed = [f"{key}: {value}" if line.startswith(key) else line for line in good.splitlines()]
    for text in (document, f"{good}\n{key}2: 1\n", "\n".join(changed)):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        began = time.process_time()
        try:
            load_cluster(path)
        except UserError as error:
            assert len(str(error)) < 10_000
        assert time.process_time() - began < LIMIT


@pytest.mark.parametrize("pipe", [1, 2, 16, 128])
def test_the_largest_layouts_are_planned_within_the_limit(pipe, tmp_path):
    """The maximum of loops, layers and stages together."""
    path = tmp_path / "config.yaml"
    path.write_text("data: {path: shards}")
    lines = [f"parallel.pipe={pipe}", "loops.mean=512", "loops.backprop=100", "model.prelude_layers=128"]
    assert judge(path, [*lines, "model.coda_layers=128"], pipe * 8) is not None
