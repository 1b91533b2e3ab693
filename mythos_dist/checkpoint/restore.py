"""Find the newest checkpoint that is whole and load it at any layout; or the model alone, on one process.

Every rank reads just the parts of the files that it needs, whoever wrote them: the layout that wrote a checkpoint is
one of many that can load it, and no faster way exists for it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from mythos_dist.checkpoint.manifest import (
    BUFFER,
    FILE,
    MOMENTS,
    PARAMETER,
    Checkpoint,
    VersionError,
    checkpoints_of,
    read_checkpoint_manifest,
)
from mythos_dist.checkpoint.names import LATEST, step_of
from mythos_dist.checkpoint.progress import Progress
from mythos_dist.checkpoint.signature import VARIABLE, Key, SignatureError, signing_key
from mythos_dist.checkpoint.state import State
from mythos_dist.config.load import config_from
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.files import reason
from mythos_dist.model.mythos import Mythos
from mythos_dist.parallel.process import raise_on_all_ranks


@dataclass(frozen=True)
class _Check:
    """What a rank found in a checkpoint."""

    problems: tuple[str, ...] = ()  # damage in its share of the files
    refused: VersionError | SignatureError | None = None  # the run must not start at all
    gone: bool = False  # the folder was removed meanwhile


def find_checkpoint(
    checkpoints: Path, verify: bool = True, key_file: str | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that `latest` names, or if it is damaged the newest one that is not; None if there is none at all.
    And what is damaged in those that were passed over, a line each.

    Every rank calls this; with `verify` each reads its share of the bytes. `key_file`: see `signing_key`; with a key
    all bytes are read in any case. Raises UserError on every rank if there are checkpoints and none is whole, if one is
    of another format version, which training would overwrite, or if one is not signed with the key.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    key = raise_on_all_ranks(lambda: signing_key(key_file))
    _must_be_one_key(key)
    # Rank 0 lists them for all: another rank might see a list that has changed since.
    listed = [raise_on_all_ranks(lambda: _candidates(checkpoints) if rank == 0 else [])]
    dist.broadcast_object_list(listed, 0)
    found: list[str] = []
    for i, folder in enumerate(listed[0]):
        checkpoint, mine = _check(folder, verify, key, rank, world)
        checks: list[_Check] = [_Check()] * world
        dist.all_gather_object(checks, mine)
        if refused := next((check.refused for check in checks if check.refused), None):
            raise refused
        if all(check.gone for check in checks):
            continue
        problems = list(dict.fromkeys(line for check in checks for line in check.problems))
        if checkpoint and not problems:
            raise_on_all_ranks(lambda i=i: _must_not_overwrite(listed[0][i:]) if rank == 0 else None)
            return checkpoint, found
        found += problems
    if found:
        remedy = "no checkpoint is whole: put these files back from a copy, or give another run.dir"
        raise UserError([*found, remedy])
    return None, []


def _candidates(checkpoints: Path) -> list[Path]:
    """Checkpoints to try, in order. Raises UserError for a `latest` that the next checkpoint could not replace."""
    latest = checkpoints / LATEST
    if latest.is_dir() and not latest.is_symlink():
        raise UserError("is a folder, and a run writes a file there; move it away", str(latest))
    return checkpoints_of(checkpoints)


def _check(folder: Path, verify: bool, key: Key | None, rank: int, world: int) -> tuple[Checkpoint | None, _Check]:
    """Open a checkpoint and look at this rank's share of its files."""
    try:
        checkpoint = Checkpoint(folder, key=key)
        damaged = checkpoint.damage(sorted(checkpoint.manifest.files)[rank::world], verify)
    except (VersionError, SignatureError) as error:
        return None, _Check(refused=error)
    except UserError as error:
        checkpoint, damaged = None, [str(error)]
    return checkpoint, _Check(tuple(damaged), gone=bool(damaged) and not os.path.lexists(folder))


def _must_not_overwrite(taken: Sequence[Path]) -> None:
    """Raises VersionError if a checkpoint behind the one that is taken, `taken[0]`, is of another format version:
    training would replace it when it gets there."""
    for other in taken[1:]:
        if (step_of(other.name) or 0) > (step_of(taken[0].name) or 0):
            try:
                read_checkpoint_manifest(other)
            except VersionError:
                raise
            except UserError:
                continue  # damaged; replacing it is what it is for


def _must_be_one_key(key: Key | None) -> None:
    """Raises UserError on every rank if ranks have different keys, or some have none."""
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, key and key.name)
    if len(set(names)) > 1:
        without = [rank for rank, name in enumerate(names) if name is None]
        which = f"ranks {without[:5]} have no key" if without else "ranks have different keys"
        raise UserError(
            f"{which} to check checkpoints with: set checkpoint.key_file, or {VARIABLE} on every node, "
            "to files with the same key"
        )


def load_state(checkpoint: Checkpoint, state: State, progress: Progress = lambda size: None) -> None:
    """Fill a rank's `state` from a checkpoint; moments that it lacks are zero (imported weights have none).

    `progress` is called with the bytes read since the last call. Raises UserError if the checkpoint is of another
    model.
    """
    for name, held in state.items():
        for kind, value in held.values.items():
            tensor = checkpoint.manifest.tensors.get(name)
            if kind in MOMENTS and tensor is not None and kind not in tensor.kinds:
                value.zero_()
                continue
            on_host = value.detach() if value.device.type == "cpu" else torch.zeros(value.shape, dtype=value.dtype)
            checkpoint.read(kind, name, held.piece, on_host.numpy())
            if on_host.device != value.device:
                value.copy_(on_host)
            progress(4 * value.numel())


def load_model(path: Path) -> tuple[Mythos, Config, int]:
    """The model of a run's newest checkpoint, or of a checkpoint, on this process in fp32; its config and the step.

    Raises UserError when there is none, or none that is whole.
    """
    checkpoint = open_checkpoint(path)
    checkpoint.raise_if_damaged()
    config = config_of(checkpoint)
    with torch.device("meta"):
        model = Mythos(config.model, act=config.act, experts=config.experts)
    kinds = {name: PARAMETER for name, _ in model.named_parameters()} | {
        name: BUFFER for name, _ in model.named_buffers()
    }
    shapes = {name: tuple(value.shape) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    for name, shape in shapes.items():
        tensor = checkpoint.manifest.tensors.get(name)
        if tensor is None or tensor.shape != shape:
            there = "none" if tensor is None else f"shape {list(tensor.shape)}"
            raise UserError(f"holds {there} of {name}, and its config asks for {list(shape)}", str(checkpoint.folder))
    values = {name: torch.from_numpy(checkpoint.whole(kind, name)) for name, kind in kinds.items()}
    model.load_state_dict(values, assign=True)
    return model.eval(), config, checkpoint.manifest.step


def config_of(checkpoint: Checkpoint) -> Config:
    """The config that a checkpoint was saved with; types, ranges and the model are checked, as a manifest may have been
    tampered with. Raises UserError for settings that this version does not know, and for values that it refuses.
    """
    try:
        return config_from(checkpoint.manifest.config)
    except UserError as error:
        raise UserError(["its config is wrong", *error.problems], str(checkpoint.folder)) from None


def open_checkpoint(path: Path, check_signature: bool = True) -> Checkpoint:
    """The checkpoint at `path`, or the one that the run (or its folder of checkpoints) at `path` would resume from.

    Its files are not looked at. Raises UserError if there is none, or none that can be read, and if
    MYTHOS_CHECKPOINT_KEY_FILE names a key and it is not signed with it (unless `check_signature` is false).
    """
    key = signing_key() if check_signature else None
    try:
        path = path.expanduser()
        if path.is_file():
            raise UserError("is a file; give a run.dir, or a checkpoint's folder", str(path))
        if (path / FILE).exists() or step_of(path.name) is not None:
            return Checkpoint(path, key=key)
        folder = path / "checkpoints" if os.path.lexists(path / "checkpoints") else path
        for found in checkpoints_of(folder):
            try:
                return Checkpoint(found, key=key)
            except UserError:
                if os.path.lexists(found):
                    raise  # otherwise it was removed meanwhile: a run is writing
        begun = (path / "config.yaml").exists()
        what = "this run has no checkpoint yet" if begun else "no run and no checkpoint"
        what = what if path.exists() else "there is no such folder"
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of a user who is not known
        raise UserError(f"cannot be read ({reason(error)})", str(path)) from None
    raise UserError(f"{what}; give the run.dir of a training that has saved one, or a checkpoint's folder", str(path))
