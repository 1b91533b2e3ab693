"""The README.md of an export: the facts of the run, as Hugging Face's hub shows them.

Folders are named without their paths, which would reveal a cluster's file system. The license is the user's to choose.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mythos_dist import __version__
from mythos_dist.checkpoint.manifest import Lineage
from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.config.schema import Config, MythosConfig
from mythos_dist.data.tokenizer_files import ModelTokenizer
from mythos_dist.files import read_json_lines
from mythos_dist.units import short
from mythos_dist.urls import AnyPath, any_path

_HEADER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [mythos, recurrent-depth, looped-transformer, mixture-of-experts]
# license: choose one before you publish this
---
"""
_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
inputs = tokenizer(["Once upon a time", "The"], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=50, num_loops={loops})))
```

`num_loops` is an argument of `forward` and `generate`: more loops cost more compute and a larger cache of keys and
values, with the same weights. The classes are in the `.py` files of this folder, and need PyTorch and transformers
alone.
"""


def model_card(source: Checkpoint, config: Config, dtype: str, files: ModelTokenizer | None) -> str:
    """The text of README.md."""
    mean_loops = config.loops.mean_of(config.model)
    parts = [
        f"{_HEADER}\n# {_name_of(source.folder)}\n",
        "A Recurrent-Depth Transformer: one block of it is applied as often as asked for.\n",
        *_table("", dict(_facts(source, config, dtype, files))),
        f"## Use\n\n{_USE.format(loops=mean_loops)}",
        *_table("## Held-out loss by number of loops\n", _losses(source.folder, source.manifest.step)),
        *_lineage(source.manifest.lineage),
        f"Written by mythos_dist {__version__}.",
    ]
    return "\n".join(parts) + "\n"


def _name_of(folder: AnyPath) -> str:
    """The name of a run, from the folder of one of its checkpoints."""
    folder = folder.resolve() if isinstance(folder, Path) else folder
    return folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name


def _facts(source: Checkpoint, config: Config, dtype: str, files: ModelTokenizer | None) -> Iterator[tuple[str, str]]:
    model, manifest = config.model, source.manifest
    halting = config.act.mode_of(model)
    yield "parameters", f"{manifest.num_parameters:,} ({dtype})"
    layers = f"{model.prelude_layers} prelude, {model.loop_layers} looped, {model.coda_layers} coda"
    yield "layers", f"{layers}; width {model.dim}"
    yield "attention", f"{model.attn_type.upper()}, {model.n_heads} heads; context {_context(model)}"
    shared = f" and {model.n_shared_experts} shared" if model.n_shared_experts else ""
    yield "experts", f"{model.n_experts_per_tok} of {model.n_experts} per token{shared}, in the looped block"
    yield "loops", f"{config.loops.mean_of(model)} on average in training ({config.loops.distribution})"
    yield "loop settings", f"injection {model.injection}, depth LoRA {model.lora}, halting {halting}"
    yield "training", f"{manifest.step:,} steps, {short(manifest.lineage.tokens)} tokens"
    if "optim" in manifest.config:
        optim, train = config.optim, config.train
        yield (
            "optimizer",
            f"{optim.name}, peak rate {optim.lr:g}, {optim.schedule}; {train.global_batch} sequences of "
            f"{train.seq_len} tokens per step, {train.dtype}",
        )
    if folders := {Path(name).name: weight for name, weight in config.data.folders.items() if name}:
        yield "data", ", ".join(f"{name} ({weight:g})" for name, weight in folders.items())
    if files is not None:
        yield "tokenizer", f"{files.tokenizer.vocab_size:,} tokens, {files.tokenizer.path.name}"
        if files.shards is not None:
            shards = files.shards
            documents = f"{shards.documents.written:,} {'conversations' if shards.chat else 'documents'}"
            yield "shards", f"{documents}, {short(shards.tokens)} tokens, from {len(shards.inputs)} files"


def _context(model: MythosConfig) -> str:
    tokens, scaling = f"{model.max_seq_len:,} tokens", model.rope_scaling
    if scaling is None:
        return tokens
    return f"{tokens}, {scaling.factor:g} times {scaling.original_max_seq_len:,} by {scaling.kind} RoPE scaling"


def _losses(checkpoint: AnyPath, step: int) -> dict[str, str]:
    """The last line of eval.jsonl up to `step`: held-out loss by number of loops, in nats. Empty if there is none."""
    if not isinstance(checkpoint, Path):
        return {}
    try:
        lines = read_json_lines(checkpoint.resolve().parents[1] / "eval.jsonl")
    except (OSError, IndexError):
        return {}
    last: dict[str, Any] = {}
    for line in lines:
        if isinstance(line.get("step"), int) and line["step"] <= step:
            last = line
    losses = {f"{n} loops": one.get("loss") for n, one in last.get("by_loops", {}).items()}
    losses |= {} if losses else {"as in training": last.get("heldout_loss")}
    return {name: f"{loss:.4f} after step {last['step']}" for name, loss in losses.items() if loss is not None}


def _table(title: str, rows: dict[str, str]) -> list[str]:
    if not rows:
        return []
    return [title, "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]


def _lineage(lineage: Lineage) -> list[str]:
    if not lineage.parents:
        return []
    lines = [
        f"- {_name_of(any_path(one.path))}: step {one.step:,}, {short(one.tokens)} tokens ({one.state})"
        for one in lineage.parents
    ]
    return ["## Lineage\n", "This run began with, the nearest first:\n", *lines, ""]
