"""`make long-demo`: train a small model on short sequences, extend its context by YaRN, see its loss by position."""

import json
import sysconfig
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.trials import Trial
from mythos_dist.config.dump import dump_config
from mythos_dist.config.load import load_stages
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.files import make_folders, replacing, write_atomically
from mythos_dist.train.plots import save_plot, value_axis

if TYPE_CHECKING:
    from mythos_dist.data.stream import MicroBatch
    from mythos_dist.model.mythos import Mythos

GROUP = 64  # positions whose losses are averaged
SEQUENCES = 96  # held-out ones that are evaluated
BATCH = 4  # sequences per forward pass of the evaluation


def run_long_study(config: Path, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Make shards, train both stages and a second stage without YaRN, and evaluate; returns summary.json.

    The same call resumes. Raises UserError.
    """
    from mythos_dist.prepare.convert import convert
    from mythos_dist.prepare.corpus import read_documents
    from mythos_dist.prepare.tokenizer_training import train_tokenizer

    shards, run_dir = out / "shards", out / "run"
    overrides = [f"data.path={shards}", f"run.dir={run_dir}", *overrides]
    stages = load_stages(config, overrides)
    if len(stages) != 2 or stages[1].model.rope_scaling is None:
        raise UserError("the config needs two stages, the second with model.rope_scaling", str(config))
    short, long = stages
    make_folders(out)
    corpus = write_source_code(out / "corpus.parquet")
    tokenizer = train_tokenizer(read_documents(corpus), out / "tokenizer.model", short.model.vocab_size)
    print(convert(corpus, tokenizer, short.train.seq_len, shards, heldout=0.1).summary())
    print(f"{short.train.steps} steps at {short.train.seq_len} tokens, {long.train.steps} at {long.train.seq_len} …")
    Trial(config, run_dir, tuple(overrides)).run()
    border = run_dir / "checkpoints" / f"step-{short.train.steps:08d}"
    control = _write_control(long, border, out)
    print(f"and {long.train.steps} steps at {long.train.seq_len} from the same checkpoint, without YaRN …")
    Trial(control, out / "control", ()).run()
    curves = {
        f"trained at {short.train.seq_len}": _losses(border, long, scaled=False),
        "with YaRN, not yet trained": _losses(border, long, scaled=True),
        f"YaRN, {long.train.steps} steps at {long.train.seq_len}": _losses(run_dir, long, scaled=True),
        f"no YaRN, {long.train.steps} steps at {long.train.seq_len}": _losses(out / "control", long, scaled=False),
    }
    summary = {
        "trained_length": short.train.seq_len,
        "length": long.train.seq_len,
        "positions_per_group": GROUP,
        "loss_by_position": curves,
    }
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    draw(summary, out / "summary.png")
    return summary


def write_source_code(out: Path) -> Path:
    """Write the modules of Python's standard library to the parquet file `out`, a row each: text that any machine has,
    in documents of many thousand tokens, whose names come again. Returns `out`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [file.read_text("utf-8") for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    with replacing(out) as stream:
        pq.write_table(pa.table({"text": texts}), stream)
    return out


def _write_control(long: Config, border: Path, out: Path) -> Path:
    """The config of a run like the stage `long` from the same checkpoint, without scaled positions."""
    run = replace(
        long.run, dir=str(out / "control"), stage="", stage_begin=0, start_from=str(border),
        start_from_state="weights+moments",
    )  # fmt: skip
    checkpoint = replace(long.checkpoint, pin=())
    config = replace(long, model=replace(long.model, rope_scaling=None), run=run, checkpoint=checkpoint)
    file = out / "control.yaml"
    write_atomically(file, dump_config(config))
    return file


def _losses(checkpoint: Path, long: Config, scaled: bool) -> list[float]:
    """The held-out loss of a checkpoint by position, on sequences of the stage `long`."""
    from mythos_dist.checkpoint.restore import load_model
    from mythos_dist.model.mythos import Mythos
    from mythos_dist.train.sweep import open_sequences, read_sequences

    trained, config, _ = load_model(checkpoint)
    shape = replace(long.model, rope_scaling=long.model.rope_scaling if scaled else None)
    model = Mythos(shape, act=config.act, experts=config.experts)
    model.load_state_dict(trained.state_dict())
    stream, _ = open_sequences(long, None, BATCH)
    batches = list(read_sequences(stream, min(SEQUENCES, stream.num_samples), BATCH))
    return losses_by_position(model.eval(), batches, config.loops.mean_of(shape))


def losses_by_position(model: "Mythos", batches: "list[MicroBatch]", n_loops: int) -> list[float]:
    """The mean loss in nats of each GROUP of positions, with attention to all earlier tokens of a sequence."""
    import torch

    total, tokens = torch.zeros(0), torch.zeros(0)
    for batch in batches:
        labels = batch.final_labels
        with torch.no_grad():
            losses = model(batch.input_ids, n_loops, labels=labels)
        assert isinstance(losses, dict)
        by_group = losses["token_losses"].sum(0).view(-1, GROUP).sum(1).double()
        counted = (labels >= 0).sum(0).view(-1, GROUP).sum(1)
        total, tokens = (by_group, counted) if not len(tokens) else (total + by_group, tokens + counted)
    return (total / tokens).tolist()


def table(summary: Mapping[str, Any]) -> list[str]:
    """The losses within the trained length, just after it, and in the last quarter, a line per model."""
    length, trained = summary["length"], summary["trained_length"]
    spans = ((0, trained), (trained, 2 * trained), (3 * length // 4, length))
    curves: Mapping[str, list[float]] = summary["loss_by_position"]
    width = max(map(len, curves))
    lines = [f"{'held-out loss, nats, at positions':{width}s}" + "".join(f"{f'{a}-{b - 1}':>12s}" for a, b in spans)]
    for name, losses in curves.items():
        means = [_mean(losses[a // GROUP : b // GROUP]) for a, b in spans]
        lines.append(f"{name:{max(width, 33)}s}" + "".join(f"{mean:12.3f}" for mean in means))
    return lines


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw(summary: Mapping[str, Any], file: Path) -> None:
    """The loss over the position, a line per model, and the length of the first stage."""
    with save_plot(file, 1, (7.5, 4)) as (panel,):
        for name, losses in summary["loss_by_position"].items():
            panel.plot([GROUP * (i + 0.5) for i in range(len(losses))], losses, marker=".", label=name)
        panel.axvline(summary["trained_length"], color="gray", linestyle=":")
        panel.set_xlabel("position in the sequence, tokens")
        panel.set_ylabel("held-out loss, nats")
        panel.legend()
        value_axis(panel, 0.2)
