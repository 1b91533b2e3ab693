"""The recipes: from raw text to a chat by the commands of docs/recipes.md."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.launch import train

from mythos_dist.config.load import load_config
from mythos_dist.files import read_json_lines

REPOSITORY = Path(__file__).parents[2]
RECIPES = REPOSITORY / "configs" / "recipes"
ORDER = ("pretrain", "decay", "long_context", "sft")


@pytest.mark.parametrize("folder", [RECIPES, RECIPES / "tiny"], ids=["1b", "tiny"])
def test_each_recipe_begins_where_the_one_before_ends(folder):
    configs = [load_config(folder / f"{name}.yaml") for name in ORDER]
    assert not configs[0].run.start_from and len({config.run.dir for config in configs}) == len(ORDER)
    for before, config in pairwise(configs):
        assert config.run.start_from == before.run.dir
    continued, parent = configs[1], configs[0]
    assert continued.optim.decay_steps is not None
    assert continued.train.steps == parent.train.steps + continued.optim.decay_steps


def test_tiny_recipes_have_the_settings_of_the_recipes():
    """But for sizes of the model and the run."""
    for name in ORDER:
        recipe, tiny = (load_config(folder / f"{name}.yaml") for folder in (RECIPES, RECIPES / "tiny"))
        for key in ("name", "schedule", "decay", "min_lr_ratio"):
            assert getattr(tiny.optim, key) == getattr(recipe.optim, key), (name, key)
        assert tiny.run.start_from_state == recipe.run.start_from_state
        assert tiny.model.dim == load_config(REPOSITORY / "configs" / "tiny_cpu.yaml").model.dim


@pytest.mark.launch
def test_recipes_give_the_same_losses_on_1_2_and_4_ranks(shards, tmp_path):
    """Pre-training, and the decay that continues it."""
    sizes = f"data.path={shards} model.vocab_size=512 train.seq_len=32 train.eval_samples=8 checkpoint.every=99".split()
    sizes.append("optim.warmup_steps=2")
    losses = {}
    for ranks in (1, 2, 4):
        first, second = (tmp_path / f"{name}-{ranks}" for name in ORDER[:2])
        for recipe, run_dir, more in (
            ("pretrain", first, ["train.steps=4"]),
            ("decay", second, [f"start_from={first}", "train.steps=6", "optim.decay_steps=2"]),
        ):
            result = train(ranks, str(RECIPES / "tiny" / f"{recipe}.yaml"), f"run.dir={run_dir}", *sizes, *more)
            assert result.codes == [0] * ranks, result.tails
        lines = [read_json_lines(run_dir / "metrics.jsonl") for run_dir in (first, second)]
        losses[ranks] = [line["loss"] for line in (*lines[0], *lines[1])]
        assert [line["phase"] for line in lines[1]] == ["decay"] * 2
    assert len(losses[1]) == 6
    for ranks in (2, 4):
        assert losses[ranks] == pytest.approx(losses[1], rel=1e-5)


def story() -> tuple[list[str], list[tuple[float, float]]]:
    """The commands of the docs from text to a chat, and the held-out losses before and after each run of its table."""
    text = (REPOSITORY / "docs" / "recipes.md").read_text()
    commands = re.findall(r"^(mythos .*)$", text[: text.index("`make chat-demo`")], flags=re.MULTILINE)
    rows = re.findall(r"^\| `\w+\.yaml` \|.*\| (\S+) -> (\d\.\d+)", text, flags=re.MULTILINE)
    return commands, [(float(before), float(after)) for before, after in rows]


def test_the_story_trains_each_recipe_and_its_table_has_a_row_for_each():
    commands, losses = story()
    trained = [command.split()[2] for command in commands if command.startswith("mythos train ")]
    assert trained == [f"configs/recipes/tiny/{name}.yaml" for name in ORDER]
    assert "--chat" in commands[-2] and commands[-1].startswith("mythos inspect ")
    assert len(losses) == len(ORDER)


@pytest.mark.launch
@pytest.mark.long
@pytest.mark.timeout(3000)
def test_the_story_from_text_to_a_chat(tmp_path):
    """As it stands in the docs: its commands run, and the held-out losses are those of its table."""
    commands, table = story()
    for name in ("mythos_dist", "tools", "configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    outputs = []
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, (command, done.stderr[-2000:])
        outputs.append(done.stdout)
    assert outputs[-2].strip(), "the chat has an answer"
    for name in ("tiny-pretrain", "tiny-decay", "tiny-long"):
        assert f"runs/{name}/checkpoints/" in outputs[-1]
    for run, expected in zip(("tiny-pretrain", "tiny-decay", "tiny-long", "tiny-chat"), table, strict=True):
        lines = [json.loads(line) for line in (tmp_path / "runs" / run / "eval.jsonl").read_text().splitlines()]
        losses = lines[0]["heldout_loss"], lines[-1]["heldout_loss"]
        assert losses[1] < losses[0]
        assert losses == pytest.approx(expected, abs=0.02), run  # of another CPU's kernels
