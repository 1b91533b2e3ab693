"""The folders of a config: is there room for its checkpoints, can they be written and locked, are the shards there?

A checkpoint is weights and both moments in fp32: 12 bytes per parameter, and `checkpoint.keep` + 1 lie on disk
while the newest is written.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mythos_dist.config.schema import CheckpointConfig, Config
from mythos_dist.errors import UserError
from mythos_dist.ops.doctor.lines import Line, gigabytes, note, ok, problem
from mythos_dist.ops.plan.cost import BYTES_PER_PARAMETER, count_parameters
from mythos_dist.private import default_shard_cache, why_untrusted
from mythos_dist.units import count


@dataclass(frozen=True)
class Folder:
    """A folder, or where it would be made."""

    path: str
    existing: str  # itself, or the nearest folder above it that is there
    free: int  # bytes
    unwritable: str = ""  # why nothing can be written there
    unlockable: str = ""  # why no file can be locked there


@dataclass(frozen=True)
class Storage:
    run: Folder
    parameters: int
    present: int  # bytes of the checkpoints that the run has by now
    run_problems: tuple[str, ...]  # run.dir holds another run
    data_problems: tuple[str, ...]
    data: str = ""  # what the shards are, in words
    cache: Folder | None = None  # where compressed shards are unpacked
    unpacked: int = 0  # bytes of all compressed shards, unpacked
    unpacked_present: int = 0  # bytes of them that lie in the cache already


def find(config: Config) -> Storage:
    """Look at the folders; nothing stays in them."""
    from mythos_dist.data.corpora import open_corpora
    from mythos_dist.data.manifest import SPLITS
    from mythos_dist.train.run_folder import check_run_folder

    run_dir = Path(config.run.dir)
    run_problems, data_problems, corpora = (), (), []
    try:
        check_run_folder(config)
    except UserError as error:
        run_problems = tuple(error.problems)
    try:
        corpora = open_corpora(
            config.data.folders,
            seq_len=config.train.seq_len,
            vocab_size=config.model.vocab_size,
            tokenizer_path=config.data.tokenizer,
            splits=SPLITS if config.train.eval_samples else ["train"],
        )
    except UserError as error:
        data_problems = tuple(f"{error.source}: {text}" if error.source else text for text in error.problems)
    # As in data/windows.py.
    cache = Path(config.data.cache) if config.data.cache else default_shard_cache()
    packed = [
        shard for corpus in corpora for shards in corpus.shards.values() for shard in shards if shard.entry["zip_data"]
    ]
    if packed and not config.data.cache and (foreign := why_untrusted(cache)):
        data_problems += (f"{foreign}; look at what is there, remove it, or set data.cache to a folder of yours",)
    return Storage(
        run=look_at(run_dir),
        parameters=count_parameters(config.model),
        present=_size(run_dir / "checkpoints"),
        run_problems=run_problems,
        data_problems=data_problems,
        data=", ".join(
            f"{corpus.folder}: {count(corpus.manifest.splits['train'].windows, 'window')} of {corpus.manifest.seq_len} "
            f"tokens{'' if corpus.manifest.splits['heldout'].windows else ', no held-out split'}"
            for corpus in corpora
        ),
        cache=look_at(cache) if packed else None,
        unpacked=sum(shard.entry["raw_data"]["bytes"] for shard in packed),
        unpacked_present=sum(_size(cache / name) for name in {shard.fingerprint[:16] for shard in packed}),
    )


def look_at(path: Path) -> Folder:
    """What can be done in `path`, tried with a file that has no name and is gone at once."""
    existing = next(above for above in [path, *path.parents] if os.path.isdir(above))
    unwritable = unlockable = ""
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                unlockable = error.strerror or str(error)
    except OSError as error:
        unwritable = error.strerror or str(error)
    return Folder(str(path), str(existing), shutil.disk_usage(existing).free, unwritable, unlockable)


def _size(folder: Path) -> int:
    """Bytes of all files below; 0 if there is no such folder."""
    total = 0
    for above, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a run that is writing renames its files
                total += os.lstat(Path(above, name)).st_size
    return total


def pinned(settings: CheckpointConfig, steps: int) -> int:
    """How many checkpoints stay for good."""
    every = settings.pin_every
    return len({step for step in settings.pin if step <= steps} | set(range(every, steps + 1, every) if every else ()))


def lines(found: Storage, config: Config, available: int, machines: int) -> Iterator[Line]:
    """`available`: bytes of memory of one of so many `machines`."""
    yield from _folder("run.dir", found.run, found.run_problems)
    yield from _room(found, config)
    if config.checkpoint.background:
        yield from _memory(found, available, machines)
    topic = "data.path" if config.data.mix is None else "data.mix"
    for text in found.data_problems:
        said, _, remedy = text.partition("; ")
        yield problem(topic, said, remedy or "make shards with tools/make_shards.py")
    if not found.data_problems:
        yield ok(topic, found.data)
    if found.cache:
        yield from _folder("data.cache", found.cache, ())
        missing = found.unpacked - found.unpacked_present
        text = f"compressed shards take {gigabytes(missing)} more when all are unpacked to {found.cache.path}, and "
        text += f"{gigabytes(found.cache.free)} are free"
        if missing > found.cache.free:
            yield problem("data.cache", text, "set data.cache to a folder with more room, on every machine")
        else:
            yield ok("data.cache", text)


def _folder(topic: str, folder: Folder, problems: Iterable[str]) -> Iterator[Line]:
    where = folder.path if folder.path == folder.existing else f"{folder.path} (to be made in {folder.existing})"
    for text in problems:
        said, _, remedy = text.partition("; ")
        yield problem(topic, said, remedy or f"give another {topic}")
    if folder.unwritable:
        text = f"nothing can be written in {where}: {folder.unwritable}"
        yield problem(topic, text, f"give another {topic}, or get the right to write there")
    elif folder.unlockable and topic == "run.dir":
        text = f"files in {where} cannot be locked ({folder.unlockable}), and a run locks its folder"
        yield problem(
            topic, text, "give a folder on another file system, or mount this one with locks (Lustre: -o flock)"
        )
    elif not problems:
        yield ok(topic, f"{where} can be written and locked")


def _room(found: Storage, config: Config) -> Iterator[Line]:
    settings, one = config.checkpoint, BYTES_PER_PARAMETER * found.parameters
    stay = pinned(settings, config.train.steps)
    # What lies there already makes room, but for the one that is being written.
    newest = max((settings.keep + 1) * one - found.present, one)
    everything = max((settings.keep + 1 + stay) * one - found.present, one)
    text = f"{found.parameters:,} parameters: {gigabytes(one)} per checkpoint; keep + 1 = {settings.keep + 1}"
    text += f" and {stay} pinned" if stay else ""
    text += f" take {gigabytes(everything)} more, and {gigabytes(found.run.free)} are free in {found.run.existing}"
    if found.run.free < newest:
        remedy = f"give a run.dir with {gigabytes(newest)} free, or keep fewer (checkpoint.keep)"
        yield problem("checkpoint", text, remedy)
    elif found.run.free < everything:
        yield note("checkpoint", text, "pin fewer (checkpoint.pin, checkpoint.pin_every), or make room in time")
    else:
        yield ok("checkpoint", text)


def _memory(found: Storage, available: int, machines: int) -> Iterator[Line]:
    copy = BYTES_PER_PARAMETER * found.parameters
    if copy > available * machines:
        spread = -(-copy // max(available, 1))
        yield note(
            "checkpoint.background",
            f"copies {gigabytes(copy)} into the memory of all machines together, and {gigabytes(available)} are "
            f"available in this one",
            f"train on at least {spread:,} such machines, or set checkpoint.background=false",
        )
