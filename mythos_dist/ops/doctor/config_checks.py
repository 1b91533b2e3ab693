"""Checks of what a config would use on this machine: dtype, kernels, folders, shards.

What training itself checks at its start is called here; its refusals (UserError) become problems.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mythos_dist.config.schema import Config
from mythos_dist.data.remote import STORES
from mythos_dist.data.sequences import num_sequences
from mythos_dist.data.shard import Shard
from mythos_dist.files import existing_folder
from mythos_dist.gpu_packages import INSTALL
from mythos_dist.model.parameter_table import checkpoint_bytes, count_parameters
from mythos_dist.ops.doctor.findings import Check, Finding, gigabytes, note, ok, problem
from mythos_dist.ops.doctor.machine import Machine
from mythos_dist.parallel import process
from mythos_dist.private import default_shard_cache
from mythos_dist.train import checks
from mythos_dist.train.run_folder import check_run_folder
from mythos_dist.units import count

# F.grouped_mm gives the right values everywhere, but it is one kernel per product only for bf16 on these major compute
# capabilities (torch, aten/src/ATen/native/cuda/GroupedBlas.cpp). Elsewhere it copies the experts' row counts to the
# CPU, waits for them, and runs one product per expert.
ONE_KERNEL = (9, 10)
HALF = (8, 0)  # lowest compute capability with bf16 units, which flash-attn and grouped_gemm need


def check_dtype_on_gpus(machine: Machine, config: Config) -> Iterator[Finding]:
    dtype = config.train.dtype
    process.choose_accelerator()
    process.check_dtype(dtype)
    if dtype == "bf16" and machine.torch.gpus and machine.capability < HALF:
        text = "train.dtype=bf16: GPUs below compute capability 8.0 have no bf16 units, torch would emulate them"
        yield problem(text, "set train.dtype=fp16 or fp32")
    elif dtype == "fp32" and machine.capability >= HALF:
        text = "train.dtype=fp32 does not use the tensor cores of these GPUs, nor flash-attn and MegaBlocks"
        yield note(text, "set train.dtype=bf16, unless you compare values")
    else:
        yield ok(f"train.dtype={dtype} runs on {'these GPUs' if machine.torch.gpus else 'the CPU'}")


def check_expert_kernels(machine: Machine, config: Config) -> Iterator[Finding]:
    checks.check_experts(config)
    backend, dtype, (major, minor) = config.experts.backend, config.train.dtype, machine.capability
    if backend == "reference":
        text = "experts.backend=reference -> one expert after the other, for tests"
        yield note(text, "set experts.backend=grouped")
    elif backend == "grouped" and machine.torch.gpus and (dtype != "bf16" or major not in ONE_KERNEL):
        text = f"experts.backend=grouped -> F.grouped_mm, in {dtype} on compute capability {major}.{minor}"
        remedy = "set train.dtype=bf16"
        if major not in ONE_KERNEL:
            # grouped_gemm is such a loop too, unless it was built with CUTLASS, the default on 8.x.
            cutlass = "" if major == HALF[0] else "GROUPED_GEMM_CUTLASS=1 "
            remedy = f"compare with experts.backend=megablocks (bf16, from 8.0 on) after {cutlass}{INSTALL}"
        yield note(f"{text} a loop over experts that synchronizes with the GPU", remedy)
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


def check_run_dir(machine: Machine, config: Config) -> Iterator[Finding]:
    check_run_folder(config)
    yield ok(f"{config.run.dir} can be used")


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
    soon, in_all = (max(number * size - present, size) for number in (kept, kept + pinned + waiting))
    text = f"{count_parameters(config.model):,} parameters: {gigabytes(size)} per checkpoint; keep + 1 = {kept}"
    text += f" and {pinned} pinned" if pinned else ""
    text += f" and up to {waiting} that wait for their upload" if waiting else ""
    text += f" need {gigabytes(in_all)} more, {gigabytes(free)} free in {existing_folder(path)}"
    remedy = f"set a run.dir with {gigabytes(in_all)} free, or lower checkpoint.keep, pin, pin_every or remote_backlog"
    yield ok(text) if free >= in_all else (note if free >= soon else problem)(text, remedy)
    available = machine.memory[1]
    if settings.background and size > available * machine.node_count:
        text = f"copies {gigabytes(size)} into the memory of all nodes together, {gigabytes(available)} available here"
        remedy = f"use at least {-(-size // max(available, 1)):,} such nodes, or set checkpoint.background=false"
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
    cache, limit = Path(config.data.cache or default_shard_cache()), config.data.cache_bytes
    if remote := [shard for shard in shards if shard.url]:
        yield _check_room(machine, "shards of stores", remote, cache / STORES, math.inf if limit is None else limit)
    if compressed := [shard for shard in shards if shard.entry["zip_data"] and not shard.url]:
        yield _check_room(machine, "unpacked shards", compressed, cache, math.inf)


def _check_room(machine: Machine, what: str, shards: Sequence[Shard], folder: Path, limit: float) -> Finding:
    """Room for the content of shards, or `limit` bytes of it, of which a cache may have a part already."""
    total = sum(shard.entry["raw_data"]["bytes"] for shard in shards)
    present = folder_bytes(*(folder / name for name in {shard.fingerprint[:16] for shard in shards}))
    missing, free = max(0, min(total, limit) - present), machine.free_bytes(folder)
    text = f"{what} in {folder} need {gigabytes(missing)} more, {gigabytes(free)} free"
    remedy = "set data.cache to a folder with more room on every node; for stores, or a smaller data.cache_limit"
    return problem(text, remedy, "data.cache") if missing > free else ok(text, topic="data.cache")


def config_checks(config: Config) -> tuple[Check, ...]:
    """The checks by the settings that they are about."""
    return (
        Check("train.dtype", check_dtype_on_gpus),
        Check("experts.backend", check_expert_kernels),
        Check("train.attention", check_attention_kernel),
        Check("train.compile", lambda machine, config: checks.check_compiler(config)),
        Check("run.dir", check_run_dir, "set another run.dir"),
        Check("checkpoint", check_checkpoints),
        Check("data.path" if config.data.mix is None else "data.mix", check_data, "make shards with `mythos shards`"),
    )
