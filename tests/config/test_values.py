"""What a setting's text becomes, by the type of the setting; bounds; and YAML that no config is."""

import dataclasses
import math
import sys
import time
from pathlib import Path

import pytest

from mythos_dist.config.dump import dump_config
from mythos_dist.config.fields import kinds_of, number_of, value_problems
from mythos_dist.config.load import SECTIONS, config_from, load_config
from mythos_dist.config.schema import ActConfig, Config, DataConfig, FaultsConfig, LoopsConfig, MythosConfig
from mythos_dist.config.tree import MAX_BYTES
from mythos_dist.errors import UserError


@pytest.fixture
def write(tmp_path):
    """A function: text or bytes, file name -> path."""

    def to_file(content: str | bytes, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    return to_file


def refused(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as raised:
        load_config(path, overrides)
    return raised.value.problems


NUMBERS = [
    (section, key, kind)
    for section, cls in SECTIONS.items()
    for key, kind in kinds_of(cls).items()
    if not kind.choices and (kind.type in (int, float) or (kind.item and kind.item.type in (int, float)))
]


def test_every_number_has_a_range_and_every_section_is_checked():
    """Found by the types of the fields, so that neither a new field nor a new section can be left out."""
    assert {one.name for one in dataclasses.fields(Config)} == set(SECTIONS)
    assert {section for section, _, _ in NUMBERS} == set(SECTIONS)
    for section, key, kind in NUMBERS:
        bounds = (kind.item or kind).range
        assert bounds is not None, f"{section}.{key} has no range"
        if (kind.item or kind).type is int:
            assert bounds.most < math.inf, f"{section}.{key} has no upper bound"


@pytest.mark.parametrize(("section", "key", "kind"), NUMBERS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_number_is_accepted_at_its_bounds_and_refused_beyond(section, key, kind, write):
    """The message about it is the only one that names the setting. nan, inf and huge numbers are refused everywhere."""
    bounds, one = (kind.item or kind).range, (kind.item or kind).type
    step = 1 if one is int else max(abs(bounds.least), 1.0)
    outside = [bounds.least - step, *([bounds.least] if bounds.above else [])]
    if bounds.most < math.inf:
        outside.append(bounds.most + 1 if one is int else math.nextafter(bounds.most, math.inf))
    length = kind.length or 1
    text = {tuple: f"[{', '.join(['{0}'] * length)}]", dict: "{{web: {}}}"}.get(kind.type, "{}")
    path = write("data: {path: shards}")
    for value in [*outside, "nan", "inf", "-inf", "9" * 5001, "-" + "9" * 5001, "true"]:
        problems = refused(path, f"{section}.{key}={text.format(value)}")
        problems = [line for line in problems if f"{section}.{key}" in line]
        assert len(problems) == 1 and len(problems[0]) < 300
    cls = SECTIONS[section]
    lowest = bounds.least if not bounds.above else one(min(bounds.most, 1.0) / 2)
    for value in (one(lowest), one(bounds.most) if bounds.most < math.inf else 1e30):
        held = {tuple: (value,) * length, dict: {"web": value}}.get(kind.type, value)
        assert getattr(cls.from_checked_values(**{key: held}), key) == held
        assert not list(value_problems(kind, held))


@pytest.mark.parametrize(
    "override",
    "faults.roll_back_after=0 faults.clock_skew=-1 faults.lost_after=0 faults.join_within=-3 "
    "faults.max_rollbacks=-1 run.max_seconds=-5 run.max_seconds=0".split(),
)
def test_absurd_limits_of_a_run_are_refused(override, write):
    (problem,) = refused(write("data: {path: shards}"), override)
    assert problem.startswith(override.partition("=")[0]) and "must" in problem


TEXTS = [
    "007",
    "12:30:45",
    "1e3",
    "20240115_01",
    "2024011501",
    "2024-01-15",
    "2024-02-30",
    "0x1F",
    "0x_",
    "1_000",
    ".5",
]
TEXTS += ["off", "no", "yes", "y", "1.0", "+1", "-1", "=", "<<", "a=b", "a:b", "a,b", "é", "x" * 200, "-", "?"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_settings_are_taken_literally(text, write, tmp_path):
    """On the command line and in a file, as a value and as the name of a folder in a mix; and through config.yaml."""
    path = write(f"data: {{path: shards}}\nrun:\n  dir: {text}\n" if text not in ("-", "?") else "data: {path: shards}")
    from_file = load_config(path) if text not in ("-", "?") else load_config(path, [f"run.dir={text}"])
    config = load_config(path, [f"run.dir={text}", f"data.tokenizer={text}"])
    assert from_file.run.dir == config.run.dir == config.data.tokenizer == text
    mixed = Config(data=DataConfig(mix={text: 1.0, "web": 2.0}), run=config.run)
    if text not in ("-", "?", "<<", "=", "a,b"):  # in a flow mapping these are YAML's own, or two names
        mixed = load_config(path, [f"data.mix={{{text}: 1, web: 2}}", "data.path=null"])
    for one in (config, mixed):
        again = write(dump_config(one), "again.yaml")
        assert load_config(again) == one
    assert list(mixed.data.folders) == [text, "web"]


@pytest.mark.parametrize("text", ["a #b", "a: b", "%x", "*x", "&x", "!x", "@x", "`x", "|", ">", "'a", 'a"', "#", "a b"])
def test_text_needs_no_quotes_on_the_command_line(text, write):
    path = write("data: {path: shards}")
    config = load_config(path, [f"run.dir={text}"])
    assert config.run.dir == text
    assert load_config(path, [f"run.dir='{text}'" if "'" not in text else f'run.dir="{text}"']).run.dir == text
    assert load_config(write(dump_config(config), "again.yaml")) == config


def test_a_home_folder_is_expanded_in_every_path(write, tmp_path, monkeypatch):
    """In files, on the command line, in Python, and where the config itself is named; `./~` stays what it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write("base: ~/base.yaml\ndata: {path: ~/shards, tokenizer: '~/t', cache: ~/c}\nrun: {cluster: ~/x.yaml}")
    write("train: {steps: 7}", "base.yaml")
    config = load_config("~/config.yaml", ["run.dir=~/runs/a"])
    assert (config.data.path, config.data.tokenizer, config.data.cache, config.run.dir, config.run.cluster) == tuple(
        f"{tmp_path}/{name}" for name in ("shards", "t", "c", "runs/a", "x.yaml")
    )
    assert config.train.steps == 7
    assert load_config(path, ["data.mix={~/a: 1, ./~/b: 1}"]).data.mix == {f"{tmp_path}/a": 1.0, "./~/b": 1.0}
    assert DataConfig(path="~/a").path == f"{tmp_path}/a"
    assert load_config(path, ["data.path=nobody@~/x"]).data.path == "nobody@~/x"


OPTIONAL = [
    (section, key, kind)
    for section, cls in SECTIONS.items()
    for key, kind in kinds_of(cls).items()
    if kind.optional or kind.by_mode or (kind.type in (tuple, str) and not kind.choices)
]


@pytest.mark.parametrize(("section", "key", "kind"), OPTIONAL, ids=lambda part: part if isinstance(part, str) else "")
def test_null_unsets_every_setting_that_may_be_unset(section, key, kind, write):
    unset = getattr(Config().model, key) if kind.by_mode else None if kind.optional else kind.type()
    base = "data: {path: shards}\n" if section != "data" else "data: {mix: {web: 1}}\n"
    if (section, key) == ("data", "mix"):
        base = "data: {path: shards}\n"
    for null in ("null", "~", ""):
        path = write(base if section == "data" else f"{base}{section}: {{{key}: {null}}}\n")
        if (section, key) == ("run", "dir"):
            assert refused(path) == ["run.dir is not set; give the folder that checkpoints and metrics go to"]
            continue
        assert getattr(getattr(load_config(path, [f"{section}.{key}={null}"]), section), key) == unset
        assert getattr(getattr(load_config(path), section), key) == unset or section == "data"


def test_a_replaced_path_is_noted_once_unless_it_is_set_to_null(write, capsys, monkeypatch):
    path = write("data: {path: shards}")
    assert load_config(path, ["data.mix={a: 1}"]).data.folders == {"a": 1.0}
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "data.mix of the command line replaces data.path=shards" in printed
    assert load_config(path, ["data.mix={a: 1}", "data.path=null"]).data.folders == {"a": 1.0}
    assert load_config(path, ["data.path=other"]).data.folders == {"other": 1.0}
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "1")
    load_config(path, ["data.mix={a: 1}"])
    assert capsys.readouterr().err == ""


def test_the_remedy_for_exclusive_settings_is_null(write):
    path = write("data: {path: shards}\nloops: {mean: 3}")
    (problem,) = refused(path, "loops.distribution=uniform_set", "loops.set=[1,2]")
    assert "loops.mean=3" in problem and "loops.mean=null" in problem
    loaded = load_config(path, ["loops.distribution=uniform_set", "loops.set=[1,2]", "loops.mean=null"])
    assert (loaded.loops.mean, loaded.loops.set) == (None, (1, 2))
    (problem,) = refused(write("data: {path: shards}\nloops: {set: [1, 2]}"))
    assert "loops.set=null" in problem


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=1e3", 1000),
        ("train.steps=1_000", 1000),
        ("train.steps=8.0", 8),
        ("train.steps=0x10", 16),
        ("train.steps='5'", 5),
        ("optim.eps=1.e-3", 1e-3),
        ("optim.eps=.5", 0.5),
        ("train.compile=yes", True),
        ("train.compile=1", True),
        ("loops.set=[1, 2.0]", (1, 2)),
    ],
)
def test_other_notations_of_numbers_are_read(override, expected, write):
    path = write("data: {path: shards}\nloops: {distribution: uniform_set, set: [1]}")
    name, _, _ = override.partition("=")
    section, _, key = name.partition(".")
    loaded = getattr(getattr(load_config(path, [override]), section), key)
    assert loaded == expected and type(loaded) is type(expected)


@pytest.mark.parametrize("text", ["010", "1:30", "0x_", "1__0", "1e-3", "1.5", "--1", "1e999999999999", "", "1 2", "٣"])
def test_text_that_is_not_a_whole_number_is_refused(text, write):
    (problem,) = refused(write("data: {path: shards}"), f"train.steps={text}")
    assert problem.startswith("train.steps=") and "whole number" in problem
    assert not isinstance(number_of(text), int)


@pytest.mark.parametrize(("section", "key"), [(s, k) for s, cls in SECTIONS.items() for k in kinds_of(cls)])
def test_a_wrong_type_is_refused_with_our_own_message(section, key, write):
    """No library's sentence gets into ours; a list, a mapping and a text for each field, which a text may be. A list of
    texts is valid for a field that is one."""
    path, kind = write("data: {path: shards}"), kinds_of(SECTIONS[section])[key]
    text = [] if kind.type is str and not kind.choices else ["!!bool maybe"]
    texts = [] if kind.item and kind.item.type is str and kind.type is tuple else ["[a, 1]"]
    mapping = [] if kind.section else ["{a: {b: c}}"]  # of settings inside a setting: test_rope_scaling.py
    for wrong in ("[[a]]", *mapping, *texts, *text):
        for problem in refused(path, f"{section}.{key}={wrong}"):
            assert problem.startswith(f"{section}.{key}=") and ": expected " in problem
            for word in ("Input", "valid", "tuple", "dict", "str ", "NoneType", "Literal", "Annotated"):
                assert word not in problem


ODD = {
    "a date that is none": "run: {dir: 2024-02-30}\ntrain: {steps: 2024-02-30}",
    "an empty hexadecimal number": "train: {steps: 0x_}",
    "5,001 digits": "train: {steps: " + "9" * 5001 + "}",
    "deep lists": "train: {steps: " + "[" * 5000 + "]" * 5000 + "}",
    "deep mappings": "train: " + "{a: " * 5000 + "1" + "}" * 5000,
    "a set": "train: !!set {steps}",
    "a binary value": "run: {dir: !!binary aGVsbG8=}",
    "a timestamp tag": "run: {dir: !!timestamp 2024-01-15}",
    "an ordered map": "train: !!omap [steps: 1]",
    "a word as a bool": "train: {compile: !!bool maybe}",
    "a python object": "train: !!python/object:os.system {}",
    "an unknown tag": "train: !x {steps: 1}",
    "a key that stands twice": "train: {steps: 1, steps: 2}",
    "a list as a key": "? [a]\n: 1",
    "a tab": "train:\n\tsteps: 1",
    "a NUL": "train: {steps: 1}\0",
    "not UTF-8": b"train: {steps: \xff}",
    "UTF-16": "train: {steps: 1}".encode("utf-16"),
    "a lone surrogate": "run: {dir: \ud800}",
    "two documents": "train: {steps: 1}\n---\ntrain: {steps: 2}",
    "a list at the top": "[train]",
    "a number at the top": "5 ",
    "an alias without an anchor": "train: *a",
    "an alias of itself": "train: &a [*a]",
    "a merge of a number": "train: {<<: 3}",
    "aliases that double": "a: &a0 [x, x]\n"
    + "".join(f"b{i}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))
    + "train: {steps: *a40}",
    "a file of a megabyte": "# " + "x" * MAX_BYTES,
    "an escape of a control character": 'run: {dir: "a\\0b"}',
    "a bad escape": 'run: {dir: "\\q"}',
    "an unfinished text": "run: {dir: 'a",
    "a bad directive": "%YAML 99999999999999999999.1\n---\ntrain: {steps: 1}",
    "a base of itself": "base: config.yaml",
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_unsupported_yaml_is_refused_quickly(content, write):
    """As a config, and as an override; in processor time, which a busy machine does not change."""
    path, began = write(content), time.process_time()
    with pytest.raises(UserError) as raised:
        load_config(path, ["data.path=shards"])
    assert str(path) in str(raised.value) and len(str(raised.value)) < 2000
    plain = write("data: {path: shards}", "plain.yaml")
    if isinstance(content, str):
        for name in ("train.steps", "data.mix", "loops.set"):
            with pytest.raises(UserError):
                load_config(plain, [f"{name}={content.replace('5 ', 'five')}"])
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("content", "steps"),
    [
        ("", 1000),
        ("# nothing\n", 1000),
        ("---\n", 1000),
        ("\ufefftrain: {steps: 3}", 3),
        ("%YAML 1.2\n---\ntrain: {steps: 3}\n...\n", 3),
        ("train: !!map {steps: !!int 3}", 3),
        ("train: {steps: &n 3, eval_every: *n}", 3),
    ],
)
def test_unusual_but_valid_yaml_is_read(content, steps, write):
    assert load_config(write(content), ["data.path=shards"]).train.steps == steps


def test_a_merge_key_provides_defaults(write):
    path = write("checkpoint: &c {every: 5, keep: 7}\ntrain: {eval_every: 3}\ndata: {path: shards}")
    assert load_config(path).checkpoint.every == 5
    merged = write("checkpoint:\n  <<: [{every: 5}, {every: 6, keep: 7}]\n  pin_every: 2\ndata: {path: shards}")
    loaded = load_config(merged).checkpoint
    assert (loaded.every, loaded.keep, loaded.pin_every) == (5, 7, 2)


def test_the_number_of_bases_is_limited(write):
    """Each of 30 files names the next one twice: a billion readings."""
    for i in range(30):
        write(f"base: [f{i + 1}.yaml, f{i + 1}.yaml]", f"f{i}.yaml")
    path = write("train: {steps: 1}", "f30.yaml")
    began = time.process_time()
    (problem,) = refused(path.parent / "f0.yaml")
    assert "more than 100 files" in problem
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "overrides",
    [
        "train.global_batch=1000000000001 train.micro_batch=2",
        "train.global_batch=1073741789 train.micro_batch=2",
        "train.global_batch=735134400 train.micro_batch=11 parallel.tensor=3 parallel.pipe=7",
        "model.n_heads=2000000001 parallel.tensor=2",
        "model.n_heads=720720 parallel.tensor=64001 parallel.expert=64001 model.n_experts=720720",
        "loops.mean=1000000000 parallel.pipe=128",
        "model.attn_type=gqa model.dim=1000003 model.n_heads=2",
    ],
)
def test_large_numbers_are_refused_quickly(overrides, write):
    began = time.process_time()
    problems = refused(write("data: {path: shards}"), *overrides.split())
    assert all(len(line) < 1000 for line in problems)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("base", ['"a\\0b"', "loop.yaml", "x" * 5000, "[[a]]", "{a: 1}", "'\\ud800'", "/dev/null/x"])
def test_a_base_that_cannot_be_read_is_refused(base, write, tmp_path):
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (problem,) = refused(write(f"base: {base}\ndata: {{path: shards}}"))
    assert len(problem) < 12_000


def test_a_missing_config_is_reported_with_the_existing_ones(write, tmp_path, monkeypatch):
    """Those beside it; else those of the repository."""
    write("train: {steps: 1}", "1b.yaml")
    (problem,) = refused(tmp_path / "1bb.yaml")
    assert f"did you mean {tmp_path / '1b.yaml'}?" in problem
    (problem,) = refused(tmp_path / "nowhere" / "tiny.yaml")
    assert "tiny_cpu.yaml" in problem and "500b.yaml" in problem and "h100" not in problem
    (problem,) = refused(tmp_path)
    assert "it is a folder; give a file in it, such as" in problem and "1b.yaml" in problem
    (problem,) = refused(write("data: {path: shards}"), "model.variant=1x")
    assert "did you mean" in problem and "500b" in problem
    (problem,) = refused(tmp_path / "1b.yaml" / "x.yaml")
    assert "cannot be read" in problem


PYTHON = [
    (
        MythosConfig,
        {"injection": "zzz"},
        "model.injection='zzz': expected 'reference', 'parcae', 'none' or 'difference'",
    ),
    (MythosConfig, {"mode": "foo"}, "model.mode='foo': expected 'reference' or 'train'"),
    (MythosConfig, {"mode": ["train"]}, "model.mode=['train']: expected 'reference' or 'train'"),
    (MythosConfig, {"attn_type": "x"}, "model.attn_type='x': expected 'gqa' or 'mla'"),
    (MythosConfig, {"dim": "64"}, "model.dim='64': expected a whole number"),
    (MythosConfig, {"dim": 64.5}, "model.dim=64.5: expected a whole number"),
    (MythosConfig, {"dim": 64.0}, "model.dim=64.0: expected a whole number"),
    (MythosConfig, {"dim": True}, "model.dim=true: expected a whole number"),
    (MythosConfig, {"dim": None}, "model.dim=null: expected a whole number"),
    (MythosConfig, {"dim": -1}, "model.dim=-1 must be at least 1"),
    (MythosConfig, {"dim": 10**5000}, "model.dim=(a number with over 40 digits) must be at most 1,048,576"),
    (MythosConfig, {"qk_norm": 1}, "model.qk_norm=1: expected true or false"),
    (MythosConfig, {"rope_theta": float("nan")}, "model.rope_theta=nan: expected a finite number"),
    (ActConfig, {"mode": "on"}, "act.mode='on': expected 'reference', 'safe', 'ponder' or 'off', or null"),
    (ActConfig, {"prior": 1.5}, "act.prior=1.5 is a probability to halt"),
    (LoopsConfig, {"set": (1, 0)}, "loops.set=[1, 0] contains [0]; each must be at least 1"),
    (LoopsConfig, {"set": 3}, "loops.set=3: expected a list of whole numbers"),
    (LoopsConfig, {"mean": 2.5}, "loops.mean=2.5: expected a whole number"),
    (FaultsConfig, {"hang_after": 0}, "faults.hang_after=0 must be at least 1"),
    (DataConfig, {"mix": {"a": "1"}}, "data.mix={'a': '1'}: expected folders with their weights"),
    (DataConfig, {"mix": {3: 1.0}}, "data.mix={3: 1.0}: expected folders with their weights"),
    (DataConfig, {"path": Path("a")}, "data.path=PosixPath('a'): expected text"),
    (DataConfig, {"path": "a\nb"}, "data.path='a\\nb': contains the control character '\\n'"),
    (Config, {"model": {"dim": 8}}, "model={'dim': 8}: expected an instance of MythosConfig"),
]


@pytest.mark.parametrize(
    ("section", "settings", "expected"),
    PYTHON,
    ids=[f"{s.__name__}-{next(iter(v))}-{i}" for i, (s, v, _) in enumerate(PYTHON)],
)
def test_a_section_built_in_python_is_checked_like_yaml(section, settings, expected):
    with pytest.raises(ValueError, match=r".") as raised:
        section(**settings)
    assert isinstance(raised.value, UserError)
    (problem,) = raised.value.problems
    assert problem.startswith(expected)


def test_a_section_reports_all_problems():
    with pytest.raises(UserError) as raised:
        MythosConfig(mode="foo", dim="64", attn_type="x", n_heads=0)  # pyright: ignore[reportArgumentType]
    assert len(raised.value.problems) == 4


def test_settings_of_a_checkpoint_are_checked():
    with pytest.raises(UserError, match=r"model\.dim='64': expected a whole number"):
        config_from({"model": {"dim": "64"}})


def test_numbers_are_read_as_python_reads_them():
    """Held against int and float over the forms that both know."""
    for text in (
        "0",
        "7",
        "-7",
        "+7",
        "1e3",
        "1.5",
        "-1.5e-7",
        "1e-400",
        str(sys.maxsize),
        "0.1",
        "12345678901234567890",
    ):
        value = number_of(text)
        assert value == (int(text) if text.lstrip("+-").isdigit() else float(text))
