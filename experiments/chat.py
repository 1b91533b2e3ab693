"""`make chat-demo`: tune a small model on conversations, and ask it what none of them contains."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.chat_task import answer, read_prompts, write_chat_task
from experiments.trials import Trial
from mythos_dist.config.schema import Config
from mythos_dist.files import read_json_lines, write_atomically
from mythos_dist.units import count

if TYPE_CHECKING:
    from mythos_dist.data.chat import ChatRenderer
    from mythos_dist.data.tokenizer import Tokenizer
    from mythos_dist.model.mythos import Mythos

GOAL = 0.95  # of prompts answered exactly


def run_chat_study(config: Path, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Write conversations, convert them, train on them, and answer prompts before and after; returns summary.json.

    The same call resumes. Raises UserError.
    """
    from mythos_dist.checkpoint.restore import load_model
    from mythos_dist.data.chat_template import find_renderer
    from mythos_dist.data.tokenizer import Tokenizer
    from mythos_dist.model.mythos import Mythos
    from mythos_dist.prepare.convert import convert
    from mythos_dist.prepare.spans import Columns

    task, shards = out / "task", out / "shards"
    trial = Trial(config, out / "run", (f"data.path={shards}", *overrides))
    loaded = trial.load()
    if not task.exists():
        write_chat_task(task)
    tokenizer = Tokenizer.load(task / "tokenizer.json")
    renderer = find_renderer(tokenizer, None)
    columns = Columns(chat=renderer)
    print(convert(task / "train.jsonl", tokenizer, loaded.train.seq_len, shards, columns=columns).summary())

    prompts = read_prompts(task)

    def share_of(model: "Mythos") -> float:
        return exact_share(model, loaded, tokenizer, renderer, prompts)

    untrained = Mythos(loaded.model, act=loaded.act, experts=loaded.experts, seed=loaded.run.seed)
    before = share_of(untrained)
    print(
        f"{before:.1%} of the prompts are answered exactly before training; now {count(loaded.train.steps, 'step')} …"
    )
    trial.run()
    model, _, step = load_model(trial.run_dir)
    summary = {
        "before": before,
        "after": share_of(model),
        "prompts": len(prompts),
        "steps": step,
        "heldout_loss": [line["heldout_loss"] for line in read_json_lines(trial.run_dir / "eval.jsonl")],
    }
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def exact_share(
    model: "Mythos", config: Config, tokenizer: "Tokenizer", renderer: "ChatRenderer", prompts: list[str]
) -> float:
    """The share of prompts that the model answers exactly, with greedy decoding."""
    from mythos_dist.generate.chat import complete, prompt_tokens

    rendered = [prompt_tokens(tokenizer, renderer, [{"role": "user", "content": word}]) for word in prompts]
    n_loops = config.loops.mean_of(config.model)
    answers = complete(model, tokenizer, renderer, rendered, max_new_tokens=10, temperature=0.0, n_loops=n_loops)
    return sum(got == answer(word) for got, word in zip(answers, prompts, strict=True)) / len(prompts)
