"""Checks of what a config would use on this machine: dtype, kernels, ranks, folders.

What training itself checks at its start is called here; its refusals (UserError) become problems.
"""

import contextlib
import fcntl
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mythos_dist.config.layout import layout_problems
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.files import existing_folder
from mythos_dist.gpu_packages import INSTALL
from mythos_dist.ops.doctor.findings import Check, Finding, gigabytes, note, ok, problem
from mythos_dist.ops.doctor.machine import Machine
from mythos_dist.ops.doctor.machine_checks import HALF
from mythos_dist.parallel.launcher import read_number
from mythos_dist.private import default_shard_cache, why_untrusted
from mythos_dist.units import count

if TYPE_CHECKING:
    from mythos_dist.data.shard import Shard


def check_dtype(machine: Machine, config: Config) -> Iterator[Finding]:
    from mythos_dist.parallel import process

    dtype = config.train.dtype
    process.choose_accelerator()
    process.check_dtype(dtype)
    if dtype == "bf16" and machine.gpus and machine.capability < HALF:
        text = "train.dtype=bf16: GPUs below compute capability 8.0 have no bf16 units, torch would emulate them"
        yield problem(text, "set train.dtype=fp16 or fp32")
    elif dtype == "fp32" and machine.capability >= HALF:
        text = "train.dtype=fp32 does not use the tensor cores of these GPUs, nor flash-attn and MegaBlocks"
        yield note(text, "set train.dtype=bf16, unless you compare values")
    else:
        yield ok(f"train.dtype={dtype} runs on {'these GPUs' if machine.gpus else 'the CPU'}")


def check_experts(machine: Machine, config: Config) -> Iterator[Finding]:
    from mythos_dist.train.checks import check_experts

    check_experts(config)
    backend, dtype = config.experts.backend, config.train.dtype
    if backend == "reference":
        text = "experts.backend=reference -> one expert after the other, for tests"
        yield note(text, "set experts.backend=grouped")
    elif backend == "grouped" and machine.gpus and dtype != "bf16":
        text = f"experts.backend=grouped -> F.grouped_mm, in {dtype} a loop over experts: its kernel is for bf16"
        yield note(text, "set train.dtype=bf16")
    else:
        yield ok(f"experts.backend={backend} -> {'F.grouped_mm' if backend == 'grouped' else 'MegaBlocks'}")


def check_attention(machine: Machine, config: Config) -> Iterator[Finding]:
    from mythos_dist.train.checks import choose_attention

    kernel, missing = choose_attention(config), machine.unavailable["flash_attn"]
    text = f"train.attention={config.train.attention} -> {kernel}"
    half = config.train.dtype != "fp32" and machine.capability >= HALF
    if config.train.attention == "auto" and kernel == "sdpa" and half and missing:
        yield note(f"{text}: {missing}", f"{INSTALL}; sdpa gives the same values, more slowly")
    else:
        yield ok(text)


def check_compiler(machine: Machine, config: Config) -> None:
    from mythos_dist.train.checks import check_compiler

    check_compiler(config)


def check_layout(machine: Machine, config: Config) -> Iterator[Finding]:
    """Whether the ranks that a launcher has started form complete replicas; without a launcher, how many would."""
    parallel, world = config.parallel, read_number(machine.env, "WORLD_SIZE")
    replica = parallel.pipe * parallel.context * parallel.tensor
    if world is None:
        ranks = replica * math.lcm(parallel.expert, parallel.context) // parallel.context
        yield ok(f"runs on {'any number of ranks' if ranks == 1 else f'any multiple of {ranks} ranks'}")
    elif problems := layout_problems(config, world):
        raise UserError(problems)
    else:
        yield ok(f"{count(world, 'rank')} form {count(world // replica, 'replica')} of {replica}")


def check_folder(path: Path, setting: str) -> Finding:
    """Whether files can be written in a folder, or where it would be created, and locked in `run.dir`. Leaves none."""
    existing = existing_folder(path)
    where, does = f"{path}" if path == existing else f"{path} (to be created in {existing})", "written"
    try:
        file = tempfile.TemporaryFile(dir=existing)  # noqa: SIM115 - closed below
    except OSError as error:
        remedy = f"set another {setting}, or get permission to write there"
        return problem(f"{where} is not writable: {error.strerror}", remedy, setting)
    with file:
        if setting == "run.dir":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                remedy = "use another file system, or mount this one with locks (Lustre: -o flock)"
                text = f"files in {where} cannot be locked ({error.strerror}), and a run locks its folder"
                return problem(text, remedy)
            does += " and locked"
    return ok(f"{where} can be {does}", topic=setting)


def check_run_dir(machine: Machine, config: Config) -> Iterator[Finding]:
    from mythos_dist.train.run_folder import check_run_folder

    yield check_folder(Path(config.run.dir), "run.dir")
    check_run_folder(config)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in `folder`; 0 if it does not exist."""
    total = 0
    for above, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a running job renames its files
                total += os.lstat(Path(above, name)).st_size
    return total


def check_checkpoints(machine: Machine, config: Config) -> Iterator[Finding]:
    """Room on disk, where `checkpoint.keep` + 1 exist while the newest is written, and `checkpoint.remote_backlog` more
    while the store is down, and in memory for a copy."""
    from mythos_dist.model.parameter_table import checkpoint_bytes, count_parameters

    settings, path, size = config.checkpoint, Path(config.run.dir), checkpoint_bytes(config)
    free, present = machine.free_bytes(path), folder_bytes(path / "checkpoints")
    every = range(settings.pin_every, config.train.steps + 1, settings.pin_every) if settings.pin_every else ()
    kept, pinned = settings.keep + 1, len({*every, *(step for step in settings.pin if step <= config.train.steps)})
    waiting = settings.remote_backlog if settings.remote else 0
    # Existing checkpoints make room, except for the one that is being written.
    needed, needed_with_pinned = (max(number * size - present, size) for number in (kept, kept + pinned + waiting))
    text = f"{count_parameters(config.model):,} parameters: {gigabytes(size)} per checkpoint; keep + 1 = {kept}"
    text += f" and {pinned} pinned" if pinned else ""
    text += f" and up to {waiting} that wait for their upload" if waiting else ""
    text += f" need {gigabytes(needed_with_pinned)} more, {gigabytes(free)} free in {existing_folder(path)}"
    if free < needed:
        remedy = f"set a run.dir with {gigabytes(needed)} free, or keep fewer (checkpoint.keep)"
        yield problem(text, remedy)
    elif free < needed_with_pinned:
        fewer = "pin fewer (checkpoint.pin, checkpoint.pin_every)" if pinned else "let fewer wait"
        fewer += ", lower checkpoint.remote_backlog" if waiting else ""
        yield note(text, f"{fewer}, or free space in time")
    else:
        yield ok(text)
    available = machine.memory[1]
    if settings.background and size > available * machine.node_count:
        text = f"copies {gigabytes(size)} into the memory of all nodes together, {gigabytes(available)} available here"
        nodes = -(-size // max(available, 1))
        remedy = f"use at least {nodes:,} such nodes, or set checkpoint.background=false"
        yield note(text, remedy, "checkpoint.background")


def check_data(machine: Machine, config: Config) -> Iterator[Finding]:
    """The shards, opened as training does, and room for those of stores and to unpack compressed ones."""
    from mythos_dist.data.sequences import num_sequences
    from mythos_dist.train.checks import open_data

    descriptions, compressed, remote = [], [], []
    for corpus in open_data(config):
        splits = corpus.manifest.splits
        heldout = "" if splits["heldout"].windows else ", no held-out split"
        windows = count(splits["train"].windows, "window")
        length, S = corpus.manifest.seq_len, config.train.seq_len
        cut = "" if length == S else f" ({count(num_sequences(corpus.manifest, 'train', S), 'sequence')} of {S})"
        descriptions.append(f"{corpus.name}: {windows} of {length} tokens{cut}{heldout}")
        shards = [shard for split in corpus.shards.values() for shard in split]
        remote += [shard for shard in shards if shard.url]
        compressed += [shard for shard in shards if shard.entry["zip_data"] and not shard.url]
    yield ok(", ".join(descriptions))
    if remote:
        yield _check_room_for_downloads(machine, config, remote)
    if not compressed:
        return
    topic, path = "data.cache", _shard_cache(config)
    if foreign := "" if config.data.cache else why_untrusted(path):  # as in data/windows.py
        yield problem(foreign, "check its content, remove it, or set data.cache to a folder of yours", topic)
    else:
        yield check_folder(path, topic)
    unpacked = sum(folder_bytes(path / name) for name in {shard.fingerprint[:16] for shard in compressed})
    missing, free = sum(shard.entry["raw_data"]["bytes"] for shard in compressed) - unpacked, machine.free_bytes(path)
    text = f"unpacking all compressed shards to {path} needs {gigabytes(missing)} more, {gigabytes(free)} free"
    if missing > free:
        yield problem(text, "set data.cache to a folder with more room, on every node", topic)
    else:
        yield ok(text, topic=topic)


def _shard_cache(config: Config) -> Path:
    return Path(config.data.cache) if config.data.cache else default_shard_cache()


def _check_room_for_downloads(machine: Machine, config: Config, shards: "list[Shard]") -> Finding:
    """Room for the shards of stores: all of them, or `data.cache_limit`."""
    from mythos_dist.data.remote import STORES

    path = _shard_cache(config)
    total, limit = sum(shard.entry["raw_data"]["bytes"] for shard in shards), config.data.cache_bytes
    kept = sum(folder_bytes(path / STORES / name) for name in {shard.fingerprint[:16] for shard in shards})
    missing, free = max(0, min(total, limit or total) - kept), machine.free_bytes(path)
    text = f"shards of stores: {gigabytes(total)}, of which {path} has {gigabytes(kept)}; {gigabytes(free)} free there"
    if missing <= free:
        return ok(text, topic="data.cache")
    return problem(
        text, "set data.cache_limit to less than that, or data.cache to a folder with more room", "data.cache"
    )


def config_checks(config: Config) -> tuple[Check, ...]:
    """The checks by the settings that they are about."""
    return (
        Check("train.dtype", check_dtype),
        Check("experts.backend", check_experts),
        Check("train.attention", check_attention),
        Check("train.compile", check_compiler),
        Check("layout", check_layout),
        Check("run.dir", check_run_dir, "set another run.dir"),
        Check("checkpoint", check_checkpoints),
        Check("data.path" if config.data.mix is None else "data.mix", check_data, "make shards with `mythos shards`"),
    )
