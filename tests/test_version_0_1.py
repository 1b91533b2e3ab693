"""A run that version 0.1 began (4 ranks: tensor 2, data 2, ZeRO 1) resumes at its layout and at two others.

`fixtures/run_of_version_0.1` was written by that version: shards, a checkpoint after step 2, and the metrics of all 4
steps, which are the reference.
"""

import json
import shutil

import pytest
from helpers.launch import train
from helpers.small_run import REPOSITORY

FIXTURE = REPOSITORY / "tests" / "fixtures" / "run_of_version_0.1"


@pytest.mark.launch
@pytest.mark.parametrize(
    ("ranks", "layout"), [(4, []), (1, ["parallel.tensor=1"]), (2, ["parallel.pipe=2", "parallel.tensor=1"])]
)
def test_a_run_of_version_0_1_resumes(ranks, layout, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(FIXTURE / "run", run_dir)
    reference = [json.loads(line) for line in (FIXTURE / "metrics.jsonl").read_text().splitlines()]
    settings = [f"data.path={FIXTURE / 'shards'}", f"run.dir={run_dir}", *layout]
    result = train(ranks, str(run_dir / "config.yaml"), *settings)
    assert result.codes == [0] * ranks, result.tails
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [3, 4]
    for ours, theirs in zip(steps, reference[2:], strict=True):
        assert ours["batch_id"] == theirs["batch_id"] and ours["tokens"] == theirs["tokens"]
        for key in ("loss", "grad_norm", "lr"):  # summed in another order by other kernels
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
