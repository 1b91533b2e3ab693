"""Runs without a held-out split, or with one for only some of their corpora."""

import shutil
from dataclasses import replace

import pytest
import torch.distributed as dist
from helpers.launch import train

from mythos_dist.config.load import load_config
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.parallel.mesh import SINGLE
from mythos_dist.prepare.convert import convert
from mythos_dist.train.batches import heldout_passes, open_heldout
from mythos_dist.train.checks import check_inputs
from mythos_dist.train.sweep import sweep


@pytest.fixture(scope="module")
def without(shards):
    """A conversion of the text of `shards` without a held-out split."""
    tokenizer = Tokenizer.load(shards / "tokenizer.model")
    out = shards.parent / "without"
    convert(shards.parent / "corpus.parquet", tokenizer, 32, out, heldout=0.0, quiet=True)
    return out


@pytest.mark.launch
def test_a_run_without_a_held_out_split_trains_and_reports_it_once(settings, without, shards, tmp_path):
    """Settings for evaluation have no effect. The run does not resume with shards that have a held-out split, because
    their training text differs. A sweep over loops needs shards with a held-out split."""
    run_dir = tmp_path / "run"
    command = [*settings, f"data.path={without}", f"run.dir={run_dir}", "loops.sweep=[1,2]", "train.eval_every=1"]
    result = train(1, *command, "train.steps=2")
    assert result.codes == [0], result.err
    assert result.out.count("no evaluation") == 1 and f"no held-out split in {without}" in result.out
    assert "held-out loss" not in result.out and not {"eval.jsonl", "loops.png"} & {f.name for f in run_dir.iterdir()}
    with pytest.raises(UserError, match="there is no held-out split"):
        sweep(run_dir, [1, 2])
    assert sweep(run_dir, [1], data=shards, samples=1).curve[1].loss > 0
    result = train(1, *command, f"data.path={shards}", "train.steps=3")
    assert result.codes == [2] and "has other shards than those that the run was trained on" in result.err
    assert "Traceback" not in result.err


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)


def test_evaluation_is_off_without_samples_or_without_a_split(settings, shards, without, one_process, capsys, tmp_path):
    """With train.eval_samples=0 no held-out file is read: heldout/ may be deleted."""
    shards = shutil.copytree(shards, tmp_path / "shards")
    shutil.rmtree(shards / "heldout")
    config = load_config(settings[0], [*settings[1:], f"data.path={shards}", f"run.dir={tmp_path}"])
    with pytest.raises(UserError, match="heldout/ is missing"):
        check_inputs(config)
    config = replace(config, train=replace(config.train, eval_samples=0))
    assert open_heldout(config, check_inputs(config), SINGLE.data) is None
    assert capsys.readouterr().out == "no evaluation: train.eval_samples=0; eval.jsonl is not written\n"


def test_a_mix_is_evaluated_on_the_folders_that_have_a_held_out_split(
    settings, shards, without, one_process, capsys, tmp_path
):
    mix = f"data.mix={{{shards}: 0.5, {without}: 0.5}}"
    config = load_config(settings[0], [*settings[1:-1], mix, f"run.dir={tmp_path}", "train.eval_samples=1000000"])
    corpora = check_inputs(config)
    heldout = open_heldout(config, corpora, SINGLE.data)
    assert capsys.readouterr().out == f"not evaluated, without a held-out split: {without}\n"
    passes = list(heldout_passes(heldout, config, SINGLE.data))
    ids = [i for batch, counts in passes for i in batch.sample_ids[counts].tolist()]
    assert ids == list(range(corpora[0].manifest.splits["heldout"].windows))
