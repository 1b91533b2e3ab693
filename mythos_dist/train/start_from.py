"""The parent of a run: the run, checkpoint or export that `start_from` names, and what is carried over from it.

It is read only while the run has no checkpoint of its own. What the parent has trained is in the `Lineage` that every
checkpoint of the run records, so a run that resumes needs no parent any more.

Decisions: STAGES-1, STAGES-2.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mythos_dist.checkpoint.exported import holds_export, open_export
from mythos_dist.checkpoint.manifest import MOMENTS, PARAMETER, Ancestor, CheckpointManifest, Lineage
from mythos_dist.checkpoint.open_mythos import list_tensors
from mythos_dist.checkpoint.reader import Checkpoint, checkpoints_of, remote_checkpoints_of
from mythos_dist.checkpoint.restore import find_checkpoint, is_checkpoint, run_checkpoints
from mythos_dist.config.compare import WIDTHS, training_changes
from mythos_dist.config.fields import show
from mythos_dist.config.schema import BY_MODE, Config
from mythos_dist.data.corpora import Corpus, data_changes
from mythos_dist.errors import UserError
from mythos_dist.files import reason
from mythos_dist.model.mythos import Mythos
from mythos_dist.model.pretrained import is_export
from mythos_dist.parallel.process import from_rank_0, raise_on_all_ranks
from mythos_dist.units import count
from mythos_dist.urls import AnyPath, RemotePath, any_path

_PARENTS = "give a run.dir, a folder checkpoints/step-N in it, a folder that `mythos export` wrote, or a URL of one"


def find_parent(config: Config) -> tuple[Checkpoint, list[str]]:
    """The newest intact checkpoint at `start_from`, or the export there; and a line per damaged file of a run.

    Every rank calls this. Raises UserError, the same on every rank, if there is none, or if a signature is wrong.
    """
    path = any_path(config.run.start_from)
    folder = from_rank_0(lambda: _folder_of(path))
    if folder is None:
        return raise_on_all_ranks(lambda: open_export(path, config.checkpoint.key_file)), []
    checkpoint, damaged = find_checkpoint(folder, config.checkpoint)
    if checkpoint is None:
        uploading = ", or are still being uploaded" if isinstance(path, RemotePath) else ""
        raise UserError(f"start_from={path}: its checkpoints were removed{uploading}; give another")
    return checkpoint, damaged


def _folder_of(path: AnyPath) -> AnyPath | None:
    """A checkpoint's folder or a run's folder of checkpoints; None: an export. Raises UserError for other paths, and if
    a store fails."""
    if isinstance(path, RemotePath):
        return _remote_folder_of(path)
    try:
        if is_checkpoint(path):
            return path
        if is_export(path):
            return None
        folder = path / "checkpoints" if (path / "checkpoints").exists() else path
        if checkpoints_of(folder):
            return folder
        problem = (
            "no such folder" if not path.exists() else "neither a run with a checkpoint, nor a checkpoint or an export"
        )
    except OSError as error:
        problem = f"cannot be read ({reason(error)})"
    raise UserError(f"start_from={path}: {problem}; {_PARENTS}")


def _remote_folder_of(path: RemotePath) -> RemotePath | None:
    """As `_folder_of`."""
    if is_checkpoint(path):
        return path
    if holds_export(path):
        return None
    folder = run_checkpoints(path)
    if remote_checkpoints_of(folder):
        return folder
    raise UserError(f"start_from={path}: neither a run with a checkpoint, nor a checkpoint or an export; {_PARENTS}")


def check_parent(config: Config, parent: Checkpoint) -> None:
    """Raises UserError, with all problems, if the run cannot take from `parent` what `start_from_state` says."""
    problems, state = list(_misfits(config, parent)), config.run.start_from_state
    manifest = parent.manifest
    has_moments = all(set(MOMENTS) & set(t.kinds) for t in manifest.tensors.values() if PARAMETER in t.kinds)
    optimizer = manifest.config.get("optim", {}).get("name", "adamw")
    if state != "weights" and has_moments and optimizer != config.optim.name:
        problems.append(
            f"optim.name={config.optim.name}, but {parent.folder} has the moments of {optimizer}; set "
            f"start_from_state=weights, or optim.name={optimizer}"
        )
    if state != "weights" and not has_moments:
        problems.append(
            f"start_from_state={state}, but {parent.folder} holds weights only; set start_from_state=weights"
        )
    if state == "everything" and (done := steps_done(manifest)) >= config.train.steps:
        problems.append(
            f"train.steps={config.train.steps}, but {parent.folder} is at step {done}, and start_from_state=everything "
            f"continues its step count; raise train.steps above {done}"
        )
    if problems:
        raise UserError(problems)


def _misfits(config: Config, parent: Checkpoint) -> Iterator[str]:
    """Settings whose tensors are not those of the parent."""
    with torch.device("meta"):
        model = Mythos(config.model, act=config.act, experts=config.experts)
    shapes = {name: tuple(value.shape) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    theirs = {name: tensor.shape for name, tensor in parent.manifest.tensors.items()}
    if shapes == theirs:
        return
    before = BY_MODE["reference"] | parent.manifest.config.get("model", {})  # as in config_from
    changed = [key for key in WIDTHS if key in before and getattr(config.model, key) != before[key]]
    for key in changed:
        yield (
            f"model.{key}={getattr(config.model, key)}, but {parent.folder} has {before[key]}; the shapes of tensors "
            f"cannot change: set it to {before[key]}"
        )
    if not changed:
        names = [name for name in shapes.keys() | theirs.keys() if shapes.get(name) != theirs.get(name)]
        yield f"{parent.folder} does not fit this model: other or missing {list_tensors(names)}"


def steps_done(manifest: CheckpointManifest) -> int:
    """Steps of schedule, loops and random numbers until a checkpoint, those that were carried over included."""
    return manifest.lineage.first_step + manifest.step


def lineage_from(config: Config, parent: Checkpoint, corpora: list[Corpus]) -> Lineage:
    """The lineage of a run that begins with `parent`."""
    manifest, state = parent.manifest, config.run.start_from_state
    ancestor = Ancestor(_absolute(parent.folder), manifest.step, manifest.lineage.tokens, state, manifest.config)
    parents = (ancestor, *manifest.lineage.parents)
    if state != "everything":
        return Lineage(parents)
    first_sample = manifest.lineage.next_sample if _same_order(config, manifest, corpora) else 0
    return Lineage(parents, steps_done(manifest), first_sample, next_sample=first_sample)


def _absolute(folder: AnyPath) -> str:
    """For the lineage: a URL has no secrets then."""
    return str(folder.resolve() if isinstance(folder, Path) else folder)


def lineage_of_stage(config: Config, border: Checkpoint, corpora: list[Corpus]) -> Lineage:
    """The lineage of a stage of the same run that begins after the checkpoint `border`.

    Unchanged data are read on from where the last stage ended, with any `start_from_state`.
    """
    manifest, before = border.manifest, border.manifest.lineage
    steps = steps_done(manifest) if config.run.start_from_state == "everything" else 0
    sample = before.next_sample if _same_order(config, manifest, corpora) else 0
    return Lineage(
        before.parents,
        first_step=steps - manifest.step,
        first_sample=sample,
        first_tokens=manifest.tokens,
        next_sample=sample,
    )


def _same_order(config: Config, manifest: CheckpointManifest, corpora: list[Corpus]) -> bool:
    """Whether positions in the order of the data mean the same samples as in a checkpoint."""
    before = manifest.config.get("run", {}).get("seed"), manifest.config.get("train", {}).get("seq_len")
    return before == (config.run.seed, config.train.seq_len) and not data_changes(corpora, manifest.data)


def carried_optimizer_state(parent: Checkpoint, state: str) -> dict[str, Any]:
    """`CheckpointManifest.optimizer` for the run: Adam's bias correction counts the steps that made its moments."""
    optimizer = parent.manifest.optimizer
    if state == "everything":
        return optimizer
    return {"steps": optimizer["steps"] if state == "weights+moments" else 0, "skipped_steps": 0, "loss_scale": {}}


def describe_start(config: Config, parent: Checkpoint, lineage: Lineage, corpora: list[Corpus]) -> Iterator[str]:
    """Lines for the console: what is carried over, what starts over, and which settings differ from the parent's."""
    manifest, state = parent.manifest, config.run.start_from_state
    begin = config.run.stage_begin
    stage = f"stage {config.run.stage}: " if config.run.stage else ""
    yield (
        f"{stage}starting from {parent.folder} (step {manifest.step}, {count(manifest.lineage.tokens, 'token')} "
        f"trained), start_from_state={state}"
    )
    kept, restarted = ["weights", "router bias"], []
    (restarted if state == "weights" else kept).append("moments of the optimizer")
    steps = "step count (learning rate, loops, random numbers)"
    if state == "everything":
        first = f"{steps}: step {begin + 1} is step {lineage.first_step + begin + 1}"
        kept += [first, "loss scale", "gradient norms"]
    else:
        restarted.append(steps)
    if lineage.next_sample:
        kept.append(f"data order, from sample {lineage.next_sample:,}")
    else:
        restarted.append("data order")
    yield f"  carried over: {'; '.join(kept)}"
    if config.average.kind != "off":
        restarted.append("average of the weights")
    if restarted:
        yield f"  starts over: {'; '.join(restarted)}"
    changes = training_changes(manifest.config, asdict(config))
    if changed := [f"{name} {show(before)} -> {show(now)}" for name, before, now in changes]:
        yield f"  changed: {'; '.join(changed)}"
    if manifest.config.get("model", {}).get("rope_scaling") and not config.model.rope_scaling:
        yield "  note: without model.rope_scaling positions are other ones than those that the parent was trained with"
    if not lineage.next_sample and _same_order(config, manifest, corpora):
        yield "  note: shards and run.seed are the parent's, so the same batches come again; set run.seed for others"
    elif manifest.config.get("train", {}).get("seq_len") != config.train.seq_len and not data_changes(
        corpora, manifest.data
    ):
        yield "  note: shards are the parent's, cut into sequences of another length: text that it has read comes again"
