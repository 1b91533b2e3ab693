"""Command lines: any order of options and settings, bounds, home folders."""

import argparse
from pathlib import Path

import pytest

from mythos_dist.config.arguments import add_config, integer, number, parse_arguments, path_text
from mythos_dist.errors import UserError
from mythos_dist.ops.cluster.inject import parse_faults


def parse(line: list[str], optional: bool = False) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="x")
    add_config(parser, "a file", optional)
    parser.add_argument("--flag", action="store_true")
    parser.add_argument("--top", type=integer(1, 9), default=3)
    parser.add_argument("--share", type=number(0, 1, above=True))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--input", nargs="+", type=path_text)
    return parse_arguments(parser, line)


@pytest.mark.parametrize(
    "line",
    [
        "c.yaml a.b=-1 c.d=2 --flag --top 2",
        "--flag --top 2 c.yaml a.b=-1 c.d=2",
        "c.yaml --flag a.b=-1 --top 2 c.d=2",
        "c.yaml a.b=-1 --flag --top=2 c.d=2",
        "a.b=-1 c.yaml --flag c.d=2 --top 2",
        "--flag a.b=-1 --top 2 c.d=2 c.yaml",
        "c.yaml --flag --top 2 -- a.b=-1 c.d=2",
    ],
)
def test_options_and_settings_come_in_any_order(line):
    parsed = parse(line.split())
    assert (parsed.config, parsed.overrides, parsed.flag, parsed.top) == ("c.yaml", ["a.b=-1", "c.d=2"], True, 2)


def test_a_setting_before_the_config_is_an_override(tmp_path, monkeypatch):
    assert parse(["a.b=1", "c.d=2"], optional=True).overrides == ["a.b=1", "c.d=2"]
    assert parse([], optional=True).config is None
    monkeypatch.chdir(tmp_path)
    Path("a.b=c.yaml").touch()
    assert parse(["a.b=c.yaml", "c.d=2"]).config == "a.b=c.yaml"
    assert parse(["runs/lr=3/config.yaml", "c.d=2"]).config == "runs/lr=3/config.yaml"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "the following arguments are required: CONFIG.yaml\n"),
        ("a.b=1", "required: CONFIG.yaml; a.b=1 is a setting"),
        ("c.yaml --train.steps=5", "unrecognized arguments: --train.steps=5; write train.steps=5"),
        ("c.yaml --train.steps 5", "write train.steps=5\n"),
        ("c.yaml --train.steps", "write train.steps=VALUE\n"),
        ("c.yaml --steps 5 --micro-batch=2", "write train.steps=5 train.micro_batch=2\n"),
        ("c.yaml --unknown 5", "unrecognized arguments: --unknown 5\n"),
        ("--config c.yaml", "write the file's name alone, without --config\n"),
        ("c.yaml --top -1", "--top: -1 must be at least 1"),
        ("c.yaml --top 0", "--top: 0 must be at least 1"),
        ("c.yaml --top 10", "--top: 10 must be at most 9"),
        ("c.yaml --top 1.5", "--top: '1.5': expected a whole number"),
        ("c.yaml --top " + "9" * 5001, "expected a whole number"),
        ("c.yaml --share nan", "--share: nan: expected a finite number"),
        ("c.yaml --share inf", "expected a finite number"),
        ("c.yaml --share 0", "--share: 0 must be above 0"),
        ("c.yaml --share x", "--share: 'x': expected a number"),
        ("c.yaml --out s3://bucket/x", "s3://bucket/x is a URL, but a local path is needed here"),
    ],
)
def test_wrong_arguments_are_reported(line, expected, capsys):
    with pytest.raises(SystemExit) as raised:
        parse(line.split())
    assert raised.value.code == 2
    assert expected in capsys.readouterr().err


def test_a_home_folder_is_expanded_after_an_equals_sign(tmp_path, monkeypatch):
    """A shell leaves `--out=~/x` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    parsed = parse(["c.yaml", "--out=~/x", "--input", "~/a", "hf://b/~/c"])
    assert parsed.out == tmp_path / "x"
    assert parsed.input == [f"{tmp_path}/a", "hf://b/~/c"]


def test_training_and_submission_take_any_order(monkeypatch):
    """Through the parsers of the programs themselves."""
    from mythos_dist.ops.cluster.allocation import allocation_arguments as allocation
    from mythos_dist.train.__main__ import build_parser

    monkeypatch.setattr("sys.argv", ["train", "run.dir=x", "--preflight", "c.yaml", "train.steps=3"])
    parsed = parse_arguments(build_parser())
    assert (parsed.config, parsed.overrides, parsed.preflight) == ("c.yaml", ["run.dir=x", "train.steps=3"], True)
    parsed = allocation(["run.dir=x", "--ranks", "2", "c.yaml", "train.steps=3"])
    assert (parsed.config, parsed.overrides, parsed.ranks) == ("c.yaml", ["run.dir=x", "train.steps=3"], 2)


@pytest.mark.parametrize(
    "text", ["kill@3", "kill@-1:0", "kill@" + "9" * 5001 + ":0", "kill@\u0663:0", "explode@1:0", "nan@x:1"]
)
def test_an_unknown_fault_is_refused(text):
    with pytest.raises(UserError) as raised:
        parse_faults(text)
    assert "is not a fault; write kind@step:rank" in raised.value.problems[0] and len(str(raised.value)) < 300


def test_training_reads_faults_with_its_config():
    """Before anything is written, and with all problems at once."""
    from mythos_dist.parallel.launcher import RankInfo
    from mythos_dist.train.__main__ import read

    tiny = str(Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml")
    assert read(tiny, ["faults.inject=kill@3:0"], RankInfo())[0].faults.inject == "kill@3:0"
    with pytest.raises(UserError) as raised:
        read(tiny, ["faults.inject=kill@3:0,explode@2:0,nan@x:0"], RankInfo())
    assert [problem.split()[1] for problem in raised.value.problems] == ["'explode@2:0'", "'nan@x:0'"]


def test_faults_are_read():
    assert [tuple(fault) for fault in parse_faults(" kill@3:1, bad_batch@7:0,")] == [
        ("kill", 3, 1),
        ("bad_batch", 7, 0),
    ]
