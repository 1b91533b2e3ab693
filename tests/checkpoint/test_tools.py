"""The checkpoint tools as commands: export and import against the open-mythos package, memory against getrusage."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.launch import run_tool, train
from safetensors.torch import load_file, save_file

from mythos_dist.checkpoint.manifest import CheckpointManifest, FileEntry, TensorEntry, library_versions
from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.checkpoint.restore import load_model
from mythos_dist.checkpoint.save import publish
from mythos_dist.checkpoint.tensor_file import write_tensors

REPOSITORY = Path(__file__).parents[2]
NOT_EXPORTED = {"freqs_cis", "freqs_cis_mla", "head.weight"}  # computed by OpenMythos, and the tied embedding

pytestmark = pytest.mark.timeout(800)


def tool(name: str, *arguments: object, code: int = 0) -> str:
    """The output of a tool; it must exit with `code` and without a traceback."""
    result = run_tool(REPOSITORY / "tools" / f"{name}.py", *arguments)
    assert result.codes == [code] and "Traceback" not in result.err, result.err
    return result.out + result.err


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory) -> Path:
    """The folder of a run with OpenMythos' model, sharded over three axes."""
    run_dir = tmp_path_factory.mktemp("tools") / "run"
    layout = "parallel.tensor=2 parallel.expert=2 parallel.pipe=2 model.mode=reference checkpoint.keep=1"
    result = train(8, *settings, *layout.split(), f"run.dir={run_dir}", "optim.lr=2e-2", seconds=600)
    assert result.codes == [0] * 8, result.tails
    return run_dir


def reference_of(open_mythos, folder: Path, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """OpenMythos with the exported config and weights."""
    settings = json.loads((folder / "config.json").read_text())
    model = open_mythos.main.OpenMythos(open_mythos.main.MythosConfig(**settings))
    keys = model.load_state_dict(state, strict=False)
    assert set(keys.missing_keys) == NOT_EXPORTED and not keys.unexpected_keys
    return model.eval()


@pytest.mark.launch
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_exported_weights_run_in_open_mythos(dtype, run, open_mythos, tmp_path):
    """Equal logits, up to rounding of fp32 or of bf16 weights."""
    out = tmp_path / "out"
    output = tool("export_checkpoint", run, "--out", out, "--format", "open_mythos", "--dtype", dtype)
    assert "step 6: " in output and str(out) in output
    ours, config, _ = load_model(run)
    theirs = reference_of(open_mythos, out, load_file(out / "model.safetensors"))
    input_ids = torch.arange(24).view(2, 12)
    expected = ours(input_ids)
    assert expected.std() > 0.05, "the model must have learned something"
    tolerance = {"fp32": 1e-5, "bf16": 3e-2}[dtype]
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids), expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    assert config.model.mode == "reference"


@pytest.mark.launch
def test_an_export_in_several_files_has_an_index(run, tmp_path, monkeypatch):
    from mythos_dist.checkpoint.export import export
    from mythos_dist.checkpoint.restore import open_checkpoint

    one, many = (
        export(open_checkpoint(run), tmp_path / str(size), "safetensors", file_bytes=size) for size in (1 << 30, 30_000)
    )
    assert [file.name for file in one] == ["model.safetensors"] and len(many) > 2
    index = json.loads((tmp_path / "30000" / "model.safetensors.index.json").read_text())
    tensors = load_file(one[0])
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for file in many:
        for name, tensor in load_file(file).items():
            assert index["weight_map"][name] == file.name and torch.equal(tensor, tensors[name])
    model, *_ = load_model(run)
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def open_mythos_export(run, tmp_path_factory) -> Path:
    """An export of the run for OpenMythos."""
    out = tmp_path_factory.mktemp("open_mythos") / "out"
    tool("export_checkpoint", run, "--out", out, "--format", "open_mythos", "--quiet")
    return out


@pytest.mark.launch
@pytest.mark.parametrize("form", ["pt", "wrapped", "safetensors", "folder"])
def test_a_run_starts_from_open_mythos_weights_at_any_layout(
    form, run, settings, open_mythos, open_mythos_export, tmp_path
):
    """From OpenMythos' state dict, tables and tied head included; the first held-out loss is that of the weights."""
    model = reference_of(open_mythos, open_mythos_export, load_file(open_mythos_export / "model.safetensors"))
    if form in ("pt", "wrapped"):
        weights = tmp_path / "weights.pt"
        state = model.state_dict()
        torch.save({"model": state, "step": 3} if form == "wrapped" else state, weights)
    else:
        weights = open_mythos_export / ("model.safetensors" if form == "safetensors" else "")
    begun = tmp_path / "begun"
    common = [*settings, "model.mode=reference", f"run.dir={begun}", "parallel.tensor=2", "train.steps=1"]
    result = json.loads(tool("import_open_mythos", weights, *common, "--json"))
    assert result == {"weights": str(weights), "out": str(begun / "checkpoints" / "step-00000000"), "notes": []}
    assert Checkpoint(Path(result["out"])).manifest.optimizer["steps"] == 0
    if form != "pt":
        return
    result = train(2, *common)
    assert result.codes == [0, 0] and "resuming from" in result.out, result.tails
    losses = [json.loads(line)["heldout_loss"] for line in (begun / "eval.jsonl").read_text().splitlines()]
    before = [json.loads(line)["heldout_loss"] for line in (run / "eval.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(before[-1], rel=1e-5)


@pytest.mark.launch
def test_weights_that_do_not_fit_are_refused_with_all_mismatches(run, settings, tmp_path):
    tool("export_checkpoint", run, "--out", tmp_path / "out", "--format", "open_mythos")
    file = tmp_path / "out" / "model.safetensors"
    state = load_file(file)
    state["extra.weight"] = torch.zeros(2)
    del state["prelude.0.attn_norm.weight"]
    state["norm.weight"] = torch.zeros(5)
    save_file(state, file)
    begun = [*settings, "model.mode=reference", f"run.dir={tmp_path / 'begun'}"]
    output = tool("import_open_mythos", file, *begun, code=2)
    for message in (
        "missing 1 tensor: prelude.0.attn_norm",
        "unknown 1 tensor: extra.weight",
        "norm.weight [5] instead of",
    ):
        assert message in output, output
    for content, message in ((b"", "cannot be read"), (b"\x80\x04K\x01.", "cannot be read")):
        (tmp_path / "bad.pt").write_bytes(content)
        assert message in tool("import_open_mythos", tmp_path / "bad.pt", *begun, code=2)
    assert "no such file" in tool("import_open_mythos", tmp_path / "absent.pt", *begun, code=2)
    assert "do not work with model.loop_signal=false" in tool(
        "import_open_mythos", file, *begun, "model.mode=train", code=2
    )
    assert not (tmp_path / "begun").exists()


class _Opens:
    """A pickle that creates a folder when it is loaded."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["TARGET"],))


@pytest.mark.launch
def test_loading_weights_runs_no_code_from_the_file(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("TARGET", str(tmp_path / "made"))
    torch.save({"embed.weight": _Opens()}, tmp_path / "evil.pt")
    begun = [*settings, "model.mode=reference", f"run.dir={tmp_path / 'run'}"]
    output = tool("import_open_mythos", tmp_path / "evil.pt", *begun, code=2)
    assert "cannot be read as weights" in output and not (tmp_path / "made").exists()


@pytest.mark.launch
def test_inspection_describes_a_checkpoint_and_compares_two(run, tmp_path):
    output = tool("inspect_checkpoint", run)
    model, *_ = load_model(run)
    for text in (
        "step        6, 1,536 tokens",
        f"{sum(p.numel() for p in model.parameters()):,}; weights and the optimizer's moments",
        "ranks 8",
        "tensor 2",
        "6 steps, 0 skipped",
        "every byte is as it was written",
    ):
        assert text in output, output
    summary = json.loads(tool("inspect_checkpoint", run, "--json"))["checkpoints"][0]
    files = list((run / "checkpoints" / "step-00000006").glob("*.safetensors"))
    assert summary["bytes"] == sum(file.stat().st_size for file in files) and summary["files"] == len(files)

    tool("reshape_checkpoint", run, "--out", tmp_path / "same")
    assert "every parameter is equal, bit for bit" in tool("inspect_checkpoint", run, tmp_path / "same")
    changed = load_file(tmp_path / "same" / "checkpoints" / "step-00000006" / "tensors-00000-of-00001.safetensors")
    changed["parameter/norm.weight"][3] += 0.25
    rewrite(tmp_path / "same", changed)
    output = tool("inspect_checkpoint", run, tmp_path / "same", code=1)
    assert "norm.weight: differs by up to 0.25" in output and "1 tensor differs" in output

    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    file = damaged / "checkpoints" / "step-00000006" / files[0].name
    file.write_bytes(file.read_bytes()[:-1])
    assert f"DAMAGED\n    {file} has" in tool("inspect_checkpoint", damaged, code=1)
    assert "is damaged" not in tool("inspect_checkpoint", tmp_path / "same")
    for name, arguments in (
        ("reshape_checkpoint", ["--out", tmp_path / "x"]),
        ("export_checkpoint", ["--out", tmp_path / "x"]),
    ):
        assert f"{file} has" in tool(name, damaged, *arguments, code=2)
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").iterdir())


def rewrite(run_dir: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the values in a canonical checkpoint of one file."""
    folder = run_dir / "checkpoints" / "step-00000006"
    manifest = Checkpoint(folder).manifest
    (name,) = manifest.files
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    temporary = folder.with_name("step-00000006.tmp-9")
    temporary.mkdir()
    size, digest = write_tensors(temporary / name, shapes, (t.reshape(-1).numpy().data for t in tensors.values()))
    files = {name: FileEntry(size, digest, manifest.files[name].pieces)}
    publish(temporary, CheckpointManifest(**{**vars(manifest), "files": files}))


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Iterator[Path]:
    """A checkpoint of 1.2 GB: one matrix of 400 MB and its moments, its columns sharded over four ranks."""
    run_dir = tmp_path_factory.mktemp("large")
    temporary = run_dir / "checkpoints" / "step-00000001.tmp-1"
    temporary.mkdir(parents=True)
    rows, columns, kinds = 10_000, 10_000, ("parameter", "exp_avg", "exp_avg_sq")
    files = {}
    for rank in range(4):
        elements = np.arange(rows * columns // 4, dtype=np.float32) + rank
        shapes = {f"{kind}/prelude.0.w": elements.shape for kind in kinds}
        size, digest = write_tensors(temporary / f"rank-{rank:05d}.safetensors", shapes, [elements.data] * 3)
        piece = Piece((rows, columns // 4), (0, rank * columns // 4), 0, elements.size)
        files[f"rank-{rank:05d}.safetensors"] = FileEntry(size, digest, {"prelude.0.w": piece})
    from mythos_dist.config.schema import MythosConfig

    manifest = CheckpointManifest(
        1, 1, 1, {}, {"model": asdict(MythosConfig())}, "", library_versions(),
        {"steps": 1, "skipped_steps": 0, "loss_scale": {}},
        {"prelude.0.w": TensorEntry((rows, columns), kinds)}, files,
    )  # fmt: skip
    publish(temporary, manifest)
    yield run_dir
    shutil.rmtree(run_dir)


@pytest.mark.launch
@pytest.mark.long
def test_memory_does_not_grow_with_the_model(large, tmp_path):
    """Rewriting 1.2 GB, exporting 400 MB, and averaging 400 MB twice take a few blocks more than the imports alone."""
    script = str(REPOSITORY / "tools" / "{}.py")
    imports = peak([sys.executable, "-c", "import mythos_dist.checkpoint.export, torch"])
    rewriting = peak([sys.executable, script.format("reshape_checkpoint"), str(large), "--out", str(tmp_path / "run")])
    exporting = peak([sys.executable, script.format("export_checkpoint"), str(large), "--out", str(tmp_path / "out")])
    average = [sys.executable, script.format("average_checkpoints"), str(large), str(large)]
    averaging = peak([*average, "--out", str(tmp_path / "average")])
    assert rewriting - imports < 200, f"{rewriting:.0f} MB, {imports:.0f} MB of them for imports"
    assert exporting - imports < 200, f"{exporting:.0f} MB, {imports:.0f} MB of them for imports"
    assert averaging - imports < 200, f"{averaging:.0f} MB, {imports:.0f} MB of them for imports"


def peak(command: list[str]) -> float:
    """Peak resident memory of a command in MB, measured by a small process: a child starts with its parent's peak."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=400, check=True
    )
    return int(result.stdout) / 1024
