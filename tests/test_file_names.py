"""Files and folders of unusual names go through every command: as input, output, config, run folder and checkpoint."""

import contextlib
import importlib
import io
import shutil
import sys
import traceback
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers.launch import launch, train
from helpers.small_run import SMALL, TINY
from helpers.token_files import write_megatron, write_saved_dataset

from mythos_dist.commands import COMMANDS
from mythos_dist.errors import UserError, run_command

NAMES = {
    "spaces": " two  words ",
    "a newline": "new\nline",
    "quotes": 'it\'s "quoted"',
    "a leading dash": "-n",
    "a leading tilde": "~x",
    "a comment sign": "a #b",
    "a query": "what?x=1&token=y",
    "percent signs": "100%20%s%(x)d",
    "letters": "模型-é-e\u0301-\u200f",
    "200 characters": "x" * 200,
    "a pattern": "a*[b]?{c}",
    "signs of the shell": "$HOME`x`;&|\\",
    "a setting": "run.dir=x",
    "a colon and commas": "a:b,c",
    "a scheme": "s3:",
    "control characters": "\x1b[31m\r\t",
    "a null": "null",
    "a number": "007",
    "a temporary file": "x.tmp-1",
    "a hidden file": ".hidden",
}
# config.yaml cannot hold these texts, so training refuses them as settings, and says so.
REFUSED = {
    "a newline": "contains the control character",
    "control characters": "contains the control character",
}
Call = tuple[str, list[object]]  # a command and its arguments
MODEL = [*SMALL, "model.vocab_size=300"]


def run_commands(calls: list[tuple[str, list[str]]]) -> list[tuple[int, str]]:
    """Run commands one after the other in this process; exit code and output of each."""
    results = []
    for name, arguments in calls:
        module = next(command.module for command in COMMANDS if command.name == name)
        sys.argv = [f"mythos {name}", *arguments]
        output, code = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), 0
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                run_command(importlib.import_module(module).main)
            except SystemExit as error:
                code = int(error.code or 0)
            except BaseException:
                output.reconfigure(errors="backslashreplace")
                traceback.print_exc()
                code = 1
        results.append((code, output.buffer.getvalue().decode()))  # pyright: ignore[reportAttributeAccessIssue]
    return results


def check_commands(*calls: Call) -> None:
    """All of them exit with 0."""
    texts = [(name, [str(argument) for argument in arguments]) for name, arguments in calls]
    result = launch(1, run_commands, texts)
    assert result.codes == [0], result.tails
    failed = [f"mythos {texts[i]}\n{out[-2000:]}" for i, (code, out) in enumerate(result.values[0]) if code]
    assert not failed, "\n".join(failed)


@pytest.fixture(scope="module")
def plain_run(shards, tmp_path_factory) -> Path:
    """For names that training refuses."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    result = train(1, str(TINY), *SMALL, f"data.path={shards}", "train.steps=2", f"run.dir={run_dir}")
    assert result.codes == [0], result.tails
    return run_dir


@pytest.mark.long
@pytest.mark.parametrize("kind", NAMES)
def test_every_command_takes_files_of_unusual_names(kind, plain_run, tmp_path, monkeypatch):
    name = NAMES[kind]
    folder, elsewhere = tmp_path / name, tmp_path / "elsewhere"
    for made in (folder, elsewhere, folder / "out"):
        made.mkdir()
    monkeypatch.chdir(elsewhere)
    tokenizer, shards, run_dir = folder / f"{name}.model", folder / "shards" / name, folder / "runs" / name
    convert_and_verify(folder, name, tokenizer, shards)
    settings = train_with(kind, folder, name, shards, run_dir)
    if kind in REFUSED:
        shutil.copytree(plain_run, run_dir)
        settings = [TINY, *SMALL, "data.path=shards"]
    use(folder / "out", name, folder / f"{name}.txt", run_dir, settings)
    assert list(elsewhere.iterdir()) == [] and set(tmp_path.iterdir()) == {folder, elsewhere}, "written elsewhere"


def convert_and_verify(folder: Path, name: str, tokenizer: Path, shards: Path) -> None:
    """Text and tokens to shards, by file and by folder."""
    texts = [f"the fox {i} runs over the lazy dog and the cat {i * i} sleeps all day long. " * 8 for i in range(200)]
    with open(folder / f"{name}.parquet", "wb") as stream:
        pq.write_table(pa.table({"text": texts}), stream)
    (folder / f"{name}.txt").write_text("the fox runs\n")
    rows = [[3 + (i * j) % 200 for j in range(40)] + [2] for i in range(100)]
    (folder / "tokens").mkdir()
    write_megatron(folder / "tokens" / name, rows, "uint16")
    common = ["--tokenizer", tokenizer, "--seq-len", 32, "--heldout", 0.1]
    check_commands(
        ("tokenizer", ["--input", folder / f"{name}.parquet", "--out", tokenizer, "--vocab-size", 300]),
        ("shards", ["--input", folder / f"{name}.parquet", *common, "--out", shards, "--workers", 0]),
        ("verify", [shards, "--workers", 0]),
        ("import tokens", [folder / "tokens" / name, *common, "--out", folder / "tokens" / f"{name}-out"]),
        (
            "import tokens",
            [write_saved_dataset(folder / "saved" / name, rows), *common, "--out", folder / "more" / name],
        ),
    )
    if not name.startswith("."):  # hidden files of a folder are left out
        check_commands(("shards", ["--input", folder, *common, "--out", folder / "all" / name]))
    for made in (shards, folder / "tokens" / f"{name}-out", folder / "more" / name):
        assert (made / "manifest.json").is_file()


def train_with(kind: str, folder: Path, name: str, shards: Path, run_dir: Path) -> list[object]:
    """Train and resume with a config of that name, whose base has such a name, too; its command line."""
    config, base = folder / f"{name}.yaml", folder / f"{name}-base.yaml"
    base.write_text(TINY.read_text())
    settings: list[object] = [config, *MODEL, f"run.dir={run_dir}"]
    if kind in REFUSED:
        settings.append(f"data.path={shards}")
        config.write_text("{}")
    else:
        config.write_text(yaml.safe_dump({"base": base.name, "data": {"path": str(shards)}}, allow_unicode=True))
    for steps in (2, 4):
        result = train(1, *map(str, settings), f"train.steps={steps}")
        if kind in REFUSED:
            assert result.codes == [2] and REFUSED[kind] in result.err and "Traceback" not in result.err, result.tails
        else:
            assert result.codes == [0] and (run_dir / "checkpoints" / "step-00000002").is_dir(), result.tails
    return settings


def use(out: Path, name: str, prompts: Path, run_dir: Path, settings: list[object]) -> None:
    """The commands that read a run, and what they wrote."""
    step, few = run_dir / "checkpoints" / "step-00000002", ["--samples", 2]
    check_commands(
        ("status", [run_dir]),
        ("report", [run_dir, "--out", out / f"{name}.html"]),
        ("inspect", [run_dir]),
        ("export", [run_dir, "--out", out / name]),
        ("export", [step, "--format", "hf", "--out", out / f"{name}-hf"]),
        ("export", [step, "--format", "deepspeed-universal", "--out", out / f"{name}-ds"]),
        ("import hf", [out / f"{name}-hf", "--out", out / f"{name}-back"]),
        ("average", [run_dir, step, "--out", out / f"{name}-mean"]),
        ("reshape", [run_dir, "--out", out / f"{name}-reshaped"]),
        ("generate", [run_dir, "--prompts", prompts, "--max-new-tokens", 2]),
        ("generate", [out / name, "--prompt", "the", "--max-new-tokens", 2]),
        ("evaluate", [run_dir, "--tasks", "perplexity_by_position", *few, "--out", out / f"{name}-scores"]),
        ("depth-sweep", [run_dir, "--loops", "1,2", *few, "--text", prompts, "--out", out / f"{name}-sweep"]),
        ("decoding-quality", [run_dir, "--cache", "all", "--exits", "latent:0.1", *few, "--tokens", 8]),
        ("plan", [*settings, "--gpus", 1, "--write", out / f"{name}.yaml"]),
    )
    if "data.path=shards" not in settings:  # the settings of the run
        other = f"run.dir={run_dir.parent / (name + '-continued')}"
        check_commands(("import deepspeed", [out / f"{name}-ds", *settings, other]))
        check_commands(("submit", [*settings, "--nodes", 1, "--dry-run"]))
    files = ["{}.html", "{}/config.json", "{}-hf/config.json", "{}-back/config.json", "{}-mean/config.json"]
    files += ["{}-reshaped/checkpoints/latest", "{}-scores.json", "{}-sweep.json", "{}-sweep.html", "{}.yaml"]
    missing = [file for file in files if not (out / file.replace("{}", name)).is_file()]
    assert not missing, sorted(out.rglob("*"))


def test_control_characters_of_names_are_escaped_in_messages():
    """A terminal would obey them, and a line end would begin another line."""
    error = UserError("is \x1b[31mred\r", source="a\nb\x1b[0m\x9b")
    assert str(error) == "a\\nb\\x1b[0m\\x9b: is \\x1b[31mred\\x0d"


def test_names_that_are_not_utf8_can_be_printed():
    """Standard output raises UnicodeEncodeError for them by default."""
    output = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    with contextlib.redirect_stdout(output):
        run_command(lambda: print("bad\udcff"))
    assert output.buffer.getvalue() == b"bad\\udcff\n"  # pyright: ignore[reportAttributeAccessIssue]
