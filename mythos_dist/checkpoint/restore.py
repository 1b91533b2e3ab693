"""Find the newest intact checkpoint and load it at any layout; or load the model alone, on one process.

Loading does not depend on the layout that saved: for each tensor of its state a rank looks up in checkpoint.json which
files hold elements of its piece, and reads only those regions of them (`reader.py`, `pieces.py`). There is no faster
path for the layout that saved, and none is needed.

Decisions: CHECKPOINT-5, CHECKPOINT-9.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from mythos_dist.checkpoint.exported import holds_export, open_export
from mythos_dist.checkpoint.manifest import (
    AVERAGE,
    BUFFER,
    MAX_BYTES,
    MOMENTS,
    PARAMETER,
    LocalShards,
    VersionError,
    parse_checkpoint_manifest,
    read_checkpoint_manifest,
)
from mythos_dist.checkpoint.names import LATEST, MANIFEST_FILE, step_of
from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.checkpoint.reader import Checkpoint, Wanted, checkpoints_of, remote_checkpoints_of
from mythos_dist.checkpoint.signature import VARIABLE, Key, SignatureError, signing_key
from mythos_dist.checkpoint.sources import exists, read_text
from mythos_dist.config.load import config_from
from mythos_dist.config.schema import CheckpointConfig, Config
from mythos_dist.errors import UserError
from mythos_dist.files import reason
from mythos_dist.model.mythos import Mythos
from mythos_dist.parallel.process import any_rank, from_rank_0, on_rank_0, raise_on_all_ranks
from mythos_dist.progress import Bar, Progress
from mythos_dist.store.backends import check_scheme
from mythos_dist.store.fetch import Unavailable
from mythos_dist.store.folder import list_folder
from mythos_dist.urls import AnyPath, RemotePath, any_path

_DEFAULTS = CheckpointConfig()


@dataclass(frozen=True)
class _Verification:
    """What a rank found in its share of a checkpoint's files."""

    problems: tuple[str, ...] = ()  # a line per damaged file
    error: VersionError | SignatureError | None = None  # the run must not start at all


def find_checkpoint(
    checkpoints: AnyPath, settings: CheckpointConfig = _DEFAULTS
) -> tuple[Checkpoint | None, list[str]]:
    """Returns the checkpoint that `latest` names, or if it is damaged the newest intact one (None if there are none at
    all), and a line per damaged file of the checkpoints that were skipped.

    `checkpoints`: a run's folder of them, or the folder of a single one. In a store, which has no `latest`, the newest
    one that has a manifest is taken: those that are still being uploaded have none.

    Every rank calls this. Of local checkpoints, each rank hashes its share of the files with `settings.verify` or with
    a key (see `signing_key`); else only sizes are checked. Of those in a store, files are hashed here only with a key;
    else sizes are checked here, and hashes while loading.

    Raises UserError on every rank if there are checkpoints but none is intact, if a store fails, if a checkpoint is of
    another format version, which training would overwrite, or if one is not signed with the key.
    """
    key = raise_on_all_ranks(lambda: signing_key(settings.key_file))
    _raise_unless_same_key(key)
    # Rank 0 lists them for all ranks: the folder may change between two listings.
    candidates = from_rank_0(lambda: _candidates(checkpoints))
    damaged: list[str] = []
    for i, folder in enumerate(candidates):
        checkpoint, problems = _verify_on_all_ranks(folder, settings.verify, key)
        if checkpoint:
            on_rank_0(partial(_refuse_overwrite, folder, candidates[i + 1 :]))
            return checkpoint, damaged
        damaged += problems
    if damaged:
        remedy = "no checkpoint is intact: restore these files from a copy, or give another run.dir"
        raise UserError([*damaged, remedy])
    return None, []


def _candidates(checkpoints: AnyPath) -> Sequence[AnyPath]:
    """Checkpoints to try, in order. Raises UserError if `latest` is a folder, which no later save could replace."""
    if isinstance(checkpoints, RemotePath):
        return [checkpoints] if is_checkpoint(checkpoints) else remote_checkpoints_of(checkpoints)
    if is_checkpoint(checkpoints):
        return [checkpoints]
    latest = checkpoints / LATEST
    if latest.is_dir() and not latest.is_symlink():
        raise UserError("is a folder, but a run writes a file of this name; move it away", str(latest))
    return checkpoints_of(checkpoints)


def is_checkpoint(path: AnyPath) -> bool:
    """Whether a path is the folder of one checkpoint, by its content or its name. Raises UserError if a store fails."""
    if isinstance(path, RemotePath):
        check_scheme(path.url)
    return step_of(path.name) is not None or exists(path / MANIFEST_FILE)


def _verify_on_all_ranks(folder: AnyPath, verify: bool, key: Key | None) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint if it is intact; else None and the problems that all ranks found, none if it was removed, or has
    not been uploaded.

    Raises VersionError or SignatureError on every rank if a rank does, and UserError if a store fails.
    """
    content = None
    if isinstance(folder, RemotePath):
        content = from_rank_0(lambda: _remote_manifest(folder))  # thousands of ranks need not request the same file
        if content is None:
            return None, []
    checkpoint, mine = raise_on_all_ranks(lambda: _verify_share(folder, verify, key, content))
    of_ranks = [_Verification()] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    for report in of_ranks:
        if report.error:
            raise report.error
    problems = list(dict.fromkeys(line for report in of_ranks for line in report.problems))
    if problems and not any_rank(raise_on_all_ranks(lambda: _still_exists(folder))):
        return None, []
    return None if problems else checkpoint, problems


def _verify_share(
    folder: AnyPath, verify: bool, key: Key | None, content: str | None
) -> tuple[Checkpoint | None, _Verification]:
    """Open a checkpoint and check this rank's share of its files. `content`: of the manifest of one in a store.

    Raises UserError if a store fails: that is not a reason to go back to an older checkpoint.
    """
    try:
        manifest = None if content is None else parse_checkpoint_manifest(lambda: content, folder, key)
        checkpoint = Checkpoint(folder, manifest, key)
        share = sorted(checkpoint.manifest.files)[dist.get_rank() :: dist.get_world_size()]
        if checkpoint.is_remote and not key:
            verify, share = False, sorted(checkpoint.manifest.files) if dist.get_rank() == 0 else []  # one listing
        problems = checkpoint.find_damage(share, verify)
    except (VersionError, SignatureError) as error:
        return None, _Verification(error=error)
    except Unavailable:
        raise
    except UserError as error:
        checkpoint, problems = None, [str(error)]
    return checkpoint, _Verification(tuple(problems))


def _remote_manifest(folder: RemotePath) -> str | None:
    """The content of a manifest; None: it is being uploaded, or was removed. Raises UserError if the store fails."""
    try:
        return read_text(folder / MANIFEST_FILE, MAX_BYTES)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"is damaged ({error})", str(folder / MANIFEST_FILE)) from None


def _still_exists(folder: AnyPath) -> bool:
    return os.path.lexists(folder) if isinstance(folder, Path) else exists(folder / MANIFEST_FILE)


def _refuse_overwrite(chosen: AnyPath, others: Sequence[AnyPath]) -> None:
    """Raises VersionError if a checkpoint of a later step than `chosen` is of another format version: training would
    replace it when it gets there."""
    for other in others:
        if (step_of(other.name) or 0) > (step_of(chosen.name) or 0):
            try:
                read_checkpoint_manifest(other)
            except VersionError:
                raise
            except UserError:
                continue  # damaged: it may be replaced


def _raise_unless_same_key(key: Key | None) -> None:
    """Raises UserError on every rank if ranks have different keys, or some have none."""
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, key.name if key else None)
    if len(set(names)) == 1:
        return
    without = [rank for rank, name in enumerate(names) if name is None]
    problem = f"ranks {without[:5]} have no signing key" if without else "ranks have different signing keys"
    raise UserError(f"{problem}: set checkpoint.key_file, or {VARIABLE} on every node, to files with the same key")


def load_state(
    checkpoint: Checkpoint,
    shards: LocalShards,
    progress: Progress = lambda size: None,
    leave_out: Collection[str] = (),
) -> None:
    """Load a rank's `shards` from a checkpoint; moments and averages that the checkpoint lacks become zero (imported
    weights), and so do those of the kinds in `leave_out`.

    `progress` is called with the bytes read since the last call. Raises UserError if the checkpoint is of another
    model.
    """

    def wanted() -> Iterator[Wanted]:
        for name, shard in shards.items():
            for kind, value in shard.values.items():
                tensor = checkpoint.manifest.tensors.get(name)
                optional = kind in MOMENTS or kind == AVERAGE
                if optional and tensor is not None and (kind in leave_out or kind not in tensor.kinds):
                    value.zero_()
                    continue
                on_host = value.detach() if value.device.type == "cpu" else torch.zeros(value.shape, dtype=value.dtype)
                done = partial(value.copy_, on_host) if on_host.device != value.device else lambda: None
                yield Wanted(kind, name, shard.piece, on_host.numpy(), done)

    checkpoint.read_all(wanted(), progress)


def load_model(path: str | AnyPath, quiet: bool = True) -> tuple[Mythos, Config, int]:
    """The unsharded fp32 model of a checkpoint, of a run's newest one, or of an export, in eval mode; its config, of
    which an export has `model`, `act` and `loops` only; its step. With a bar unless `quiet`.

    Raises UserError if there is no checkpoint, or if it is damaged.

    >>> from mythos_dist import load_model
    >>> model, config, step = load_model("runs/first")
    >>> step, config.train.seq_len
    (3, 32)
    """
    checkpoint = open_weights_at(any_path(path) if isinstance(path, str) else path)
    hashes = not checkpoint.is_remote
    with Bar("verifying", checkpoint.manifest.bytes, quiet=quiet or not hashes) as shown:
        checkpoint.raise_if_damaged(hashes, shown.update)  # of moments, too, which a model does not have
    with Bar("loading", checkpoint.manifest.weight_bytes, quiet=quiet) as shown:
        return model_of(checkpoint, shown.update)


def model_of(checkpoint: Checkpoint, progress: Progress = lambda size: None) -> tuple[Mythos, Config, int]:
    """As `load_model`, of a checkpoint that is open. Its files are not checked. progress: see `read_all`."""
    config = config_of(checkpoint)
    with torch.device("meta"):
        model = Mythos(config.model, act=config.act, experts=config.experts)
    expected = {name: (PARAMETER, value) for name, value in model.named_parameters()}
    expected |= {name: (BUFFER, value) for name, value in model.named_buffers()}
    for name, (_, value) in expected.items():
        tensor = checkpoint.manifest.tensors.get(name)
        if tensor is None or tensor.shape != tuple(value.shape):
            actual = "no tensor" if tensor is None else f"shape {list(tensor.shape)}"
            wanted = list(value.shape)
            raise UserError(f"has {actual} for {name}; its config needs shape {wanted}", str(checkpoint.folder))
    values = {name: torch.empty(value.shape) for name, (_, value) in expected.items()}
    wanted = (
        Wanted(kind, name, Piece.full(tuple(value.shape)), values[name].view(-1).numpy())
        for name, (kind, value) in expected.items()
    )
    checkpoint.read_all(wanted, progress)
    checkpoint.raise_if_replaced()
    model.load_state_dict(values, assign=True)
    return model.eval(), config, checkpoint.manifest.step


def open_weights_at(path: AnyPath) -> Checkpoint:
    """The checkpoint at `path`, the newest one of the run at `path`, or the export there.

    Raises UserError as `open_checkpoint`, and for an export if signatures are required.
    """
    path = path.expanduser()
    return open_export(path) if holds_export(path) else open_checkpoint(path)


def config_of(checkpoint: Checkpoint) -> Config:
    """The config that a checkpoint was saved with.

    Types, ranges and the model are checked: a manifest may have been tampered with. Raises UserError for settings that
    this version does not have, and for values that it refuses.
    """
    try:
        return config_from(checkpoint.manifest.config)
    except UserError as error:
        raise UserError(["its config is invalid", *error.problems], str(checkpoint.folder)) from None


def open_checkpoint(path: AnyPath, check_signature: bool = True) -> Checkpoint:
    """The checkpoint at `path`, or the one that the run (or its folder of checkpoints) at `path` would resume from.

    Its files are not checked. In a store, it is the newest one that has a manifest. Raises UserError if there is none,
    or none that can be read, and if MYTHOS_CHECKPOINT_KEY_FILE names a key and the checkpoint is not signed with it
    (unless `check_signature` is false).
    """
    key = signing_key() if check_signature else None
    if isinstance(path, RemotePath):
        return _open_remote_checkpoint(path, key)
    try:
        path = path.expanduser()
        if path.is_file():
            raise UserError("is a file; give a run.dir, or a checkpoint's folder", str(path))
        if is_checkpoint(path):
            return Checkpoint(path, key=key)
        folder = path / "checkpoints" if os.path.lexists(path / "checkpoints") else path
        for candidate in checkpoints_of(folder):
            try:
                return Checkpoint(candidate, key=key)
            except UserError:
                if os.path.lexists(candidate):
                    raise  # otherwise a run that is saving has just removed it
        if not path.exists():
            problem = "no such folder"
        elif (path / "config.yaml").exists():
            problem = "this run has not saved a checkpoint yet"
        else:
            problem = "neither a run nor a checkpoint"
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        raise UserError(f"cannot be read ({reason(error)})", str(path)) from None
    raise UserError(f"{problem}; give the run.dir of a run that has saved one, or a checkpoint's folder", str(path))


def _open_remote_checkpoint(path: RemotePath, key: Key | None) -> Checkpoint:
    """As `open_checkpoint`."""
    if is_checkpoint(path):
        return Checkpoint(path, key=key)
    candidates = remote_checkpoints_of(run_checkpoints(path))
    for folder in candidates:
        if (content := _remote_manifest(folder)) is not None:
            return Checkpoint(folder, parse_checkpoint_manifest(lambda content=content: content, folder, key), key)
    problem = f"{candidates[0].name} is still being uploaded" if candidates else "neither a run nor a checkpoint"
    raise UserError(f"{problem}; give the URL of a run that has saved a checkpoint, or of a checkpoint", str(path))


def run_checkpoints(path: RemotePath) -> RemotePath:
    """The folder of checkpoints of the run at `path`, which may be that folder itself. Raises UserError."""
    folders = list_folder(path).folders
    return path if any(step_of(name) is not None for name in folders) else path / "checkpoints"
