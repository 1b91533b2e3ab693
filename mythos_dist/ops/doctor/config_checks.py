"""Checks of what a config would use on this machine: dtype, kernels, ranks, folders.

What training itself checks at its start is called here; its refusals (UserError) become problems.
"""

import contextlib
import fcntl
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from mythos_dist.config.layout import layout_problems
from mythos_dist.config.schema import Config
from mythos_dist.data.remote import STORES
from mythos_dist.data.sequences import num_sequences
from mythos_dist.data.shard import Shard
from mythos_dist.errors import UserError
from mythos_dist.files import existing_folder
from mythos_dist.gpu_packages import INSTALL
from mythos_dist.model.parameter_table import checkpoint_bytes, count_parameters
from mythos_dist.ops.doctor.findings import Check, Finding, gigabytes, note, ok, problem
from mythos_dist.ops.doctor.machine import Machine
from mythos_dist.ops.doctor.machine_checks import HALF
from mythos_dist.parallel import process
from mythos_dist.parallel.launcher import read_number
from mythos_dist.private import default_shard_cache, why_untrusted
from mythos_dist.train import checks
from mythos_dist.train.run_folder import check_run_folder
from mythos_dist.units import count


def check_dtype_on_gpus(machine: Machine, config: Config) -> Iterator[Finding]:
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


def check_expert_kernels(machine: Machine, config: Config) -> Iterator[Finding]:
    checks.check_experts(config)
    backend, dtype = config.experts.backend, config.train.dtype
    if backend == "reference":
        text = "experts.backend=reference -> one expert after the other, for tests"
        yield note(text, "set experts.backend=grouped")
    elif backend == "grouped" and machine.gpus and dtype != "bf16":
        text = f"experts.backend=grouped -> F.grouped_mm, in {dtype} a loop over experts: its kernel is for bf16"
        yield note(text, "set train.dtype=bf16")
    else:
        yield ok(f"experts.backend={backend} -> {'F.grouped_mm' if backend == 'grouped' else 'MegaBlocks'}")


def check_attention_kernel(machine: Machine, config: Config) -> Iterator[Finding]:
    kernel, missing = checks.choose_attention(config), machine.unavailable["flash_attn"]
    text = f"train.attention={config.train.attention} -> {kernel}"
    half = config.train.dtype != "fp32" and machine.capability >= HALF
    if config.train.attention == "auto" and kernel == "sdpa" and half and missing:
        yield note(f"{text}: {missing}", f"{INSTALL}; sdpa gives the same values, more slowly")
    else:
        yield ok(text)


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


def check_folder(path: Path, setting: str, locks: bool = False) -> Finding:
    """Whether files can be written in a folder, and locked, or in the one where it would be created. Leaves none."""
    existing = existing_folder(path)
    where = f"{path}" if path == existing else f"{path} (to be created in {existing})"
    try:
        file = tempfile.TemporaryFile(dir=existing)  # noqa: SIM115 - closed below
    except OSError as error:
        remedy = f"set another {setting}, or get permission to write there"
        return problem(f"{where} is not writable: {error.strerror}", remedy, setting)
    with file:
        try:
            if locks:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            text = f"files in {where} cannot be locked ({error.strerror}), and a run locks its folder"
            return problem(text, "use another file system, or mount this one with locks (Lustre: -o flock)", setting)
    return ok(f"{where} can be {'written and locked' if locks else 'written'}", topic=setting)


def check_run_dir(machine: Machine, config: Config) -> Iterator[Finding]:
    yield check_folder(Path(config.run.dir), "run.dir", locks=True)
    check_run_folder(config)


def folder_bytes(*folders: Path) -> int:
    """Bytes of all files in folders, which need not exist."""
    total = 0
    for above, _, names in (entry for folder in folders for entry in os.walk(folder)):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a running job renames its files
                total += os.lstat(Path(above, name)).st_size
    return total


def check_checkpoints(machine: Machine, config: Config) -> Iterator[Finding]:
    """Room on disk, where `checkpoint.keep` + 1 exist while the newest is written, and `checkpoint.remote_backlog` more
    while the store is down, and in memory for a copy."""
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
        yield problem(text, f"set a run.dir with {gigabytes(needed)} free, or keep fewer (checkpoint.keep)")
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
    descriptions, shards = [], list[Shard]()
    for corpus in checks.open_data(config):
        splits, length, S = corpus.manifest.splits, corpus.manifest.seq_len, config.train.seq_len
        heldout = "" if splits["heldout"].windows else ", no held-out split"
        cut = "" if length == S else f" ({count(num_sequences(corpus.manifest, 'train', S), 'sequence')} of {S})"
        windows = count(splits["train"].windows, "window")
        descriptions.append(f"{corpus.name}: {windows} of {length} tokens{cut}{heldout}")
        shards += [shard for split in corpus.shards.values() for shard in split]
    yield ok(", ".join(descriptions))
    cache = Path(config.data.cache) if config.data.cache else default_shard_cache()
    if remote := [shard for shard in shards if shard.url]:
        what, limit = f"the shards of stores in {cache} need", config.data.cache_bytes
        remedy = "set data.cache_limit to less than that, or data.cache to a folder with more room"
        yield _check_room(machine, what, remote, cache / STORES, remedy, math.inf if limit is None else limit)
    if compressed := [shard for shard in shards if shard.entry["zip_data"] and not shard.url]:
        if foreign := "" if config.data.cache else why_untrusted(cache):  # as in data/windows.py
            yield problem(foreign, "check its content, remove it, or set data.cache to a folder of yours", "data.cache")
        else:
            yield check_folder(cache, "data.cache")
        what = f"unpacking all compressed shards to {cache} needs"
        yield _check_room(machine, what, compressed, cache, "set data.cache to a folder with more room, on every node")


def _check_room(
    machine: Machine, what: str, shards: Sequence[Shard], folder: Path, remedy: str, limit: float = math.inf
) -> Finding:
    """Room for the content of shards, or `limit` bytes of it, of which a cache may have a part already."""
    total = sum(shard.entry["raw_data"]["bytes"] for shard in shards)
    present = folder_bytes(*(folder / name for name in {shard.fingerprint[:16] for shard in shards}))
    missing, free = max(0, min(total, limit) - present), machine.free_bytes(folder)
    text = f"{what} {gigabytes(missing)} more, {gigabytes(free)} free"
    return problem(text, remedy, "data.cache") if missing > free else ok(text, topic="data.cache")


def config_checks(config: Config) -> tuple[Check, ...]:
    """The checks by the settings that they are about."""
    return (
        Check("train.dtype", check_dtype_on_gpus),
        Check("experts.backend", check_expert_kernels),
        Check("train.attention", check_attention_kernel),
        Check("train.compile", lambda machine, config: checks.check_compiler(config)),
        Check("layout", check_layout),
        Check("run.dir", check_run_dir, "set another run.dir"),
        Check("checkpoint", check_checkpoints),
        Check("data.path" if config.data.mix is None else "data.mix", check_data, "make shards with `mythos shards`"),
    )
