"""From files and overrides to one Config, or to every problem at once."""

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.selection import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_dist.config.compare import differences
from mythos_dist.config.dump import dump_config
from mythos_dist.config.fields import kinds_of
from mythos_dist.config.load import SECTIONS, config_from, load_config
from mythos_dist.config.rules import model_problems, problems
from mythos_dist.config.schema import Config, MythosConfig, ProfileConfig
from mythos_dist.config.variants import VARIANTS
from mythos_dist.errors import UserError

REPOSITORY = Path(__file__).parents[2]
SETTINGS_OF: dict[str, dict[str, Any]] = {**VARIANTS}  # values of mixed types, as keyword arguments


@pytest.fixture
def write(tmp_path):
    """A function: text, file name -> path; `data.path` is what a config must name, so `complete` adds it."""

    def to_file(text: str, name: str = "config.yaml", complete: bool = True) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + ("\ndata: {path: shards}\n" if complete else ""), encoding="utf-8")
        return path

    return to_file


def refused(path: Path, *overrides: str) -> list[str]:
    """The problems that a config is refused with."""
    with pytest.raises(UserError) as raised:
        load_config(path, overrides)
    assert str(path) in str(raised.value)
    return raised.value.problems


def test_an_empty_file_is_the_defaults(write):
    config = load_config(write(""))
    assert config == dataclasses.replace(Config(), data=dataclasses.replace(Config().data, path="shards"))


def test_a_file_overrides_its_bases_and_the_command_line_overrides_the_file(write):
    """Each source changes only the settings it names; a base's path is relative to the file that names it."""
    write("train: {steps: 1, seq_len: 10, global_batch: 3}\noptim: {lr: 0.5}", "sizes/bottom.yaml")
    write("base: bottom.yaml\ntrain: {steps: 2}", "sizes/middle.yaml", complete=False)
    top = write("base: sizes/middle.yaml\ntrain: {seq_len: 20}", complete=False)
    config = load_config(top, ["train.global_batch=5", "run.seed = 7"])
    assert (config.train.steps, config.train.seq_len, config.train.global_batch) == (2, 20, 5)
    assert (config.optim.lr, config.run.seed, config.data.path) == (0.5, 7, "shards")


def test_of_several_bases_the_later_wins(write):
    write("train: {steps: 1, seq_len: 10}", "one.yaml")
    write("train: {steps: 2}", "two.yaml")
    config = load_config(write("base: [one.yaml, two.yaml]", complete=False))
    assert (config.train.steps, config.train.seq_len) == (2, 10)


def test_two_files_may_share_a_base(write):
    """A diamond is not a cycle."""
    write("train: {steps: 3}", "root.yaml")
    write("base: root.yaml", "left.yaml", complete=False)
    write("base: root.yaml", "right.yaml", complete=False)
    assert load_config(write("base: [left.yaml, right.yaml]", complete=False)).train.steps == 3


def test_a_file_that_includes_itself_is_refused(write):
    write("base: b.yaml", "a.yaml")
    path = write("base: a.yaml", "b.yaml")
    with pytest.raises(UserError, match=r"b\.yaml includes itself; remove"):
        load_config(path)


def test_a_missing_file_is_reported_with_the_file_that_names_it(write, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist; check the path"):
        load_config(tmp_path / "nowhere.yaml")
    path = write("base: gone.yaml")
    with pytest.raises(UserError, match=rf"gone\.yaml \(named by `base:` in {path}\)"):
        load_config(path)


def test_a_folder_and_a_binary_file_cannot_be_read(tmp_path):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, binary):
        with pytest.raises(UserError, match="cannot be read"):
            load_config(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {steps: 1", "not valid YAML"),
        ("train: {steps: 1, steps: 2}", "duplicate key 'steps'"),
        ("train: {steps: 1}\ntrain: {seq_len: 2}", "duplicate key 'train'"),
        ("? [a, b]\n: 1", "a key must be a name"),
        ("[train, model]", "expected sections"),
        ("just words", "expected sections"),
        ("base: {a: 3}", "base={'a': 3}: expected a file name or a list of them"),
        ("base: [[1]]", "expected a file name or a list of them"),
        ("train: !!python/name:os.system", "not valid YAML"),
    ],
)
def test_a_document_that_is_not_a_mapping_of_sections_is_refused(text, expected, write):
    path = write(text, complete=False)
    with pytest.raises(UserError) as raised:
        load_config(path)
    assert expected in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("name", VARIANTS)
def test_other_model_keys_override_the_variant(name, write):
    """In any order of lines; a later source's variant replaces all model keys of earlier sources."""
    expected = MythosConfig(**SETTINGS_OF[name] | dict[str, Any](dim=64))
    for text in (f"model: {{variant: {name}, dim: 64}}", f"model: {{dim: 64, variant: {name}}}"):
        assert load_config(write(text), ["train.seq_len=8"]).model == expected
    path = write("model: {dim: 64, vocab_size: 9}")
    assert load_config(path, ["train.seq_len=8", f"model.variant={name}"]).model == MythosConfig(**SETTINGS_OF[name])


def test_the_mode_gives_the_loops_their_defaults(write):
    """And only that: settings that are set stay. A reference with other loops is refused (below)."""
    trained = load_config(write("model: {init: reference}")).model
    assert (trained.injection, trained.qk_norm, trained.init) == ("parcae", True, "reference")
    reference = load_config(write("model: {mode: reference}")).model
    assert (reference.injection, reference.qk_norm, reference.init) == ("reference", False, "reference")
    assert reference == load_config(write("model: {mode: train}"), ["model.mode=reference"]).model


def test_missing_model_settings_are_those_of_openmythos():
    """A checkpoint of such a run has weights of its loops only."""
    old = asdict(MythosConfig(dim=64))
    for key in ("loop_signal", "lora", "injection", "initial_state", "qk_norm", "init"):
        del old[key]
    assert config_from({"model": old}).model == dataclasses.replace(
        MythosConfig(mode="reference", dim=64), mode="train"
    )


def test_an_unknown_variant_is_refused_with_the_known_ones(write):
    (problem,) = refused(write("model: {variant: 2b}"))
    assert problem.startswith("model.variant='2b'")
    assert all(name in problem for name in VARIANTS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle: {dim: 8}", "modle: unknown section; did you mean model?"),
        ("train: {step: 8}", "train.step: unknown key; did you mean train.steps?"),
        ("train: {lr: 8}", "train.lr: unknown key; did you mean optim.lr?"),
        ("optim: {vocab_size: 8}", "optim.vocab_size: unknown key; did you mean model.vocab_size?"),
        ("checkpoint: {zzz: 1}", "checkpoint.zzz: unknown key; choose from every, keep"),
        ("train: {3: 1}", "train.3: unknown key"),
        ("train: 5", "train=5: expected settings below it"),
        ("train: [steps]", "train=['steps']: expected settings below it"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(text, expected, write):
    assert any(problem.startswith(expected) for problem in refused(write(text)))


def test_an_empty_section_changes_nothing(write):
    assert load_config(write("train:")).train == Config().train


@pytest.mark.parametrize("text", ["steps=3", "train.steps", "train", "=3", "train steps=3"])
def test_a_malformed_override_is_refused_with_the_correct_form(text, write):
    assert any("expected section.key=value" in problem and text in problem for problem in refused(write(""), text))


def test_a_setting_without_its_section_gets_the_full_name(write):
    assert refused(write(""), "lr=1e-3") == ["'lr=1e-3': expected section.key=value; did you mean optim.lr=1e-3?"]
    (problem,) = refused(write(""), "every=5")
    assert problem.endswith("did you mean average.every=5 or checkpoint.every=5?")


def test_an_override_that_is_not_yaml_is_refused(write):
    (problem,) = refused(write(""), "run.dir=[a")
    assert problem.startswith("run.dir='[a'")


def test_the_value_of_an_override_may_contain_an_equals_sign(write):
    assert load_config(write(""), ["run.dir=runs/lr=3"]).run.dir == "runs/lr=3"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optim.lr=3e-4", "optim", "lr", 3e-4),
        ("optim.lr=3E-4", "optim", "lr", 3e-4),
        ("optim.lr=1e2", "optim", "lr", 100.0),
        ("optim.eps=+1.5e-8", "optim", "eps", 1.5e-8),
        ("optim.lr=1", "optim", "lr", 1.0),
        ("loops.mean=null", "loops", "mean", None),
        ("loops.mean=4", "loops", "mean", 4),
        ("run.dir=2026", "run", "dir", "2026"),
        ("data.tokenizer=7", "data", "tokenizer", "7"),
        ("data.document_mask=false", "data", "document_mask", False),
        ("parallel.zero=3", "parallel", "zero", 3),
        ("train.dtype=fp32", "train", "dtype", "fp32"),
    ],
)
def test_a_value_is_read_as_its_settings_type(override, section, key, value, write):
    loaded = getattr(getattr(load_config(write(""), [override]), section), key)
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=abc", "train.steps='abc': expected a whole number"),
        ("train.steps=true", "train.steps=true: expected a whole number"),
        ("train.steps=null", "train.steps=null: expected a whole number"),
        ("optim.lr=true", "optim.lr=true: expected a number"),
        ("optim.lr=high", "optim.lr='high': expected a number"),
        ("optim.lr=.nan", "optim.lr=nan: expected a finite number"),
        ("optim.lr=.inf", "optim.lr=inf: expected a finite number"),
        ("model.rope_theta=-.inf", "model.rope_theta=-inf: expected a finite number"),
        ("loops.mean=true", "loops.mean=true: expected a whole number"),
        ("train.dtype=fp8", "train.dtype='fp8': expected 'fp32', 'bf16' or 'fp16'"),
        ("parallel.zero=4", "parallel.zero=4: expected 1, 2 or 3"),
        ("parallel.zero=true", "parallel.zero=true: expected 1, 2 or 3"),
        ("run.dir=[a]", "run.dir=['a']: expected text"),
        ("run.dir=true", "run.dir=true: expected text"),
        ("data.document_mask=maybe", "data.document_mask='maybe': expected"),
    ],
)
def test_a_value_of_another_type_is_refused_once(override, expected, write):
    """One line with path, value and what was expected; and none about the default that replaces it."""
    (problem,) = refused(write(""), override)
    assert problem.startswith(expected)


def test_every_problem_is_reported_in_one_message(write):
    """Files, overrides, types and broken rules: six mistakes, six lines, each with its setting."""
    path = write("model: {dimm: 8, n_experts: lots}\ntrane: {steps: 1}", complete=False)
    problems = refused(path, "train.global_batch=6", "train.micro_batch=4", "optim.beta1=1", "steps=3")
    for name in (
        "model.dimm",
        "model.n_experts='lots'",
        "trane",
        "train.micro_batch=4",
        "optim.beta1=1",
        "'steps=3'",
        "data.path",
    ):
        assert sum(name in problem for problem in problems) == 1, name
    assert len(problems) == 7


@pytest.mark.parametrize("profile", ["{steps: [12, 10]}", "{steps: [1, 51]}", "{steps: [1, 2], ranks: []}"])
def test_rules_of_a_profile_are_those_of_its_constructor(profile, write):
    """From a file and from the command line, together with the problems of other settings."""
    with pytest.raises(UserError) as raised:
        ProfileConfig(**yaml.safe_load(profile))
    (problem,) = raised.value.problems
    assert problem.startswith("run.profile.")
    assert refused(write(f"run: {{profile: {profile}}}")) == [problem]
    assert refused(write("run: {profile: null}"), f"run.profile={profile}") == [problem]
    assert refused(write(f"run: {{profile: {profile}}}\ntrain: {{steps: 0}}")) == [
        "train.steps=0 must be at least 1",
        problem,
    ]


def test_rules_of_every_section_inside_a_section_are_checked(monkeypatch, write):
    inner = {(name, key): kind for name, cls in SECTIONS.items() for key, kind in kinds_of(cls).items() if kind.section}
    assert {("model", "rope_scaling"), ("run", "profile")} <= set(inner)
    for (name, key), kind in inner.items():
        problem = f"{name}.{key}.one: contradicts another"
        assert kind.section and kind.section.section == f"{name}.{key}"
        monkeypatch.setattr(kind.section, "contradictions", lambda self, problem=problem: [problem])
        assert refused(write(f"{name}: {{{key}: {kind.section.example}}}")) == [problem]


def test_the_message_names_the_file_and_counts(write):
    path = write("train: {stepz: 1, seq_length: 2}")
    with pytest.raises(UserError) as raised:
        load_config(path)
    assert str(raised.value).splitlines()[0] == f"{path}: 2 problems"


WHOLE = st.integers(1, 10**6)


@settings(derandomize=True, deadline=None, max_examples=examples(60))
@given(
    lr=st.floats(0, 1e3),
    eps=st.floats(1e-30, 1),
    seed=st.integers(0, 2**62),
    steps=WHOLE,
    dim=WHOLE,
    mean=st.none() | st.integers(1, 512),
    folder=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1),
    tokenizer=st.none() | st.sampled_from(["null", "yes", "1e3", "~", "3", "2026-01-01", ": #", " a "]),
    mask=st.booleans(),
    dtype=st.sampled_from(["fp32", "bf16", "fp16"]),
    zero=st.sampled_from([1, 2, 3]),
)
def test_a_dumped_config_reads_back_equal(
    tmp_path_factory, lr, eps, seed, steps, dim, mean, folder, tokenizer, mask, dtype, zero
):
    """Floats to the last bit, texts that look like something else, unset values."""
    replace, default = dataclasses.replace, Config()
    config = replace(
        default,
        model=replace(default.model, dim=dim),
        train=replace(default.train, steps=steps, dtype=dtype),
        optim=replace(default.optim, lr=lr, eps=eps),
        loops=replace(default.loops, mean=mean),
        parallel=replace(default.parallel, zero=zero),
        data=replace(default.data, path=folder, tokenizer=tokenizer, document_mask=mask),
        run=replace(default.run, seed=seed, dir=folder),
    )
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_a_mix_of_folders_is_read_and_dumped_with_its_order(write, tmp_path):
    """From a file, and from the command line; a folder may be called 2026."""
    config = load_config(write("data: {mix: {web: 0.7, code: 3, 2026: 1e-2}}", complete=False))
    assert list(config.data.folders.items()) == [("web", 0.7), ("code", 3.0), ("2026", 0.01)]
    assert all(type(weight) is float for weight in config.data.folders.values())
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    again = load_config(tmp_path / "dumped.yaml")
    assert again == config and list(again.data.folders) == ["web", "code", "2026"]
    assert load_config(write(""), ["data.mix={b: 0.7, a: 0.3}"]).data.folders == {"b": 0.7, "a": 0.3}
    assert load_config(write("")).data.folders == {"shards": 1.0}


def test_path_and_mix_replace_each_other_in_later_sources(write):
    """Like any setting the later wins; within one source they contradict each other."""
    path = write("data: {path: shards}", complete=False)
    mixed = load_config(path, ["data.mix={a: 1, b: 2}"])
    assert (mixed.data.path, mixed.data.mix) == ("", {"a": 1.0, "b": 2.0})
    write(dump_config(mixed), "mixed.yaml", complete=False)
    alone = load_config(write("base: mixed.yaml\ndata: {path: other, workers: 2}", complete=False))
    assert (alone.data.path, alone.data.mix, alone.data.folders) == ("other", None, {"other": 1.0})
    (problem,) = refused(path, "data.mix={a: 1, b: 2}", "data.path=other")
    assert "data.path=other" in problem and "data.mix={'a': 1.0, 'b': 2.0}" in problem and "leave one" in problem


@pytest.mark.parametrize(
    "mix", ["true", "3", "web", "[web, code]", "{web:0.7, code:0.3}", "{web: much}", "{web: true}", "{web: {code: 1}}"]
)
def test_a_malformed_mix_is_refused_with_the_correct_form(mix, write):
    """A pitfall of YAML: `{web:0.7}` without the blank is a name and nothing."""
    (problem,) = refused(write(""), f"data.mix={mix}")
    assert problem.startswith("data.mix=")
    assert problem.endswith("expected folders with their weights, such as {shards/web: 0.7, shards/code: 0.3}")


@pytest.mark.parametrize("text", ["1e3", "-2E5", "1.5e-3", "3", "true", "~", "2026-11-23", "0x10", "1_000"])
def test_a_text_that_looks_like_a_number_stays_a_text(text, tmp_path):
    """Found by the test above once it drew 1e3: dumper and loader must agree on what a number is."""
    config = dataclasses.replace(Config(), data=dataclasses.replace(Config().data, path="shards", tokenizer=text))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml").data.tokenizer == text


def test_off_is_read_as_text(write):
    """YAML 1.1 reads `off` as false, in files and on the command line; a dumped config quotes it for other readers."""
    path = write("act: {mode: off}")
    assert load_config(path).act.mode == "off"
    assert load_config(path, ["act.mode=off"]).act.mode == "off"
    for text in ("off", "on", "yes", "no"):
        assert yaml.safe_load(dump_config(change(data={"path": text})))["data"]["path"] == text


def change(**sections: dict) -> Config:
    """A config without problems, with settings of its sections changed."""
    config = dataclasses.replace(Config(), data=dataclasses.replace(Config().data, path="shards"))
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


def said_of(**sections: dict) -> list[str]:
    """What a config with these changes is refused with: when a section is built, or when all are compared."""
    try:
        return problems(change(**sections))
    except UserError as error:
        return error.problems


def test_a_valid_config_has_no_problem():
    assert problems(change()) == []
    assert problems(change(model={"attn_type": "gqa"}, loops={"mean": 3}, run={"peak_tflops": 0.1})) == []
    for variant in SETTINGS_OF.values():
        assert model_problems(MythosConfig(**variant)) == []
        assert model_problems(MythosConfig(**variant | dict[str, Any](attn_type="gqa"))) == []


AT_LEAST_ONE = {
    "model": "vocab_size dim n_heads n_kv_heads max_seq_len max_loop_iters kv_lora_rank q_lora_rank qk_nope_head_dim "
    "v_head_dim n_experts n_experts_per_tok expert_dim lora_rank max_output_tokens",
    "loops": "mean maximum backprop",
    "parallel": "tensor pipe expert",
    "train": "steps seq_len global_batch micro_batch recompute_every",
    "optim": "decay_steps",
    "checkpoint": "every keep",
}
NOT_NEGATIVE = {
    "model": "prelude_layers coda_layers n_shared_experts",
    "experts": "bias_update_rate z_loss sequence_balance_loss",
    "train": "eval_every eval_samples",
    "optim": "lr warmup_steps weight_decay grad_clip",
    "data": "workers",
    "run": "seed",
}


@pytest.mark.parametrize(("section", "key"), [(s, key) for s, keys in AT_LEAST_ONE.items() for key in keys.split()])
def test_a_size_or_a_count_below_one_is_refused(section, key):
    for value in (0, -3):
        assert said_of(**{section: {key: value}}) == [f"{section}.{key}={value} must be at least 1"]


@pytest.mark.parametrize(("section", "key"), [(s, key) for s, keys in NOT_NEGATIVE.items() for key in keys.split()])
def test_settings_that_may_be_zero_may_not_be_negative(section, key):
    assert said_of(**{section: {key: 0}}) == []
    assert said_of(**{section: {key: -1}}) == [f"{section}.{key}=-1 must not be negative"]


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"model": {"attn_type": "gqa", "n_heads": 24, "n_kv_heads": 4}}, ["model.dim=2048", "model.n_heads=24", "16"]),
        ({"model": {"attn_type": "gqa", "n_kv_heads": 5}}, ["model.n_heads=16", "model.n_kv_heads=5", "8, 16"]),
        ({"model": {"attn_type": "gqa", "dim": 48, "n_heads": 16}}, ["model.dim / model.n_heads = 3", "even ratio"]),
        ({"model": {"qk_rope_head_dim": 5}}, ["model.qk_rope_head_dim=5", "even"]),
        ({"model": {"qk_rope_head_dim": 0}}, ["model.qk_rope_head_dim=0", "at least 2"]),
        ({"model": {"n_experts_per_tok": 65}}, ["model.n_experts_per_tok=65", "model.n_experts=64", "at most 64"]),
        ({"model": {"act_threshold": 0.0}}, ["model.act_threshold=0.0", "above 0"]),
        ({"model": {"act_threshold": 1.01}}, ["model.act_threshold=1.01", "at most 1"]),
        ({"model": {"dropout": 1.0}}, ["model.dropout=1.0", "below 1"]),
        ({"model": {"dropout": -0.1}}, ["model.dropout=-0.1", "at least 0"]),
        ({"model": {"rope_theta": 0.0}}, ["model.rope_theta=0.0", "above 0"]),
        ({"train": {"seq_len": 4097}}, ["train.seq_len=4097", "model.max_seq_len=4096", "at most 4096"]),
        ({"train": {"micro_batch": 3}}, ["train.global_batch=8", "train.micro_batch=3", "[1, 2, 4, 8]"]),
        ({"train": {"offload": "saved"}}, ["train.offload=saved", "set train.recompute to loop"]),
        ({"optim": {"beta1": 1.0}}, ["optim.beta1=1.0", "below 1"]),
        ({"optim": {"beta2": -0.5}}, ["optim.beta2=-0.5", "at least 0"]),
        ({"optim": {"min_lr_ratio": 1.5}}, ["optim.min_lr_ratio=1.5", "between 0 and 1"]),
        ({"optim": {"eps": 0.0}}, ["optim.eps=0.0", "above 0"]),
        ({"optim": {"muon_momentum": 1.0}}, ["optim.muon_momentum=1.0", "below 1"]),
        ({"optim": {"muon_ns_steps": 0}}, ["optim.muon_ns_steps=0", "at least 1"]),
        ({"optim": {"muon_lr": 0.1}}, ["optim.muon_lr=0.1", "optim.name=adamw", "set optim.name=muon"]),
        ({"optim": {"name": "muon"}, "parallel": {"zero": 3}}, ["optim.name=muon", "set parallel.zero to 2", "adamw"]),
        ({"data": {"path": ""}}, ["data.path is not set", "mythos shards", "data.mix="]),
        ({"data": {"mix": {"a": 1.0}}}, ["data.path=shards", "data.mix={'a': 1.0}", "leave one of them out"]),
        ({"data": {"path": "", "mix": {}}}, ["data.mix={} names no folder"]),
        ({"data": {"path": "", "mix": {"a": 0.0, "b": 1.0}}}, ["data.mix[a]=0.0 must be above 0", "leave"]),
        ({"data": {"path": "", "mix": {"a": 1.0, "b": -1.0}}}, ["data.mix[b]=-1.0 must be above 0"]),
        ({"data": {"path": "", "mix": {"a": float("nan"), "b": 1.0}}}, ["data.mix[a]=nan must be above 0"]),
        ({"data": {"path": "", "mix": {"a": 1.0, "b": float("inf")}}}, ["data.mix[b]=inf must be"]),
        ({"data": {"path": "", "mix": {"a": 1e-10, "b": 1.0}}}, ["data.mix[a]=1e-10", "a billionth"]),
        ({"run": {"dir": ""}}, ["run.dir is not set"]),
        ({"run": {"dir": "s3://bucket/run"}}, ["run.dir=s3://bucket/run is a URL", "checkpoint.remote"]),
        ({"data": {"cache": "https://a:b@host/x"}}, ["data.cache=https://***@host/x is a URL", "a local path"]),
        ({"run": {"peak_tflops": 0.0}}, ["run.peak_tflops=0.0", "null"]),
    ],
)
def test_a_broken_rule_is_one_line_with_setting_value_and_remedy(sections, named):
    (problem,) = said_of(**sections)
    for part in named:
        assert part in problem


def test_rules_of_one_attention_type_do_not_apply_to_the_other():
    """MLA's heads are as wide as it likes, and GQA has no rotary part of its own."""
    assert problems(change(model={"attn_type": "mla", "n_heads": 24, "n_kv_heads": 7})) == []
    assert problems(change(model={"attn_type": "gqa", "qk_rope_head_dim": 5})) == []


CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_repository_loads(path):
    """Some are bases and leave data.path to the configs that name them."""
    load_config(path, ["data.path=shards"])


def test_a_config_is_unchanged_by_json():
    """Checkpoints store the config as JSON, and a run that resumes compares its config with it."""
    tiny = REPOSITORY / "configs" / "tiny_cpu.yaml"
    now = load_config(tiny, ["loops.distribution=uniform_set", "loops.set=[1,2]", "checkpoint.pin=[2]"])
    saved = json.loads(json.dumps(asdict(now)))
    assert list(differences(saved, now)) == list(differences(asdict(now), now)) == []
    other = load_config(tiny, ["loops.distribution=uniform_set", "loops.set=[1,3]"])
    assert [name for name, *_ in differences(saved, other)] == ["loops.set"]
