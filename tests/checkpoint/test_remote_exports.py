"""Exports in a store are read as from a folder, in ranges; the tools take URLs wherever they take folders."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.launch import run_tool
from helpers.small_checkpoint import write_run
from helpers.small_run import REPOSITORY

from mythos_dist.checkpoint.export import export
from mythos_dist.checkpoint.exported import ExportedWeights, open_export
from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.checkpoint.reader import Checkpoint, Wanted
from mythos_dist.checkpoint.restore import load_model, open_checkpoint
from mythos_dist.config.load import load_config
from mythos_dist.data.tokenizer_files import find_tokenizer
from mythos_dist.errors import UserError
from mythos_dist.urls import RemotePath

pytestmark = pytest.mark.usefixtures("no_faults")

FORMS = {"safetensors": "fp32", "hf": "bf16", "open_mythos": "fp16"}


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory) -> Path:
    """A run with drawn weights and OpenMythos' loops, whose tokenizer is that of its shards."""
    return write_run(
        tmp_path_factory.mktemp("run") / "run", load_config(settings[0], [*settings[1:], "model.mode=reference"])
    )


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory) -> dict[str, Path]:
    """The run in each format, in several files."""
    folder = tmp_path_factory.mktemp("exports")
    source = open_checkpoint(run)
    for form, dtype in FORMS.items():
        export(source, folder / form, form, dtype=dtype, file_bytes=60_000)
    return {form: folder / form for form in FORMS}


@pytest.fixture(scope="module")
def urls(store, run, exports) -> dict[str, str]:
    """The run and its exports in the store."""
    found = {form: store.upload(folder, f"export-{form.replace('_', '-')}") for form, folder in exports.items()}
    return {**found, "run": store.upload(run, "the-run")}


def pieces_of(checkpoint: Checkpoint, ranks: int, rank: int) -> list[Wanted]:
    """A range of each tensor, with padding that must not change."""
    found = []
    for name, tensor in checkpoint.manifest.tensors.items():
        size = int(np.prod(tensor.shape))
        first, last = (size * i // ranks for i in (rank, rank + 1))
        piece = Piece(tensor.shape, (0,) * len(tensor.shape), first, last)
        found.append(Wanted(tensor.weights, name, piece, np.full(last - first, np.nan, np.float32)))
    return found


@pytest.mark.launch
@pytest.mark.parametrize("form", FORMS)
def test_an_export_is_read_as_from_its_folder(store, exports, urls, form):
    """Bit for bit, in any dtype; where names are ours, a rank of four reads about a quarter of the bytes."""
    local, remote = ExportedWeights(exports[form]), open_export(RemotePath(urls[form]))
    assert remote.manifest == local.manifest and str(remote.folder) == urls[form]
    for rank in range(4):
        store.reset()
        here, there = pieces_of(local, 4, rank), pieces_of(remote, 4, rank)
        local.read_all(here)
        remote.read_all(there)
        for one, other in zip(here, there, strict=True):
            np.testing.assert_array_equal(one.out, other.out, err_msg=one.name)
        if form != "open_mythos":
            item = {"fp32": 4, "bf16": 2}[FORMS[form]]
            sent = sum(store.proxy.sent.values())
            # The class for transformers loads routers in fp32, so a few tensors have twice the bytes.
            assert sent <= 1.1 * item * sum(one.out.size for one in there)
    ours, config, step = load_model(exports[form])
    theirs, other_config, other_step = load_model(RemotePath(urls[form]))
    assert (config, step) == (other_config, other_step)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.launch
def test_the_tokenizer_of_an_export_is_read_from_the_store(exports, urls):
    data = load_config(REPOSITORY / "configs" / "tiny_cpu.yaml").data
    here, there = (find_tokenizer(path, data) for path in (exports["hf"], RemotePath(urls["hf"])))
    assert there.tokenizer.encode("a test").tolist() == here.tokenizer.encode("a test").tolist()
    assert there.tokenizer.eos == here.tokenizer.eos and there.template == here.template


@pytest.mark.launch
def test_a_changed_export_is_refused(store, exports, tmp_path):
    """A tensor that is missing, and a file that is cut: the message names it."""
    copy = tmp_path / "export"
    shutil.copytree(exports["hf"], copy)
    file = sorted(copy.glob("*.safetensors"))[0]
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(UserError, match=r"missing \d+ tensor"):
        open_export(RemotePath(store.upload(copy, "lacks-a-file")))
    file.write_bytes(content[:-2])
    with pytest.raises(UserError, match=rf"{file.name}: cannot be read \(.*its tensors end at byte"):
        open_export(RemotePath(store.upload(copy, "has-a-short-file")))
    file.write_bytes(content)
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read as an export's settings"):
        open_export(RemotePath(store.upload(copy, "has-bad-settings")))


def tool(name: str, *arguments: object, code: int = 0) -> str:
    """The output of a tool; it must exit with `code` and without a traceback."""
    result = run_tool(REPOSITORY / "tools" / f"{name}.py", *arguments)
    assert result.codes == [code] and "Traceback" not in result.err, result.err
    return result.out


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_the_tools_take_urls(run, exports, urls, shards, tmp_path):
    """The same output and the same files as from the folder."""
    assert "every parameter is equal, bit for bit" in tool("inspect_checkpoint", run, urls["run"])
    described = tool("inspect_checkpoint", urls["run"])
    assert described.splitlines()[0] == f"{urls['run']}/checkpoints/step-00000003"
    assert "every byte is as it was written" in described

    for source, out in ((run, "here"), (urls["run"], "there")):
        tool("export_checkpoint", source, "--out", tmp_path / out / "export", "--quiet")
        tool("reshape_checkpoint", source, "--out", tmp_path / out / "run", "--quiet")
        tool("average_checkpoints", source, source, "--out", tmp_path / out / "mean", "--quiet")
    for file in ("export/model.safetensors", "export/tokenizer.model", "mean/model.safetensors"):
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "here" / file).read_bytes(), file
    here, there = (open_checkpoint(tmp_path / out / "run") for out in ("here", "there"))
    assert {name: file.hash for name, file in here.manifest.files.items()} == {
        name: file.hash for name, file in there.manifest.files.items()
    }

    greedy = ("--prompt", "the", "--temperature", "0", "--max-new-tokens", "4")
    assert tool("generate", urls["hf"], *greedy) == tool("generate", exports["hf"], *greedy)
    for name, options in {
        "depth_sweep": ("--loops", "1,2", "--samples", "4", "--data", shards, "--json"),
        "evaluate": ("--tasks", "perplexity_by_position", "--samples", "4", "--data", shards, "--json"),
    }.items():
        results = [
            json.loads(tool(name, source, *options, "--out", tmp_path / f"{name}-{i}" / "out").splitlines()[-1])
            for i, source in enumerate((run, urls["run"]))
        ]
        assert results[1].pop("checkpoint", urls["run"]).startswith(urls["run"])
        results[0].pop("checkpoint", None)
        assert results[0] == results[1]
        assert "--out" in run_tool(REPOSITORY / "tools" / f"{name}.py", urls["run"], *options).err


def test_a_url_that_no_tool_can_use_is_one_message(urls):
    for url, words in (
        (f"{urls['run']}/nothing", "neither a run nor a checkpoint"),
        ("s3://no-such-bucket/run", "cannot be listed after"),
        ("ftp://host/run", "the scheme ftp:// is not read"),
        ("s3://", "names no bucket"),
    ):
        with pytest.raises(UserError, match=words):
            open_checkpoint(RemotePath(url))
