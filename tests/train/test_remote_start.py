"""Runs that begin with a checkpoint in a store train as from a local one, and each rank reads only what it needs."""

import json
import os
from pathlib import Path

import pytest
from helpers.launch import launch, train, train_here
from helpers.run_folder import at, lines

from mythos_dist.checkpoint.manifest import read_checkpoint_manifest

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1800)]
EXACT = ("step", "loss", "grad_norm", "batch_id", "lr", "n_loops", "tokens_total")


@pytest.fixture(scope="module")
def run(settings) -> list[str]:
    more = "train.steps=5 train.global_batch=4 checkpoint.every=2 checkpoint.keep=9 model.dim=128 model.vocab_size=2048"
    return [*settings, *more.split()]


@pytest.fixture(scope="module")
def parent(run, tmp_path_factory) -> Path:
    """A finished run of two ranks."""
    run_dir = tmp_path_factory.mktemp("parent") / "run"
    result = train(2, *run, f"run.dir={run_dir}", "train.steps=4", "checkpoint.every=4")
    assert result.codes == [0, 0], result.tails
    return run_dir


@pytest.fixture(scope="module")
def url(store, parent) -> str:
    return store.upload(parent, "parents")


def train_as_rank(folder: str, arguments: list[str]) -> None:
    """The store sees which rank asks; the rank records the bytes that it needs."""
    from mythos_dist.checkpoint.pieces import size_without_padding
    from mythos_dist.checkpoint.reader import Checkpoint

    rank, read_all = os.environ["RANK"], Checkpoint.read_all
    os.environ["AWS_EXECUTION_ENV"] = f"rank-{rank}"

    def recorded(self, wanted, *more) -> None:
        every = list(wanted)
        tensors = self.manifest.tensors
        needed = sum(4 * size_without_padding(one.piece, tensors[one.name].shape) for one in every)
        Path(folder, rank).write_text(json.dumps(needed))
        read_all(self, every, *more)

    Checkpoint.read_all = recorded  # type: ignore[method-assign]
    train_here(arguments)


def exact(run_dir: Path) -> list[tuple]:
    return [tuple(line[key] for key in EXACT) for line in lines(run_dir)]


@pytest.mark.parametrize(
    ("ranks", "layout", "state", "ratio"),
    [
        (2, "", "everything", 1.1),
        (4, "parallel.pipe=2 parallel.expert=2", "weights+moments", 1.1),
        # Half of each of thousands of short rows: gaps are read as well (CHECKPOINT-14).
        pytest.param(4, "parallel.tensor=2 parallel.zero=3", "weights", 2.5, marks=pytest.mark.long),
    ],
)
def test_a_run_starts_from_a_store_as_from_a_folder(parent, url, run, store, tmp_path, ranks, layout, state, ratio):
    """From the newest checkpoint of the run: the same lines, bit for bit; each rank reads at most 1.1 times the bytes
    that it needs, headers included. The lineage has the URL."""
    store.reset()
    base = [*run, *layout.split(), f"start_from_state={state}"]
    assert train(ranks, *base, f"run.dir={tmp_path / 'here'}", f"start_from={parent}").codes == [0] * ranks
    arguments = [*base, f"run.dir={tmp_path / 'there'}", f"start_from={url}"]
    result = launch(ranks, train_as_rank, str(tmp_path), arguments, env=store.env)
    assert result.codes == [0] * ranks, result.tails
    assert exact(tmp_path / "there") == exact(tmp_path / "here")
    assert f"starting from {url}/checkpoints/step-00000004 (step 4" in result.out
    step = lines(tmp_path / "there")[-1]["step"]
    (ancestor,) = read_checkpoint_manifest(at(tmp_path / "there", step)).lineage.parents
    assert (ancestor.path, ancestor.state) == (f"{url}/checkpoints/step-00000004", state)
    for rank in range(ranks):
        sent = {path: size for (client, path), size in store.proxy.sent.items() if client == f"rank-{rank}"}
        needed = json.loads((tmp_path / str(rank)).read_text())
        tensors = sum(size for path, size in sent.items() if path.endswith(".safetensors"))
        assert 0 < needed <= tensors <= ratio * needed, f"rank {rank}: {tensors} bytes for {needed}"
        assert rank == 0 or not any(path.endswith("checkpoint.json") for path in sent), "rank 0 reads it for all"
    text = "".join(file.read_text(errors="replace") for file in (tmp_path / "there").rglob("*.*") if file.is_file())
    assert store.env["AWS_SECRET_ACCESS_KEY"] not in text


def test_a_store_that_fails_ends_the_start_with_one_message(run, url, store, tmp_path):
    """On all ranks; if the manifest cannot be read, before anything is written."""
    for name, fault, words in (
        ("checkpoint.json", 403, "access is denied"),
        ("rank-00001.safetensors", 404, "there is no such file"),
    ):
        store.reset()
        store.proxy.fault = lambda path, number, name=name, fault=fault: fault if path.endswith(name) else None
        run_dir = tmp_path / name.partition(".")[2]
        stage = [*run, f"run.dir={run_dir}", f"start_from={url}/checkpoints/step-00000004"]
        result = launch(2, train_here, stage, env=store.env)
        assert result.codes == [2, 2], result.tails
        assert words in result.err and result.err.count("error: ") == 1, result.err
        assert f"{url}/checkpoints/step-00000004/{name}" in result.err
        assert not any("Traceback" in tail for tail in result.tails)
        assert run_dir.exists() == name.startswith("rank")
    for start_from, words in ((f"{url}/nothing", "neither a run with"), ("ftp://host/run", "ftp:// is not read")):
        store.reset()
        stage = [*run, f"run.dir={tmp_path / 'stage'}", f"start_from={start_from}"]
        result = launch(1, train_here, stage, env=store.env)
        assert result.codes == [2] and words in result.err, result.tails
