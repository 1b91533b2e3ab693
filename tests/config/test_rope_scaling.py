"""`model.rope_scaling`: settings inside a setting, their rules, and the way through files and checkpoints."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from mythos_dist.config.compare import differences, training_changes
from mythos_dist.config.dump import dump_config
from mythos_dist.config.load import config_from, load_config
from mythos_dist.config.schema import Config, MythosConfig, RopeScaling
from mythos_dist.errors import UserError

YARN = "{kind: yarn, factor: 4, original_max_seq_len: 1024}"  # for the default context of 4,096


def load(tmp_path: Path, scaling: str, *overrides: str) -> Config:
    file = tmp_path / "config.yaml"
    file.write_text(f"data: {{path: shards}}\nmodel: {{rope_scaling: {scaling}}}\n")
    return load_config(file, overrides)


def problems_of(tmp_path: Path, scaling: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as error:
        load(tmp_path, scaling, *overrides)
    return error.value.problems


def test_it_is_read_from_a_file_and_from_the_command_line(tmp_path):
    expected = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=1024)
    assert load(tmp_path, YARN).model.rope_scaling == expected
    assert load(tmp_path, "null", f"model.rope_scaling={YARN}").model.rope_scaling == expected
    assert load(tmp_path, YARN, "model.rope_scaling=null").model.rope_scaling is None
    linear = load(tmp_path, YARN, "model.rope_scaling={kind: linear, factor: 2, original_max_seq_len: 2048}")
    assert linear.model.rope_scaling == RopeScaling(kind="linear", factor=2, original_max_seq_len=2048)


def test_it_comes_back_from_its_dump_and_from_a_checkpoint(tmp_path):
    config = load(tmp_path, "{kind: yarn, factor: 4, original_max_seq_len: 1024, mscale: 1, mscale_all_dim: 1}")
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config and dump_config(load_config(again)) == dump_config(config)
    saved = json.loads(json.dumps(asdict(config)))
    assert config_from(saved) == config
    assert not list(differences(saved, config))
    hash(config.model)  # tables of FLOPs and parameters are kept by model


def test_a_resume_must_not_change_it_and_a_new_stage_reports_it(tmp_path):
    """Checkpoints of versions without the setting had none."""
    config, before = load(tmp_path, YARN), asdict(load(tmp_path, "null", "model.rope_theta=10000"))
    del before["model"]["rope_scaling"]
    changed = {name for name, _, _ in differences(before, config)}
    assert changed == {"model.rope_scaling", "model.rope_theta"}
    changes = {name: (old, new) for name, old, new in training_changes(before, asdict(config))}
    assert changes["model.rope_theta"] == (10000, 500000)
    assert changes["model.rope_scaling"] == (None, asdict(config)["model"]["rope_scaling"])


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ("{kind: yarn, factor: 2, original_max_seq_len: 1024}", ["is 2048 tokens", "=4096", "factor to 4", "to 2048"]),
        ("{kind: linear, factor: 8, original_max_seq_len: 1024}", ["is 8192 tokens", "factor to 4,", "to 8192"]),
        ("{kind: yarn, factor: 1, original_max_seq_len: 8192}", ["max_seq_len=4096 is shorter", "8192"]),
        (
            "{kind: linear, factor: 4, original_max_seq_len: 1024, beta_fast: 32, truncate: true}",
            ["beta_fast, truncate are of kind=yarn, and kind is linear; leave them out"],
        ),
        (
            "{kind: yarn, factor: 4, original_max_seq_len: 1024, beta_fast: 1, beta_slow: 2}",
            ["beta_fast=1 is less than beta_slow=2; set it to at least 2"],
        ),
        (
            "{kind: yarn, factor: 4, original_max_seq_len: 1024, mscale: 1}",
            ["mscale=1 has no effect without mscale_all_dim"],
        ),
        (
            "{kind: yarn, factor: 4, original_max_seq_len: 1024, low_freq_factor: 1}",
            ["low_freq_factor is of kind=llama3, and kind is yarn; leave it out"],
        ),
        (
            "{kind: llama3, factor: 8, original_max_seq_len: 1024, low_freq_factor: 4}",
            ["low_freq_factor=4 is not below high_freq_factor=4; raise the latter"],
        ),
        ("4", ["model.rope_scaling=4: expected settings, such as {kind: yarn, factor: 4, "]),
        ("{factor: 4, original_max_seq_len: 1024}", ["model.rope_scaling: kind must be set, as in {kind: yarn"]),
        ("{kind: yarn, original_max_seq_len: 1024, factr: 4}", ["factr: unknown key; did you mean factor?"]),
        (
            "{kind: ntk, factor: 4, original_max_seq_len: 1024}",
            ["model.rope_scaling.kind='ntk': expected 'linear', 'yarn'"],
        ),
        ("{kind: yarn, factor: 0.5, original_max_seq_len: 1024}", ["rope_scaling.factor=0.5 must be at least 1"]),
        ("{kind: yarn, factor: .nan, original_max_seq_len: x}", ["factor=nan: expected", "original_max_seq_len='x': "]),
    ],
)
def test_contradictions_and_wrong_values_are_refused_with_what_works(tmp_path, scaling, expected):
    text = "\n".join(problems_of(tmp_path, scaling))
    assert all(part in text for part in expected), text


def test_yarn_needs_falling_frequencies(tmp_path):
    (problem,) = problems_of(tmp_path, YARN, "model.rope_theta=1")
    assert problem.startswith("model.rope_theta=1 does not work with model.rope_scaling.kind=yarn")


def test_the_suggested_factor_and_the_suggested_length_are_accepted(tmp_path):
    scaling = "{kind: yarn, factor: 3.3, original_max_seq_len: 1000}"
    (problem,) = problems_of(tmp_path, scaling)
    factor, length = (
        part.split()[0].rstrip(",") for part in (problem.split("factor to ")[1], problem.split("max_seq_len to ")[1])
    )
    load(tmp_path, scaling.replace("3.3", factor))
    load(tmp_path, scaling, f"model.max_seq_len={length}")


def test_a_model_built_in_python_is_checked_too():
    scaling = {"kind": "yarn", "factor": 4, "original_max_seq_len": 1024}
    assert MythosConfig(rope_scaling=scaling).rope_scaling == RopeScaling(**scaling)  # pyright: ignore
    with pytest.raises(UserError, match="set factor to 8"):
        MythosConfig(rope_scaling=RopeScaling(**scaling), max_seq_len=8192)
    with pytest.raises(UserError, match="missing"):
        MythosConfig(rope_scaling={"kind": "yarn"})  # pyright: ignore
