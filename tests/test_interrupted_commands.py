"""Ctrl-C at any moment of any command: exit code 130, no traceback, no partial file; the same command then completes.

A command that writes is interrupted at calls that change its folder, every command also at a random time.
tests/test_interrupts.py tests the handler itself, tests/train/test_stop.py training, which saves and exits with 85.
"""

import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from helpers.kill_points import labels
from helpers.launch import Launch, launch, train
from helpers.small_checkpoint import write_run
from helpers.small_run import SMALL, TINY
from helpers.token_files import write_megatron
from safetensors.torch import save_file

from mythos_dist.commands import COMMANDS
from mythos_dist.config.load import load_config

# What each command is run with, in a folder that has `data` (the inputs), and where only `out` is new.
ARGUMENTS = {
    "sample-data": "--out out --seq-len 64 --vocab-size 512",
    "tokenizer": "--input data/text.parquet --out out/t.model --vocab-size 512",
    "shards": "--input data/text.parquet --tokenizer data/t.model --seq-len 32 --out out --heldout 0.1 --workers 2",
    "import tokens": "data/tokens --tokenizer data/t.model --seq-len 32 --out out --workers 2",
    "verify": "data/shards --workers 2",
    "plan": "--variant 1b --gpus 8 --write plan.yaml",
    "doctor": "",
    "status": "data/run --watch 0.2",
    "report": "data/run --out report.html",
    "inspect": "data/run",
    "export": "data/run --out out",
    "import hf": "data/hf --out out",
    "retrofit": "data/llama --out out --prelude 1 --loop 1..2 --coda 1 --tokenizer data/t.model",
    "import deepspeed": "data/universal {config} run.dir=out",
    "import open-mythos": "data/open_mythos.pt {config} model.mode=reference run.dir=out",
    "average": "data/run/checkpoints/step-00000002 data/run --out out",
    "reshape": "data/run --out out",
    "generate": "data/run --prompt the --max-new-tokens 200",
    "evaluate": "data/run --tasks perplexity_by_position --out out/scores",
    "depth-sweep": "data/run --loops 1,2 --out out/sweep",
    "decoding-quality": "data/run --cache all --exits latent:0.1 --samples 2 --tokens 31 --out out/quality.json",
    "serve": "data/run --port 0",
}
# train: tests/train/test_stop.py. demo: runs the others. submit, completion: end in less than a second.
ELSEWHERE = {"train", "demo", "submit", "completion"}
ENDLESS = {"serve": 0, "status": 0}  # until Ctrl-C; the code of the first, which ends in order, is another
RESUMED = {"sample-data", "shards", "import tokens", "evaluate"}  # continue with what they had written
VARYING = (".html", ".png", ".svg")  # hold the time, or names of fonts
POINTS = 4


def test_every_command_has_a_case():
    assert set(ARGUMENTS) | ELSEWHERE == {command.name for command in COMMANDS}


def command(name: str, arguments: list[str]) -> None:
    """`mythos NAME ARGUMENTS` in this process."""
    from mythos_dist.commands.main import main

    sys.argv = ["mythos", *name.split(), *arguments]
    main()


@pytest.fixture(scope="module")
def data(shards, tmp_path_factory) -> Path:
    """Inputs of all commands."""
    data = tmp_path_factory.mktemp("interrupted") / "data"
    shutil.copytree(shards, data / "shards")
    (data / "text.parquet").hardlink_to(shards.parent / "corpus.parquet")
    (data / "t.model").hardlink_to(shards.parent / "tokenizer.model")
    (data / "tokens").mkdir()
    rows = [[3 + (i * j) % 200 for j in range(40)] + [2] for i in range(200)]
    write_megatron(data / "tokens" / "a", rows, "uint16")
    settings = [str(TINY), *SMALL, f"data.path={data / 'shards'}", "train.steps=2"]
    assert train(1, *settings, f"run.dir={data / 'run'}").codes == [0]
    reference = load_config(TINY, [*settings[1:], "model.mode=reference"])
    write_run(data / "reference", reference)
    for source, kind, out in (
        ("run", "hf", "hf"),
        ("run", "deepspeed-universal", "universal"),
        ("reference", "open_mythos", "open_mythos.pt"),
    ):
        arguments = [str(data / source), "--format", kind, "--out", str(data / out)]
        assert (made := launch(1, command, "export", arguments)).codes == [0], made.tails
    write_llama(data / "llama")
    return data


def write_llama(folder: Path) -> None:
    """A pretrained model of four layers, as transformers would save it."""
    layer = {"input_layernorm": [8], "post_attention_layernorm": [8]}
    layer |= {f"self_attn.{letter}_proj": [8, 8] for letter in "qkvo"}
    layer |= {"mlp.gate_proj": [12, 8], "mlp.up_proj": [12, 8], "mlp.down_proj": [8, 12]}
    shapes = {f"layers.{i}.{name}": shape for i in range(4) for name, shape in layer.items()}
    shapes |= {"embed_tokens": [400, 8], "norm": [8]}
    folder.mkdir()
    save_file({f"model.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}, folder / "a.safetensors")
    config = dict(model_type="llama", vocab_size=400, hidden_size=8, intermediate_size=12, num_hidden_layers=4)
    config |= dict(num_attention_heads=2, tie_word_embeddings=True)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def start(data, tmp_path, monkeypatch):
    """`start(name, folder, environment)` runs a command in a new folder with the inputs."""

    def run(name: str, folder: str, environment: Mapping[str, str] | None = None) -> Launch:
        if not (tmp_path / folder).exists():
            shutil.copytree(data, tmp_path / folder / "data", copy_function=os.link)
        monkeypatch.chdir(tmp_path / folder)
        config = " ".join([str(TINY), *SMALL, "data.path=data/shards"])
        arguments = ARGUMENTS[name].format(config=config).split()
        points = {"KILL_SIGNAL": "INT", "KILL_POINTS_IN": os.getcwd(), "KILL_POINTS_LOG": str(tmp_path / "calls")}
        (tmp_path / "calls.sent").unlink(missing_ok=True)
        return launch(1, command, name, arguments, env={**points, **(environment or {})})

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the inputs, except for what differs between two runs."""
    files = [path for path in folder.rglob("*") if path.is_file() and folder / "data" not in path.parents]
    texts = {str(path.relative_to(folder)): b"" if path.suffix in VARYING else path.read_bytes() for path in files}
    return {name: re.sub(rb'"computed_requests": \d+', b"", text) for name, text in texts.items()}


@pytest.mark.long
@pytest.mark.parametrize("name", ARGUMENTS)
def test_ctrl_c_at_any_moment_leaves_nothing_half_written(name, start, tmp_path, seed):
    draw = random.Random(seed)
    begin = time.monotonic()
    if name in ENDLESS:
        moments = [{"KILL_IN": "6"}]
        expected = {}
    else:
        done = start(name, "uninterrupted")
        assert done.codes == [0], done.tails
        seconds = time.monotonic() - begin
        expected = contents(tmp_path / "uninterrupted")
        points = list(dict.fromkeys(labels(tmp_path / "calls")))
        if len(points) > POINTS:
            points = [points[0], *draw.sample(points[1:-1], POINTS - 2), points[-1]]
        moments = [{"KILL_POINT": f"{draw.choice(['before', 'after'])}:{point}"} for point in points]
        moments.append({"KILL_IN": str(draw.uniform(0.1, 0.9) * seconds)})
    for i, moment in enumerate(moments):
        folder = tmp_path / str(i)
        stopped = start(name, folder.name, moment)
        code = ENDLESS.get(name, 130)
        assert stopped.codes == [code] or (stopped.codes == [0] and "KILL_IN" in moment), (moment, stopped.tails)
        assert "Traceback" not in stopped.err, (moment, stopped.err)
        if stopped.codes == [130]:
            assert stopped.err.splitlines()[-1].startswith("stopped"), stopped.err
        left = contents(folder)
        wrong = [file for file, content in left.items() if file in expected and expected[file] != content]
        assert not wrong, (moment, wrong)
        if name not in RESUMED:
            assert left.keys() <= expected.keys(), (moment, left.keys() - expected.keys())
        if name not in ENDLESS and left != expected:  # else it was complete
            again = start(name, folder.name)
            assert again.codes == [0], (moment, again.tails)
            assert contents(folder) == expected, moment
        shutil.rmtree(folder)
