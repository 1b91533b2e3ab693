"""What the README and docs/ show is what the commands print."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.launch import run_command

REPOSITORY = Path(__file__).parents[1]
PAGES = {
    path.name: path.read_text() for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
}
README = PAGES["README.md"]
ALL = "\n".join(text for name, text in PAGES.items() if name != "laptop.md")  # test_site.py runs that page


@pytest.mark.launch
def test_the_python_example_runs():
    """The block as it stands, in a process of its own."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (code,) = [block for block in blocks if "from mythos_dist.model import" in block]
    shape = "\nassert logits.shape == (1, 16, 1000) and tokens.shape == (1, 23), (logits.shape, tokens.shape)\n"
    subprocess.run([sys.executable, "-c", code + shape], check=True, timeout=480)


@pytest.mark.launch
def test_the_errors_shown_are_the_errors_printed():
    """The example of wrong settings prints exactly the shown errors and exits with code 2."""
    examples = re.findall(r"\$ mythos (train .*?)\n(.*?)```", ALL, flags=re.DOTALL)
    assert len(examples) == 2
    for command, shown in examples:
        result = subprocess.run(
            [sys.executable, "-m", "mythos_dist", *command.split()],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=240,
        )
        assert (result.returncode, result.stdout, result.stderr) == (2, "", shown)


@pytest.mark.launch
def test_the_plan_shown_is_the_plan_printed(monkeypatch):
    (command, shown), *_ = re.findall(r"\$ (mythos plan --variant .*?)\n(.*?)```", ALL, flags=re.DOTALL)
    monkeypatch.chdir(REPOSITORY)
    result = run_command(command)
    assert (result.codes, result.out, result.err) == ([0], shown, "")


SMALLER = """\
base: {base}
model: {{max_loop_iters: 2, dim: 32, vocab_size: 400}}
train: {{steps: 2, seq_len: 32, global_batch: 2, eval_samples: 2}}
checkpoint: {{every: 1}}
run: {{peak_tflops: 1}}
"""
FEWER = {  # text in a command -> its replacement
    "--vocab-size 32000": "--vocab-size 400",
    "--seq-len 2048": "--seq-len 32",
    "--seq-len 4096": "--seq-len 32",
    "'hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT' --tokenizer tokenizer.model": "parquet --tokenizer t.model",
    "'parquet/*.parquet' --vocab-size 400 --out tokenizer.model": "'parquet/*.parquet' --vocab-size 400 --out t.model",
    "--out shards --dedup": "--out shards-of-parquet --dedup",
    "mythos verify shards": "mythos verify shards-of-parquet",
    "--nproc_per_node 8": "--nproc_per_node 2",
    "configs/1b.yaml data.path=shards run.dir=runs/first": "configs/1b.yaml data.path=shards run.dir=runs/two-ranks",
    "runs/demo --loops 1,2,4,8,16,32": "runs/first --loops 1,2",
}
ELSEWHERE = {  # how commands begin that other tests run -> these tests
    "mythos sample-data": "train/test_recipes.py",
    "mythos train configs/recipes/": "train/test_recipes.py",
    "mythos generate runs/tiny-chat": "train/test_recipes.py",
    "mythos inspect runs/tiny-chat": "train/test_recipes.py",
    "mythos shards --format chat": "prepare/test_conversations.py",
    "mythos import tokens SOURCE...": "prepare/test_import_tokens.py",
    "mythos shards --input 's3://bucket": "prepare/test_store_output.py",
    "mythos verify s3://": "prepare/test_store_output.py",
    "mythos train configs/300m.yaml data.path=shards/chat": "train/test_conversations.py",
    "mythos generate runs/tuned --chat": "test_first_use.py",
    "mythos generate RUN ": "test_first_use.py",
    "mythos decoding-quality ": "test_first_use.py",
    "mythos depth-sweep runs/first --text": "test_first_use.py",
    "mythos serve ": "serve/test_server.py",
    "lm_eval --model local-completions": "serve/test_server.py",
    "mythos export runs/first --average": "train/test_average.py",
    "mythos average": "checkpoint/test_average_tool.py",
    "mythos export RUN --out universal": "checkpoint/test_universal.py",
    "python -m deepspeed.checkpoint.ds_to_universal": "checkpoint/test_universal.py",
    "mythos retrofit ": "checkpoint/test_retrofit.py",
    "mythos train looped/train.yaml": "checkpoint/test_retrofit.py",
    "mythos depth-sweep runs/looped": "checkpoint/test_retrofit.py",
    "mythos import deepspeed": "checkpoint/test_universal.py",
    "mythos inspect s3://": "checkpoint/test_remote_exports.py",
    "mythos train configs/300m.yaml data.path=shards run.dir=runs/tuned start_from=s3://": "train/test_remote_start.py",
    "mythos train CONFIG.yaml": "train/test_start_from.py",
    "mythos train configs/300m.yaml data.path=shards run.dir=runs/decayed": "train/test_start_from.py",
    'mythos train configs/demo.yaml "run.profile=': "ops/test_profile.py",
    "touch runs/demo/PROFILE": "ops/test_profile.py",
    "mythos train configs/demo.yaml run.tensorboard=true": "train/test_sinks.py",
    "tensorboard --logdir runs": "train/test_sinks.py",
    "mythos report runs/a runs/b": "ops/test_report.py",
    "mythos report runs/first --watch": "ops/test_report.py",
    "sbatch ": "cluster/test_launch_readme.py",
    "launch/deepspeed.sh ": "cluster/test_launch_readme.py",
    "mythos plan ": "plan/test_command.py",  # also below, and train/test_variants.py
    "mythos doctor ": "test_doctor.py",
    "mythos evaluate ": "evaluate/test_evaluate.py",
    "torchrun --nproc_per_node 8 -m mythos_dist evaluate": "evaluate/test_evaluate.py",
    "mythos export runs/first --out exported --format hf": "evaluate/test_hf.py",
    "make ": "experiments/test_trials.py",  # `make demo` is `mythos demo`
    "python tools/loop_ablation.py ": "experiments/test_trials.py",
    "torchrun --nproc_per_node 8 -m mythos_dist.train configs/tiny_cpu.yaml": "parallel/test_parity_grid.py",
    "mythos train configs/tiny_cpu.yaml": "test_readme.py",  # a study of minutes; layout errors: above
    "mythos train configs/demo.yaml model.dimm=3": "test_readme.py",  # above
}
SHELL = ("source .venv/bin/activate", "export ")  # what a reader's shell does
NOT_RUN = re.compile(r"# (?:.*; )?needs (?:a cluster|a network|openssl)$")  # the mark of what no test can run


def command_lines(page: str) -> list[str]:
    """The commands in the blocks of a page, without prompts; a block with a prompt also shows what is printed."""
    blocks = re.findall(r"^```(\S*)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    lines = []
    for block in [block for kind, block in blocks if kind in ("", "bash")]:
        one = block.replace("\\\n", " ").splitlines()
        lines += [line[2:] for line in one if line.startswith("$ ")] if block.startswith("$ ") else filter(None, one)
    return lines


def shown_commands() -> list[str]:
    """The commands of the README and docs/ that are run here, each once."""
    lines = dict.fromkeys(command_lines(ALL))
    return [line for line in lines if not line.startswith((*ELSEWHERE, *SHELL)) and not NOT_RUN.search(line)]


@pytest.mark.parametrize("start", ELSEWHERE)
def test_what_other_tests_run_is_shown_and_these_tests_exist(start):
    assert any(line.startswith(start) for line in command_lines("\n".join(PAGES.values()))), "no page shows it"
    assert (REPOSITORY / "tests" / ELSEWHERE[start]).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_marked(page):
    """Blocks of commands are run by `test_the_commands_shown_run` or by what ELSEWHERE names, or marked as needing a
    cluster or a network; `text` shows other text. test_site.py checks YAML and Python, and runs laptop.md."""
    kinds = re.findall(r"^```(\S*)\n.*?^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    assert set(kinds) <= {"", "bash", "text", "python", "yaml", "{toctree}"}
    assert "    mythos " not in PAGES[page], "a block without a fence is not run"
    marked = [line for line in command_lines(PAGES[page]) if NOT_RUN.search(line)]
    assert [line for line in marked if line.startswith(tuple(ELSEWHERE))] == [], "a test runs what is marked"
    words = ("mythos", "torchrun", "python")  # of commands that `test_the_commands_shown_run` runs
    ours = [line for line in command_lines(PAGES[page]) if line in shown_commands()]
    assert [line for line in ours if line.split()[0] not in words] == []


@pytest.mark.launch
@pytest.mark.timeout(1160)
def test_the_commands_shown_run(tmp_path, monkeypatch):
    """In a folder with two small configs of the same names: text, shards, training, and all tools on the result.

    What `mythos` runs is forked, since its imports took two thirds of the time; `test_commands.py` and
    `test_imports.py` start it as a shell does.
    """
    for folder in ("configs", "text", "parquet", "bin"):
        (tmp_path / folder).mkdir()
    for name in ("mythos_dist", "tools", "launch"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    for name in ("1b", "300m"):
        (tmp_path / "configs" / f"{name}.yaml").write_text(
            SMALLER.format(base=REPOSITORY / "configs" / "tiny_cpu.yaml")
        )
    texts = [f"A story of number {i}. " + " ".join(sorted(str(i * j) for j in range(40))) for i in range(200)]
    (tmp_path / "text" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "parquet" / "a.parquet")
    commands = shown_commands()
    script = "\n".join(sorted(commands, key=_order))
    for text, fewer in FEWER.items():
        assert text in script, (text, script)
        script = script.replace(text, fewer)
    weights = (
        "mythos train configs/1b.yaml data.path=shards model.mode=reference run.dir=runs/reference\n"
        "mythos export runs/reference --out theirs --format open_mythos\n"
        'python -c "import torch, safetensors.torch as s; '
        "torch.save(s.load_file('theirs/model.safetensors'), 'open_mythos.pt')\"\n"
    )
    script = script.replace("mythos import open-mythos", weights + "mythos import open-mythos")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    monkeypatch.chdir(tmp_path)
    shown = ""
    for line in script.splitlines():
        if re.match(r"mythos [^|;&<>$`]*$", line.partition(" #")[0]):
            result = run_command(line)
            code, out, err = result.codes[0], result.out, result.err
        else:
            done = subprocess.run(["bash", "-euc", line], env=environment, capture_output=True, text=True, timeout=1100)
            code, out, err = done.returncode, done.stdout, done.stderr
        shown += out
        assert code == 0, (line, (out + err)[-6000:])
    assert (tmp_path / "runs" / "two-ranks" / "COMPLETED").exists()
    assert {"first", "second", "kept"} <= {path.name for path in (tmp_path / "runs").iterdir()}
    for text in ("done: 2 steps", "every byte is as it was written", ": all good", "runs/first: completed"):
        assert text in shown, shown


def _order(command: str) -> int:
    """Tokenizer, shards, training, then what reads a run."""
    firsts = ("mythos tokenizer", "mythos shards", "train configs/300m", "mythos train", "mythos_dist.train")
    return next((i for i, first in enumerate(firsts) if first in command), len(firsts))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    """Paths in code spans and commands, but for what a run makes; targets of links."""
    folder = REPOSITORY if page == "README.md" else REPOSITORY / "docs"
    links = set(re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGES[page]))
    # reference/ is written by the build of the site and ignored by git.
    assert [link for link in sorted(links) if not (folder / link).exists() or link.startswith("reference/")] == []
    named = re.findall(r"\b(?:tools|configs|benchmarks|tests|experiments|mythos_dist)/[\w./-]*\w", PAGES[page])
    if page == "README.md":
        assert {"configs/1b.yaml", "configs/300m.yaml"} <= set(named)
    assert [name for name in sorted(set(named)) if not (REPOSITORY / name).exists()] == []


def test_the_readme_is_short_and_its_first_lines_name_the_map():
    lines = README.splitlines()
    assert len(lines) <= 160
    assert "docs/architecture.md" in "\n".join(lines[:10])


def test_the_first_link_of_the_readme_is_the_repository_of_the_model():
    """It named a package index."""
    assert re.findall(r"\]\((https?://[^)]+)\)", README)[0].lower().endswith("/openmythos")


def test_every_function_that_the_map_names_exists():
    """`train/loop.py: Run.run_steps` and its like; a name after a comma is in the same file."""
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`((?:, `[A-Za-z_][\w.]*`)*)", PAGES["architecture.md"])
    assert len(named) > 15
    files = {
        path.relative_to(REPOSITORY).as_posix(): path.read_text() for path in REPOSITORY.glob("mythos_dist/**/*.py")
    }
    missing = []
    for file, first, more in named:
        (source,) = [text for path, text in files.items() if path.endswith(f"/{file}")]
        for name in [first, *re.findall(r"`([\w.]+)`", more)]:
            if not re.search(rf"^\s*(?:def|class) {name.split('.')[-1]}\b", source, re.M):
                missing.append(f"{file}: {name}")
    assert missing == []


def test_every_file_that_the_map_and_the_contributors_guide_name_exists():
    """In backticks, by its path or by the end of one."""
    files = [path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("[!.]*/**/*.py")]
    for page in (PAGES["architecture.md"], (REPOSITORY / "CONTRIBUTING.md").read_text()):
        named = set(re.findall(r"`([\w/]+\.py)(?:`|: )", page))
        assert len(named) > 15
        assert [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)] == []


def test_the_reading_order_says_how_long_it_is():
    """Within a twentieth."""
    order = PAGES["architecture.md"].partition("## Reading order")[2].partition("Beside them")[0]
    (count, lines) = re.findall(r"These (\d+) files are the core, about ([\d,]+) lines", order)[0]
    files = re.findall(r"`(mythos_dist/[\w/]+\.py)`", order)
    assert len(files) == int(count)
    length = sum(len((REPOSITORY / file).read_text().splitlines()) for file in files)
    assert length == pytest.approx(int(lines.replace(",", "")), rel=0.05)


def test_decisions_and_the_code_cite_each_other():
    """Each decision has an id of its own, and the code that follows from it names the id."""
    ids = re.findall(r"^\*\*([A-Z]+-\d+)\. ", (REPOSITORY / "DECISIONS.md").read_text(), re.M)
    assert len(ids) == len(set(ids)) > 80
    folders = ("mythos_dist", "tools", "tests", "experiments", "launch")
    code = "\n".join(path.read_text() for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))
    sections = {one.split("-")[0] for one in ids}
    cited = {one for one in re.findall(r"\b([A-Z]+-\d+)\b", code) if one.split("-")[0] in sections}
    assert sorted(cited - set(ids)) == [] and sorted(set(ids) - cited) == []
