"""The planner's command line: order of arguments, bounds, invalid values."""

import json
import time
from pathlib import Path

import pytest

from mythos_dist.errors import UserError
from mythos_dist.ops.plan.clusters import load_cluster
from mythos_dist.ops.plan.command import read_fixed, split_fixed

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
LAPTOP = str(CONFIGS / "clusters" / "laptop.yaml")
TINY = str(CONFIGS / "tiny_cpu.yaml")


BASE = ["--gpus", "2", "--cluster", LAPTOP]


@pytest.mark.parametrize(
    "arguments",
    [
        [TINY, "--top", "1", *BASE, "--fixed", "tensor=1", "pipe=1", "train.seq_len=128"],
        ["--fixed", "tensor=1", "pipe=1", TINY, "train.seq_len=128", "--top", "1", *BASE],
    ],
)
def test_options_config_and_overrides_work_in_any_order(arguments, plan):
    """--fixed takes all words up to the next option: overrides have a dot, and a config ends with .yaml."""
    code, out, err = plan(*arguments)
    assert code == 0, err
    assert "128 tokens" in out.splitlines()[0]
    rows = [line.split() for line in out.splitlines()[2:] if line and line.split()[0].isdigit()]
    assert len(rows) == 1 and rows[0][0] == rows[0][2] == "1"


def test_a_variant_takes_overrides_without_a_config(plan):
    one_layout = ["--fixed", "tensor=1", "pipe=1", "context=1", "zero=1"]
    code, out, err = plan("--variant", "1b", "train.seq_len=64", "--gpus", "8", "--top", "1", *one_layout)
    assert code == 0, err
    assert "64 tokens" in out


# One option of each type with every invalid value, and the others with one value below their bound.
@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((o, v) for o in ("--top", "--tokens", "--seq-len") for v in ("-1", "0", "nan", "inf", "9" * 5001, "x", "")),
        *((option, "0") for option in ("--gpus", "--imbalance", "--global-batch", "--loops")),
    ],
)
def test_an_invalid_number_is_refused_with_its_option(option, value, plan):
    code, _, err = plan(TINY, *BASE, f"{option}={value}")
    named = {"--seq-len": "train.seq_len", "--global-batch": "train.global_batch", "--loops": "loops.mean"}
    assert code == 2
    assert option in err or named.get(option, "?") in err
    assert "Traceback" not in err


def test_a_number_of_gpus_without_a_layout_is_refused_quickly(plan):
    began = time.process_time()
    code, _, err = plan("--variant", "1b", "--gpus", "131071")
    assert code == 2 and "nearest that works: --gpus" in err
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor=0x_", "expected a whole number"),
        ("tensor=2024-02-30", "expected a whole number"),
        ("tensor=" + "9" * 5001, "must be at most 65,536"),
        ("pipe=0", "must be at least 1"),
        ("tensor=!!set {a}", "expected a whole number"),
        ("sequence=!!bool maybe", "expected true or false"),
        ("recompute=all", "expected 'none', 'loop' or 'selective'"),
        ("zero=4", "expected 1, 2 or 3"),
        ("tensor", "expected a whole number"),
        ("tensr=1", "did you mean tensor?"),
    ],
)
def test_invalid_fixed_settings_are_refused(text, message):
    with pytest.raises(UserError) as raised:
        read_fixed([text])
    (problem,) = raised.value.problems
    assert message in problem and len(problem) < 300


def test_fixed_settings_have_the_types_of_the_config():
    assert read_fixed(["tensor=16,pipe=1", "sequence=true", "recompute=none", "zero=3"]) == {
        "tensor": 16,
        "pipe": 1,
        "sequence": True,
        "recompute": "none",
        "zero": 3,
    }
    assert split_fixed(["tensor=1", "a.yaml", "train.steps=1", "x"]) == (["tensor=1", "x"], ["a.yaml", "train.steps=1"])


@pytest.mark.parametrize(
    "line",
    [
        "gpus_per_node: 2024-02-30",
        "gpus_per_node: 0x_",
        "memory_gb: " + "9" * 5001,
        "memory_gb: .nan",
        "memory_gb: 1e300",
        "memory_gb: !!set {a}",
        "memory_gb: !!bool maybe",
        "memory_gb: " + "[" * 500,
        "memory_gb: true",
        'name: "a\\0"',
    ],
)
def test_odd_yaml_in_a_cluster_file_is_refused(line, tmp_path):
    path = tmp_path / "cluster.yaml"
    kept = [one for one in Path(LAPTOP).read_text().splitlines() if not one.startswith(line.split(":")[0])]
    path.write_text("\n".join([*kept, line]))
    with pytest.raises(UserError) as raised:
        load_cluster(path)
    assert str(path) in str(raised.value) and len(str(raised.value)) < 500


def test_a_numeric_cluster_name_stays_text(tmp_path):
    path = tmp_path / "cluster.yaml"
    kept = [one for one in Path(LAPTOP).read_text().splitlines() if not one.startswith("name:")]
    path.write_text("\n".join([*kept, "name: 007"]))
    assert load_cluster(path).name == "007"


@pytest.mark.launch
def test_where_nothing_fits_the_smallest_cluster_is_named_and_enough(plan):
    """One GPU less than named is too few: the planner's own search on both."""
    code, out, _ = plan("--variant", "10b", "--gpus", "1")
    assert code == 1 and "largest part: " in out
    code, output, _ = plan("--variant", "10b", "--gpus", "1", "--json")
    answer = json.loads(output)
    gpus = answer["smallest_cluster"]
    assert code == 1 and answer["fits"] is False and f"{gpus} GPUs" in out
    assert plan("--variant", "10b", "--gpus", str(gpus), "--top", "1")[0] == 0
    assert plan("--variant", "10b", "--gpus", str(gpus // 2), "--top", "1")[0] == 1
