"""Settings that nothing reads are noted once, and only those."""

from pathlib import Path

import pytest

from mythos_dist.config.fields import kinds_of
from mythos_dist.config.load import SECTIONS, load_config, load_stages
from mythos_dist.config.unread import CONDITIONS, unread_settings
from mythos_dist.parallel.launcher import RankInfo
from mythos_dist.train.__main__ import read

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = CONFIGS / "tiny_cpu.yaml"
ADAMW, URL = "optim.name=adamw", "data.path=s3://bucket/shards"

# (settings, which end with the one that is not read; what makes it read; what the note says)
CASES = [
    (["model.mode=reference", "experts.bias_update_rate=0.1"], ["model.mode=train"], "model.mode=reference"),
    (["act.mode=safe", "act.prior=0.2"], ["act.kl=0.1"], "act.kl=0.0"),
    (["loops.maximum=9"], ["loops.distribution=poisson"], "loops.distribution=fixed"),
    (["loops.distribution=poisson", "loops.sigma=2"], ["loops.distribution=lognormal_poisson"], "poisson"),
    (["loops.curriculum_steps=5"], ["loops.curriculum=linear"], "loops.curriculum=none"),
    (["loops.curriculum=linear", "loops.curriculum_steps=21"], ["train.steps=21"], "does not end"),
    (["train.eval_samples=0", "train.eval_every=2"], ["train.eval_samples=1"], "train.eval_samples=0"),
    (["train.eval_samples=0", "loops.sweep=[1]"], ["train.eval_samples=1"], "train.eval_samples=0"),
    (
        ["train.eval_samples=0", "average.kind=ema", "average.evaluate=true"],
        ["train.eval_samples=1"],
        "train.eval_samples=0",
    ),
    (["parallel.sequence=true"], ["parallel.tensor=2"], "parallel.tensor=1"),
    (
        ["train.batch_ramp=[[2,10],[4,10]]"],
        ["train.steps=21"],
        "takes 20 steps, and train.steps=20: train.global_batch=8",
    ),
    (["optim.muon_momentum=0.9"], ["optim.name=muon"], "optim.name=adamw"),
    (["optim.muon_nesterov=false"], ["optim.name=muon"], "optim.name=adamw"),
    (["optim.muon_ns_steps=3"], ["optim.name=muon"], "optim.name=adamw"),
    (["optim.schedule=constant", "optim.min_lr_ratio=0"], ["optim.schedule=cosine"], "optim.schedule=constant"),
    (["optim.warmup_steps=21"], ["train.steps=21"], "does not reach optim.lr"),
    (["average.every=3"], ["average.kind=ema"], "average.kind=off"),
    (["average.kind=ema", "average.last=2"], ["average.kind=mean"], "average.kind=ema"),
    (["average.kind=mean", "average.last=2", "average.decay=0.5"], ["average.kind=ema", "average.last=10"], "=mean"),
    (["data.cache_limit=20GB"], [URL], "shards in local folders"),
    (["data.prefetch_shards=2"], [URL], "shards in local folders"),
    (["checkpoint.remote_backlog=2"], ["checkpoint.remote=s3://bucket/run"], "checkpoint.remote=null"),
    (["checkpoint.remote_wait=2"], ["checkpoint.remote=s3://bucket/run"], "checkpoint.remote=null"),
    (["checkpoint.remote_wait_stopped=2"], ["checkpoint.remote=s3://bucket/run"], "checkpoint.remote=null"),
    (["run.project=mine"], ["run.wandb=offline"], "run.wandb=disabled"),
    (["run.group=mine"], ["run.wandb=offline"], "run.wandb=disabled"),
    (["run.tags=[mine]"], ["run.wandb=offline"], "run.wandb=disabled"),
    (["run.profile={steps: [21, 22]}"], ["train.steps=21"], "begins after the last step, 20"),
    (["faults.preflight=false", "faults.clock_skew=9"], ["faults.preflight=true"], "faults.preflight=false"),
]


def notes(*settings: str) -> list[str]:
    return unread_settings([load_config(TINY, settings)])


@pytest.mark.parametrize(("settings", "remedy", "words"), CASES, ids=lambda value: value[-1] if value else "")
def test_a_setting_that_nothing_reads_is_noted_until_it_is_read(settings, remedy, words):
    (note,) = notes(*settings)
    name = settings[-1].partition("=")[0]
    assert note.startswith(f"{name}=") and words in note
    assert notes(*settings, *remedy) == []


def test_every_row_of_the_table_has_a_case_here():
    named = {settings[-1].partition("=")[0] for settings, _, _ in CASES}
    assert named == {setting for condition in CONDITIONS for setting in condition.settings}


def test_every_setting_of_the_table_exists():
    known = {f"{section}.{key}" for section, cls in SECTIONS.items() for key in kinds_of(cls)}
    assert {setting for condition in CONDITIONS for setting in condition.settings} <= known


def test_no_note_about_defaults_and_none_about_a_dumped_config():
    assert notes() == []


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_of_the_package_set_nothing_in_vain(path):
    if "clusters" not in path.parts:
        assert unread_settings(load_stages(path, ["data.path=shards"])) == []


def test_a_setting_that_one_stage_reads_is_not_noted(tmp_path):
    file = tmp_path / "stages.yaml"
    file.write_text(
        f"base: {TINY}\naverage: {{last: 2, every: 1}}\noptim: {{muon_momentum: 0.9}}\nstages:\n"
        "  - {name: first, steps: 10, average: {kind: mean}}\n  - {name: second, steps: 10}\n"
    )
    assert [note.partition("=")[0] for note in unread_settings(load_stages(file))] == ["optim.muon_momentum"]


def test_training_prints_the_notes_on_rank_0(capsys):
    for rank in range(2):
        read(str(TINY), ["average.last=2", "train.micro_batch=1"], RankInfo(rank=rank, world_size=2))
        printed = capsys.readouterr().err
        assert printed == ("" if rank else f"note: {TINY}: average.last=2 has no effect with average.kind=off\n")
