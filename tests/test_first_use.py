"""First use of the tools: their results, and for user errors a message that says what to do and exit code 2."""

import importlib.util
import io
import json
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.small_checkpoint import write_run

from mythos_dist.errors import run_command

TOOLS = Path(__file__).parents[1] / "tools"
TOOLS_WITH_HELP = (
    *("chat_demo", "depth_demo", "depth_sweep", "generate", "loop_ablation", "make_depth_task", "make_sample_data"),
    *("decoding_quality", "hop_demo", "long_demo", "loop_baseline", "loop_stability", "serve"),
)


@pytest.fixture
def tool(monkeypatch, capsys, tmp_path):
    """`tool(name, *arguments)` runs a tool's main in this process, in an empty folder: its code, out and err."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object) -> SimpleNamespace:
        spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        code = 0
        try:
            run_command(module.main)
        except SystemExit as exited:
            code = exited.code or 0
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


@pytest.fixture(scope="module")
def run_dir(config, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("first") / "run", config)


# --- generate


def test_generate_continues_a_prompt_from_the_command_line_or_standard_input(tool, run_dir, config, monkeypatch):
    """`</s>` in a prompt is text. A repeated seed repeats the text; --n-loops 1 is not the default."""
    result = tool("generate", run_dir, "--prompt", "The </s> naïve", "--max-new-tokens", 8)
    assert (result.code, result.err) == (0, "") and result.out.startswith("[after 3 steps] The </s> naïve")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("The </s> naïve".encode())))
    assert tool("generate", run_dir, "--prompt", "-", "--max-new-tokens", 8).out == result.out
    other = tool("generate", run_dir, "--prompt", "The </s> naïve", "--max-new-tokens", 8, "--n-loops", 1)
    assert other.code == 0 and other.out != result.out
    none = tool("generate", run_dir, "--prompt", "The", "--max-new-tokens", 0)
    assert none.out == "[after 3 steps] The\n"
    for temperature in ("5e-324", "1e308"):
        options = ("--temperature", temperature, "--max-new-tokens", 1)
        assert tool("generate", run_dir, "--prompt", "The", *options).code == 0


def test_generate_reports_a_missing_checkpoint_and_a_missing_tokenizer(tool, config, shards, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "neither a run nor a checkpoint" in tool("generate", "empty", "--prompt", "hello").err
    write_run(tmp_path / "run", replace(config, data=replace(config.data, path="moved")))
    result = tool("generate", "run", "--prompt", "hello")
    assert result.code == 2 and "moved: no such folder" in result.err and "--tokenizer" in result.err
    result = tool("generate", "run", "--prompt", "hello", "--tokenizer", shards / "tokenizer.model")
    assert result.code == 0 and result.out.startswith("[after 3 steps] hello")


def test_generate_continues_a_file_of_prompts_as_json(tool, run_dir, tmp_path):
    """In order, each as alone; with an exit some loops are saved; with drafts the greedy tokens."""
    (tmp_path / "prompts.txt").write_text("The \n\nhello\nThe naïve\n", encoding="utf-8")
    options = ("--max-new-tokens", 6, "--temperature", 0, "--n-loops", 2, "--json")
    result = tool("generate", run_dir, "--prompts", "prompts.txt", "--batch", 2, *options)
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert (result.code, [line["prompt"] for line in lines]) == (0, ["The ", "hello", "The naïve"])
    for line in lines:
        (alone,) = tool("generate", run_dir, "--prompt", line["prompt"], *options).out.splitlines()
        assert json.loads(alone) == line and line["loops"] == [2] * len(line["tokens"])
    exit_options = ("--exit", "latent", "--exit-threshold", 99, "--json", *options[:4])
    exited = json.loads(tool("generate", run_dir, "--prompt", "hello", *exit_options).out)
    assert exited["tokens"] and set(exited["loops"][1:]) <= {2}
    drafted = tool("generate", run_dir, "--prompts", "prompts.txt", "--draft-loops", 1, *options)
    for line, expected in zip(map(json.loads, drafted.out.splitlines()), lines, strict=True):
        assert 0 <= line["speculation"].pop("accepted") <= line["speculation"].pop("drafted")
        assert line.pop("speculation").keys() == {"loops_per_token"} and line == expected


def test_generate_answers_a_message_or_each_line_of_input(tool, run_dir, monkeypatch):
    """The tokenizer of the shards has no chat template. An error in a line does not end the conversation."""
    assert "no chat template" in tool("generate", run_dir, "--chat", "--prompt", "hello").err
    options = ("--chat", "--template", "plain", "--max-new-tokens", 4, "--system", "Be brief.")
    once = tool("generate", run_dir, *options, "--prompt", "hello")
    assert (once.code, once.err) == (0, "")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\na </s>\nagain"))
    talk = tool("generate", run_dir, *options)
    assert talk.code == 0 and talk.out.startswith(once.out) and len(talk.out) > len(once.out)
    assert talk.err.count("error: ") == 1 and "the text of the special token </s>" in talk.err


# --- depth_sweep


def test_depth_sweep_writes_into_a_new_folder(tool, run_dir, tmp_path):
    result = tool("depth_sweep", run_dir, "--loops", "1, 2", "--samples", 2, "--out", "new/folder/sweep")
    assert result.code == 0 and sorted(p.name for p in (tmp_path / "new/folder").iterdir()) == [
        "sweep.json",
        "sweep.png",
    ]


def test_depth_sweep_writes_a_page_about_a_text(tool, run_dir, tmp_path):
    """Text that is not UTF-8, and a criterion that the model does not have, are refused before anything is written."""
    (tmp_path / "text").write_text("a <b> word")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    options = ("--loops", "1,3", "--samples", 2, "--out", "page/sweep")
    result = tool("depth_sweep", run_dir, *options, "--text", "text", "--exit", "kl")
    assert result.code == 0 and "page/sweep.html" in result.out, result.err
    page = (tmp_path / "page" / "sweep.html").read_text()
    assert "&lt;" in page and "<b>" not in page.replace('<b id="mean">', "") and "loops" in page
    refused = tool("depth_sweep", run_dir, *options, "--text", "binary")
    assert refused.code == 2 and "binary: cannot be read as text" in refused.err
    refused = tool("depth_sweep", run_dir, *options, "--text", "text", "--exit", "halting", "--out", "none/sweep")
    assert refused.code == 2 and "has no halting weights" in refused.err and not list(tmp_path.glob("none/*"))


# --- decoding_quality


def test_decoding_quality_prints_a_row_for_each_cache_and_exit(tool, run_dir, tmp_path):
    options = ("--samples", 2, "--tokens", 8, "--cache", "all,last", "--exits", "kl:1e9", "--out", tmp_path / "q.json")
    result = tool("decoding_quality", run_dir, *options)
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "q.json").read_text())["results"]
    assert [(row["cache"], row["exit"]) for row in rows] == [
        ("all", None), ("all", "kl"), ("last", None), ("last", "kl"),
    ]  # fmt: skip
    assert all(f"{row['loss']:.4f}" in result.out for row in rows)
    assert rows[1]["loops"] == min(2, rows[0]["loops"]) and rows[2]["cache_bytes"] <= rows[0]["cache_bytes"]


# --- serve


def test_serve_names_missing_packages_and_a_port_that_is_taken(tool, run_dir, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        result = tool("serve", run_dir, "--port", other.getsockname()[1])
        assert result.code == 2 and "Address already in use" in result.err and "choose another port" in result.err
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    result = tool("serve", run_dir)
    assert result.code == 2 and "needs uvicorn; pip install 'mythos_dist[serve]'" in result.err


# --- all


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("generate", ["--n-loops", "0"], "--n-loops=0 must be at least 1"),
        ("generate", ["--n-loops", "-2"], "--n-loops=-2 must be at least 1"),
        ("generate", ["--n-loops", "1000000000"], "--n-loops=1000000000 must be at most 512"),
        ("generate", ["--temperature", "nan"], "--temperature=nan"),
        ("generate", ["--temperature", "inf"], "--temperature=inf"),
        ("generate", ["--temperature", "-1"], "--temperature=-1.0"),
        ("generate", ["--top-k", "-1"], "--top-k=-1 must be at least 0"),
        ("generate", ["--max-new-tokens", "-1"], "--max-new-tokens=-1 must be at least 0"),
        ("generate", ["--max-new-tokens", "100000"], "ask for at most 25"),
        ("generate", ["--seed", "-1"], "--seed=-1 must be from 0"),
        ("generate", ["--seed", str(1 << 64)], "--seed=18446744073709551616 must be from 0"),
        ("generate", ["--prompt", ""], "the prompt is empty"),
        ("generate", ["--prompt", "a b c d e " * 200], "shorten it to at most 255 tokens"),
        ("generate", ["--prompt", "a\udcff"], "not valid UTF-8"),
        ("generate", ["--template", "plain", "--system", "x"], "2 problems"),
        ("generate", ["--cache", "some", "--top-p", "0", "--exit-threshold", "1", "--batch", "0"], "4 problems"),
        ("generate", ["--repetition-penalty", "-1"], "--repetition-penalty=-1.0 must be"),
        ("generate", ["--draft-loops", "2"], "--draft-loops needs --temperature 0"),
        ("generate", ["--exit", "halting"], "needs a model with halting"),
        ("generate", ["--chat", "--template", "nowhere"], "the chat template cannot be read"),
        ("chat_demo", ["train.stepss=3"], "did you mean train.steps?"),
        ("chat_demo", ["--out", "file"], "file: cannot be used"),
        ("long_demo", ["model.dimm=3"], "did you mean model.dim?"),
        ("long_demo", ["--out", "file"], "file"),
        ("generate", ["--tokenizer", "nowhere.model"], "nowhere.model: no such file"),
        ("depth_sweep", ["--loops", "0"], "--loops=0 holds ['0']"),
        ("depth_sweep", ["--loops", "0,,x"], "holds ['0', '', 'x']"),
        ("depth_sweep", ["--loops", "-1"], "holds ['-1']"),
        ("depth_sweep", ["--loops", "1,1e9"], "holds ['1e9']"),
        ("depth_sweep", ["--loops", "1000000000000"], "holds ['1000000000000']"),
        ("depth_sweep", ["--samples", "0", "--batch", "-1"], "2 problems"),
        ("depth_sweep", ["--data", "nowhere"], "nowhere: no such folder"),
        ("depth_sweep", ["--out", "file/x"], "file: cannot be used"),
        ("depth_demo", ["--seeds", "0", "--jobs", "0"], "2 problems"),
        ("depth_demo", ["--jobs", "-1"], "--jobs=-1 must be at least 1"),
        ("depth_demo", ["--settings", "typo"], "--settings names ['typo']"),
        ("depth_demo", ["train.stepss=3"], "did you mean train.steps?"),
        ("depth_demo", ["--out", "file"], "file/data"),
        ("loop_ablation", ["--seeds", "0"], "--seeds=0 must be at least 1"),
        ("loop_ablation", ["--data", "task", "train.stepss=3"], "did you mean train.steps?"),
        ("loop_ablation", [], "make it with `mythos sample-data`"),
        ("loop_baseline", ["--rates", "0"], "--rates=0.0: give numbers above 0"),
        ("loop_baseline", ["--data", "text"], "make it with `mythos sample-data`"),
        ("loop_stability", ["--only", "typo"], "--only names ['typo']"),
        ("loop_stability", ["--loops", "0"], "--loops=0 holds ['0']"),
        ("make_depth_task", ["--out", "new", "--seed", "-1", "--heldout", "-1"], "2 problems"),
        ("make_depth_task", ["--out", "new", "--sequences", "1000000000000"], "not enough memory"),
        ("make_depth_task", ["--out", "file"], "exists; name a new folder"),
        ("make_depth_task", ["--out", "file/x"], "file/x"),
        ("make_sample_data", ["--out", "file/x"], "file/x"),
        ("make_sample_data", ["--vocab-size", "3"], "vocab_size=3 is too small"),
        ("decoding_quality", ["--cache", "some", "--exits", "kl"], "2 problems"),
        ("decoding_quality", ["--exits", "some:1"], "exit='some'"),
        ("decoding_quality", ["--data", "nowhere"], "nowhere: no such folder"),
        ("serve", ["--port", "99999"], "99999 must be at most 65,535"),
        ("serve", ["--api-key-file", "nowhere"], "there is no such file"),
        ("serve", ["--api-key-file", "file"], "gives others than its owner access"),
        ("serve", ["--cache", "some"], "cache='some' is unknown"),
        ("train_tokenizer", ["--input", "file", "--out", "."], "--out=. is a folder"),
        ("train_tokenizer", ["--input", "file", "--out", "x.model", "--vocab-size", "0"], "--vocab-size=0"),
        ("train_tokenizer", ["--input", "nowhere", "--out", "x.model"], "nowhere: no such file"),
        ("train_tokenizer", ["--input", "text.txt", "--out", "file/x.model"], "file: cannot be used"),
    ],
)
def test_a_user_error_is_named_before_any_work_is_done(tool, run_dir, name, arguments, named, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "text.txt").write_text("some words " * 100)
    required = {"generate": [run_dir, "--prompt", "hello"], "serve": [run_dir, "--port", 0]}
    required |= {key: [run_dir] for key in ("depth_sweep", "decoding_quality")}
    result = tool(name, *required.get(name, []), *arguments)
    assert result.code == 2 and result.out == "" and named in result.err, result.err
    assert result.err.count("error: ") == 1
    assert {p.name for p in tmp_path.iterdir()} <= {"file", "text.txt", "data"}  # data: the text of make_sample_data


def test_a_depth_task_without_held_out_sequences_is_complete(tool, tmp_path):
    result = tool("make_depth_task", "--out", "task", "--sequences", 10, "--heldout", 0)
    assert result.code == 0 and "10 windows for training, 0 held out" in result.out
    from mythos_dist.prepare.verify import verify

    assert verify(tmp_path / "task").ok


@pytest.mark.parametrize("name", TOOLS_WITH_HELP)
def test_help_names_every_option(tool, name):
    result = tool(name, "--help")
    assert result.code == 0 and "usage:" in result.out
