"""The checkpoint tools with wrong input; each tool's `main` runs in this process."""

import errno
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_checkpoint import manifest, names
from safetensors.numpy import load_file, save_file

from mythos_dist.checkpoint.describe import difference_line, format_value
from mythos_dist.checkpoint.open_mythos import open_weights
from mythos_dist.checkpoint.signature import VARIABLE
from mythos_dist.errors import UserError, run_command

TOOLS = Path(__file__).parents[2] / "tools"
WRITERS = ("export_checkpoint", "reshape_checkpoint")


@pytest.fixture
def tool(monkeypatch, capsys):
    """`tool(code, name, arguments…)` returns the tool's output; it must exit with `code` and without a traceback."""

    def run(code: int, name: str, *arguments: object) -> str:
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        exit_code, problem = 0, ""
        try:
            run_command(module.main)
        except SystemExit as error:
            exit_code = error.code or 0
        except UserError as error:  # `run_command` prints it
            exit_code, problem = error.exit_code, str(error)
        output = capsys.readouterr()
        assert exit_code == code, (output, problem)
        return output.out + output.err + problem

    return run


@pytest.mark.parametrize("name", WRITERS)
def test_an_unusable_out_is_reported_and_nothing_is_written(name, run, tool, tmp_path):
    run.save(2)
    root = run.checkpoints.parent
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    before = sorted(map(str, tmp_path.rglob("*")))
    for out, message in (
        (root, "exists" if name == WRITERS[0] else "already holds step-00000002"),
        (run.checkpoints / "step-00000002", "is inside "),
        (run.checkpoints / "step-00000002" / "weights", "is inside "),
        (run.checkpoints / "weights", "is inside "),
        (root / "x" / ".." / "checkpoints" / "weights", "is inside "),
        (tmp_path / "file", "exists" if name == WRITERS[0] else "is not a folder"),
        (tmp_path / "file" / "x", "Not a directory" if name == WRITERS[0] else "is not a folder"),
        (tmp_path / "link", "exists" if name == WRITERS[0] else "cannot be written"),
        (tmp_path / "circle" / "x", "cannot be"),
        ("/proc/x/y", "cannot be written"),
        ("x" * 300, "cannot be"),
        ("~nobody-of-this-name/x", "cannot be used"),
        ("", "is empty"),
    ):
        output = tool(2, name, root, "--out", out)
        assert message in output, f"{out}: {output}"
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.parametrize("name", [*WRITERS, "inspect_checkpoint"])
def test_a_path_without_a_checkpoint_is_reported(name, run, tool, tmp_path):
    run.save(2)
    (tmp_path / "file").write_text("x")
    out = ["--out", tmp_path / "out"] if name in WRITERS else []
    for path, message in (
        (tmp_path / "absent", "no such folder"),
        (tmp_path / "file", "is a file"),
        (run.checkpoints / "step-00000002" / "checkpoint.json", "is a file"),
        (run.checkpoints / "step-00000009", "is missing"),
        (tmp_path, "neither a run nor a checkpoint"),
        ("x" * 300, "cannot be read"),
        ("", "is empty"),
    ):
        assert message in tool(2, name, path, *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*WRITERS, "inspect_checkpoint", "import_open_mythos"])
def test_help_shows_the_usage(name, tool):
    assert f"usage: {name}" in tool(0, name, "--help")


@pytest.mark.parametrize("name", WRITERS)
def test_wrong_options_are_refused(name, run, tool, tmp_path):
    for workers, problem in (
        ("0", "0 must be at least 1"),
        ("-1", "-1 must be at least 1"),
        ("x", "'x': expected a whole number"),
        ("1.5", "'1.5': expected a whole number"),
        ("²", "'²': expected a whole number"),
    ):
        assert problem in tool(2, name, tmp_path, "--out", tmp_path / "out", "--workers", workers)
    assert "required: --out" in tool(2, name, tmp_path)
    if name == WRITERS[0]:
        for option in ("--dtype", "--format"):
            assert "invalid choice" in tool(2, name, tmp_path, "--out", tmp_path / "out", option, "foo")


@pytest.mark.parametrize("name", WRITERS)
def test_home_is_expanded(name, run, tool, tmp_path, monkeypatch):
    run.save(2)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(run.checkpoints)
    tool(0, name, "~/run", "--out", "~/made")
    assert (tmp_path / "made").is_dir() and not (run.checkpoints / "~").exists()


def test_an_export_keeps_temporary_folders_of_others(run, tool, tmp_path):
    """`--out w` used to delete a folder `w.tmp`."""
    run.save(2)
    for name in ("w.tmp", "w.tmp-1", f"w.tmp-{os.getpid()}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    tool(0, "export_checkpoint", run.checkpoints, "--out", tmp_path / "w")
    assert names(tmp_path / "w") == ["config.json", "model.safetensors"]
    assert names(tmp_path) == sorted(["run", "w", "w.tmp", "w.tmp-1", f"w.tmp-{os.getpid()}"])
    assert all(names(path) == ["notes.txt"] for path in tmp_path.glob("w.tmp*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_reported_and_no_files_are_left(name, code, run, tool, tmp_path, monkeypatch):
    run.save(2)

    def full(handle):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert os.strerror(code) in tool(2, name, run.checkpoints, "--out", tmp_path / "a" / "out")
    assert [path for path in (tmp_path / "a").rglob("*") if path.is_file()] == [] if (tmp_path / "a").exists() else True
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
        assert "720B are needed, 100B are free" in tool(
            2, "reshape_checkpoint", run.checkpoints, "--out", tmp_path / "b"
        )
    tool(0, name, run.checkpoints, "--out", tmp_path / "out")


def test_a_killed_rewrite_can_be_repeated(run, tool, tmp_path):
    run.save(2)
    left = tmp_path / "out" / "checkpoints" / "step-00000002.tmp-0"
    left.mkdir(parents=True)
    tool(0, "reshape_checkpoint", run.checkpoints, "--out", tmp_path / "out")
    assert names(tmp_path / "out" / "checkpoints") == ["latest", "step-00000002", "step-00000002.tmp-0"]


def test_a_comparison_prints_plain_values_without_python_syntax(run, tool):
    """Lists, strings and booleans without brackets and quotes; nouns in singular or plural."""
    saver = run.saver()
    for step in (1, 2):
        about = manifest(step)
        about.optimizer["recent_grad_norms"] = [0.5 * step] * (12 * step)
        about.config["loops"] = {"sweep": [1, 2, 4] if step == 1 else [], "set": None if step == 1 else [3]}
        about.config["parallel"] = {"sequence": step == 1}
        saver.save(about)
        assert saver.finish()
    output = tool(0, "inspect_checkpoint", *(run.checkpoints / f"step-0000000{step}" for step in (1, 2)))
    for line in (
        "step        1, 8 tokens",
        "GB in 1 file\n",
        "1 step, 0 skipped",
        "  loops.sweep: 1, 2, 4 in the first; none in the second",
        "  loops.set: none in the first; 3 in the second",
        "  parallel.sequence: true in the first; false in the second",
        "  optimizer.recent_grad_norms: 12 values from 0.5 to 0.5 in the first; 24 values from 1 to 1 in the second",
        "every parameter is equal, bit for bit",
    ):
        assert line in output, output
    assert not set('[]{}"') & set(output) and "None" not in output and "True" not in output


def test_values_are_formatted_as_plain_text():
    assert format_value({"a": [1, 2.5], "b": None, "c": False}) == "a 1, 2.5, b none, c false"
    assert format_value("evil\x1b[31m\n") == "evil?[31m?"
    assert difference_line("x", [1.0] * 9, [1.0] * 8 + [1.0 + 1e-9]).endswith("in both, 1 of them different")
    assert difference_line("x", 1, "1") == "x: 1 (int) in the first; 1 (str) in the second"


def test_json_output_is_valid_json_with_nan_and_infinity(run, tool):
    """JSON has neither; a checkpoint with NaN is equal to itself."""
    saver = run.saver()
    values = next(iter(saver._shards.values())).values["parameter"]
    values[3] = float("nan")
    for step, value in ((2, 0.0), (4, float("inf"))):
        values[0] = value
        saver.save(manifest(step))
        assert saver.finish()
    first, second = (run.checkpoints / f"step-0000000{step}" for step in (2, 4))
    result = json.loads(tool(1, "inspect_checkpoint", first, second, "--json"), parse_constant=pytest.fail)
    assert result["tensors"] == [{"name": "w", "largest": 0.0, "relative": 0.0, "not_finite": 1}]
    assert "1 element NaN or infinite" in tool(1, "inspect_checkpoint", first, second)
    assert "every parameter is equal" in tool(0, "inspect_checkpoint", first, first)


def test_inspection_reports_the_signature(run, tool, tmp_path, monkeypatch):
    key_file = tmp_path / "key"
    key_file.write_text("0123456789abcdef0123456789abcdef")
    key_file.chmod(0o600)
    run.save(2, key_file=str(key_file))
    run.save(4)
    signed, unsigned = (run.checkpoints / f"step-0000000{step}" for step in (2, 4))
    assert "signature   present; set MYTHOS_CHECKPOINT_KEY_FILE" in tool(0, "inspect_checkpoint", signed)
    assert "signature   none" in tool(0, "inspect_checkpoint", unsigned)
    monkeypatch.setenv(VARIABLE, str(key_file))
    assert "signature   valid" in tool(0, "inspect_checkpoint", signed)
    assert json.loads(tool(0, "inspect_checkpoint", signed, "--json"))["checkpoints"][0]["signature"] == "valid"
    assert "signature   MISSING" in tool(2, "inspect_checkpoint", unsigned)
    for name in WRITERS:
        assert "is not signed" in tool(2, name, unsigned, "--out", tmp_path / "out")
    key_file.write_text("another key of at least 16 bytes")
    assert "signature   WRONG" in tool(2, "inspect_checkpoint", signed)
    tool(0, "reshape_checkpoint", unsigned, "--out", tmp_path / "out", "--ignore-signature")
    assert "signature   valid" in tool(0, "inspect_checkpoint", tmp_path / "out")
    key_file.chmod(0o644)
    assert "chmod 600" in tool(2, "inspect_checkpoint", signed)


def test_files_without_usable_weights_are_refused(tmp_path):
    """A .pt file with wrong names or types; safetensors with a false header, or with a name in two files."""
    for value in ({1: torch.zeros(1)}, {"x": 5}, [torch.zeros(1)], {("a",): torch.zeros(1)}):
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(UserError, match="holds no state dict"):
            open_weights(tmp_path / "x.pt")
    for content in (b"\xff" * 16, (1 << 60).to_bytes(8, "little"), b"\x10\0\0\0\0\0\0\0" + b"[" * 16, b""):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as weights"):
            open_weights(tmp_path / "x.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in "ab":
        save_file({"x": np.zeros(1, np.float32)}, folder / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"b\.safetensors: 'x' is also in a\.safetensors"):
        open_weights(folder)
    (folder / "b.safetensors").unlink()
    (folder / "a.safetensors").rename(tmp_path / "blob")  # as in a Hugging Face cache
    (folder / "a.safetensors").symlink_to(tmp_path / "blob")
    assert list(open_weights(folder)) == ["x"]
    (folder / "a.safetensors").write_bytes(load_file(tmp_path / "blob")["x"].tobytes())
    with pytest.raises(UserError):
        open_weights(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "deepspeed-universal", "--dtype", "bf16"], "--dtype bf16: universal checkpoints hold fp32"),
        (["--format", "deepspeed-universal", "--prefix", "model"], "'model' is not a prefix of parameter names"),
        (["--prefix", "model."], "--prefix model. needs --format deepspeed-universal"),
    ],
)
def test_options_of_universal_exports_are_checked(options, message, run, tool, tmp_path):
    run.save(2)
    assert message in tool(2, "export_checkpoint", run.checkpoints.parent, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
