"""Checks of what a config would use on this machine: dtype, kernels, ranks, folders."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mythos_dist.config.layout import layout_problems
from mythos_dist.config.schema import CheckpointConfig, Config
from mythos_dist.errors import UserError
from mythos_dist.gpu_packages import INSTALL
from mythos_dist.ops.doctor.facts import Machine
from mythos_dist.ops.doctor.findings import Finding, gigabytes, note, ok, problem, split_remedy
from mythos_dist.ops.doctor.machine_checks import HALF
from mythos_dist.parallel.launcher import read_number
from mythos_dist.private import default_shard_cache, why_untrusted
from mythos_dist.units import count


def check_kernels(machine: Machine, config: Config) -> Iterator[Finding]:
    """train.dtype, experts.backend, train.attention: what training would refuse, and what the others run on."""
    from mythos_dist.parallel.process import check_dtype, choose_accelerator
    from mythos_dist.train.checks import check_kernels

    refused = []
    choose_accelerator()
    for check in (lambda: check_dtype(config.train.dtype), lambda: check_kernels(config)):
        try:
            check()
        except UserError as error:
            refused += [split_remedy(message.partition("=")[0], message) for message in error.problems]
    yield from refused
    topics = {finding.topic for finding in refused}
    yield from (one for one in (_dtype(machine, config), _experts(machine, config)) if one.topic not in topics)
    if "train.attention" not in topics:
        yield _attention(machine, config)


def _dtype(machine: Machine, config: Config) -> Finding:
    topic, dtype = "train.dtype", config.train.dtype
    if dtype == "bf16" and machine.gpus and machine.capability < HALF:
        text = "train.dtype=bf16: GPUs below compute capability 8.0 have no bf16 units, torch would emulate them"
        return problem(topic, text, "set train.dtype=fp16 or fp32")
    if dtype == "fp32" and machine.capability >= HALF:
        text = "train.dtype=fp32 does not use the tensor cores of these GPUs, nor flash-attn and MegaBlocks"
        return note(topic, text, "set train.dtype=bf16, unless you compare values")
    return ok(topic, f"train.dtype={dtype} runs on {'these GPUs' if machine.gpus else 'the CPU'}")


def _experts(machine: Machine, config: Config) -> Finding:
    topic, setting, dtype = "experts.backend", f"experts.backend={config.experts.backend}", config.train.dtype
    if config.experts.backend == "reference":
        return note(topic, f"{setting} -> one expert after the other, for tests", "set experts.backend=grouped")
    if config.experts.backend == "grouped" and machine.gpus and dtype != "bf16":
        text = f"{setting} -> F.grouped_mm, in {dtype} a loop over experts: its kernel is for bf16"
        return note(topic, text, "set train.dtype=bf16")
    return ok(topic, f"{setting} -> {'F.grouped_mm' if config.experts.backend == 'grouped' else 'MegaBlocks'}")


def _attention(machine: Machine, config: Config) -> Finding:
    import torch

    from mythos_dist.model.attend import choose_kernel
    from mythos_dist.parallel.process import DTYPES

    topic, setting = "train.attention", f"train.attention={config.train.attention}"
    device = torch.device("cuda" if machine.gpus else "cpu")
    kernel = choose_kernel(config.train.attention, device, DTYPES[config.train.dtype], config.model)
    error = machine.unavailable["flash_attn"]
    half = config.train.dtype != "fp32" and machine.capability >= HALF
    if config.train.attention == "auto" and kernel == "sdpa" and half and error:
        return note(topic, f"{setting} -> sdpa: {error}", f"{INSTALL}; sdpa gives the same values, more slowly")
    return ok(topic, f"{setting} -> {kernel}")


def check_layout(machine: Machine, config: Config) -> Iterator[Finding]:
    """Whether the ranks that a launcher has started form complete replicas; without a launcher, how many would."""
    replica = config.parallel.pipe * config.parallel.tensor
    world = read_number(machine.env, "WORLD_SIZE")
    if world is None:
        ranks = replica * config.parallel.expert
        yield ok("layout", f"runs on {'any number of ranks' if ranks == 1 else f'any multiple of {ranks} ranks'}")
        return
    problems = layout_problems(config, world)
    for message in problems:
        yield split_remedy("layout", message)
    if not problems:
        yield ok("layout", f"{count(world, 'rank')} form {count(world // replica, 'replica')} of {replica}")


class Folder(NamedTuple):
    """What can be done in a folder, or where it would be created."""

    path: str
    existing: str  # the folder itself, or its nearest ancestor that exists
    free: int  # bytes
    write_error: str = ""
    lock_error: str = ""


def inspect_folder(path: Path) -> Folder:
    """Tried with an unnamed temporary file, so nothing is left."""
    existing = next(folder for folder in [path, *path.parents] if os.path.isdir(folder))
    write_error = lock_error = ""
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock_error = error.strerror or str(error)
    except OSError as error:
        write_error = error.strerror or str(error)
    return Folder(str(path), str(existing), shutil.disk_usage(existing).free, write_error, lock_error)


def folder_findings(topic: str, folder: Folder, problems: Iterable[str] = ()) -> Iterator[Finding]:
    """`problems`: those known already."""
    where = folder.path if folder.path == folder.existing else f"{folder.path} (to be created in {folder.existing})"
    for message in problems:
        yield split_remedy(topic, message, f"set another {topic}")
    if folder.write_error:
        text = f"{where} is not writable: {folder.write_error}"
        yield problem(topic, text, f"set another {topic}, or get permission to write there")
    elif folder.lock_error and topic == "run.dir":
        text = f"files in {where} cannot be locked ({folder.lock_error}), and a run locks its folder"
        yield problem(topic, text, "use another file system, or mount this one with locks (Lustre: -o flock)")
    elif not problems:
        yield ok(topic, f"{where} can be written and locked")


def check_run_dir(machine: Machine, config: Config) -> Iterator[Finding]:
    """The folder, and room for its checkpoints on disk and in memory."""
    from mythos_dist.train.run_folder import check_run_folder

    path, problems = Path(config.run.dir), []
    try:
        check_run_folder(config)
    except UserError as error:
        problems = error.problems
    folder = inspect_folder(path)
    yield from folder_findings("run.dir", folder, problems)
    yield checkpoint_room(config, folder, folder_bytes(path / "checkpoints"))
    if config.checkpoint.background:
        yield from background_copy(machine, config)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in `folder`; 0 if it does not exist."""
    total = 0
    for above, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a running job renames its files
                total += os.lstat(Path(above, name)).st_size
    return total


def count_pinned(settings: CheckpointConfig, steps: int) -> int:
    """Number of checkpoints that are kept forever."""
    pinned = {step for step in settings.pin if step <= steps}
    if settings.pin_every:
        pinned |= set(range(settings.pin_every, steps + 1, settings.pin_every))
    return len(pinned)


def checkpoint_room(config: Config, folder: Folder, present: int) -> Finding:
    """Disk space: `checkpoint.keep` + 1 exist while the newest is written. `present`: bytes of existing checkpoints."""
    from mythos_dist.model.parameter_table import checkpoint_bytes, count_parameters

    parameters, size = count_parameters(config.model), checkpoint_bytes(config.model)
    kept, pinned = config.checkpoint.keep + 1, count_pinned(config.checkpoint, config.train.steps)
    # Existing checkpoints make room, except for the one that is being written.
    needed = max(kept * size - present, size)
    needed_with_pinned = max((kept + pinned) * size - present, size)
    text = f"{parameters:,} parameters: {gigabytes(size)} per checkpoint; keep + 1 = {kept}"
    text += f" and {pinned} pinned" if pinned else ""
    text += f" need {gigabytes(needed_with_pinned)} more, {gigabytes(folder.free)} free in {folder.existing}"
    if folder.free < needed:
        remedy = f"set a run.dir with {gigabytes(needed)} free, or keep fewer (checkpoint.keep)"
        return problem("checkpoint", text, remedy)
    if folder.free < needed_with_pinned:
        return note("checkpoint", text, "pin fewer (checkpoint.pin, checkpoint.pin_every), or free space in time")
    return ok("checkpoint", text)


def background_copy(machine: Machine, config: Config) -> Iterator[Finding]:
    from mythos_dist.model.parameter_table import checkpoint_bytes

    copy, available = checkpoint_bytes(config.model), machine.memory[1]
    if copy > available * machine.node_count:
        nodes = -(-copy // max(available, 1))
        text = f"copies {gigabytes(copy)} into the memory of all nodes together, {gigabytes(available)} available here"
        yield note(
            "checkpoint.background", text, f"use at least {nodes:,} such nodes, or set checkpoint.background=false"
        )


def check_data(machine: Machine, config: Config) -> Iterator[Finding]:
    """The shards, opened as training does, and room to unpack compressed ones."""
    from mythos_dist.data.corpora import open_corpora
    from mythos_dist.data.manifest import SPLITS

    topic = "data.path" if config.data.mix is None else "data.mix"
    try:
        corpora = open_corpora(
            config.data.folders,
            seq_len=config.train.seq_len,
            vocab_size=config.model.vocab_size,
            tokenizer_path=config.data.tokenizer,
            splits=SPLITS if config.train.eval_samples else ["train"],
        )
    except UserError as error:
        for message in error.problems:
            message = f"{error.source}: {message}" if error.source else message
            yield split_remedy(topic, message, "make shards with tools/make_shards.py")
        return
    descriptions, compressed = [], []
    for corpus in corpora:
        splits = corpus.manifest.splits
        heldout = "" if splits["heldout"].windows else ", no held-out split"
        windows = count(splits["train"].windows, "window")
        descriptions.append(f"{corpus.folder}: {windows} of {corpus.manifest.seq_len} tokens{heldout}")
        for shards in corpus.shards.values():
            compressed += [shard for shard in shards if shard.entry["zip_data"]]
    yield ok(topic, ", ".join(descriptions))
    if compressed:
        path = Path(config.data.cache) if config.data.cache else default_shard_cache()  # as in data/windows.py
        foreign = "" if config.data.cache else why_untrusted(path)
        folder = inspect_folder(path)
        if foreign:
            yield problem("data.cache", foreign, "check its content, remove it, or set data.cache to a folder of yours")
        else:
            yield from folder_findings("data.cache", folder)
        unpacked = sum(folder_bytes(path / name) for name in {shard.fingerprint[:16] for shard in compressed})
        yield cache_room(folder, sum(shard.entry["raw_data"]["bytes"] for shard in compressed) - unpacked)


def cache_room(folder: Folder, missing: int) -> Finding:
    """`missing`: bytes of shards that are not unpacked yet."""
    text = f"unpacking all compressed shards to {folder.path} needs {gigabytes(missing)} more, "
    text += f"{gigabytes(folder.free)} free"
    if missing > folder.free:
        return problem("data.cache", text, "set data.cache to a folder with more room, on every node")
    return ok("data.cache", text)


CONFIG_CHECKS: dict[str, Callable[[Machine, Config], Iterator[Finding]]] = {
    "kernels of the config": check_kernels,
    "layout": check_layout,
    "run.dir": check_run_dir,
    "data.path": check_data,
}
