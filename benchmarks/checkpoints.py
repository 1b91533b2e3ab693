"""Saving, loading and rewriting checkpoints, against plain files of the same size on this machine's file system.

Each round first writes and reads plain files of the same sizes (`fsync`ed; dropped from the page cache before they are
read), then saves, loads and rewrites a checkpoint, so that a drift of the disk's speed affects both. Two ranks on one
machine, ZeRO-1, a model of about 100 M parameters; medians of all rounds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mythos_dist.train.engine import Engine

ROOT = Path(__file__).parents[1]
MODEL = "model.dim=768 model.n_heads=12 model.vocab_size=16384 model.n_experts=32 model.expert_dim=768"
BLOCK = 16 << 20


def main() -> None:
    """Start the ranks and print the table; under a launcher, run as one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: a temporary folder")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments.rounds, Path(os.environ["BENCH_FOLDER"]))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__]
        environment = {**os.environ, "BENCH_FOLDER": folder, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        code = subprocess.run([*command, "--rounds", str(arguments.rounds)], env=environment).returncode
        if code:
            sys.exit(code)
        report(json.loads((Path(folder) / "times.json").read_text()))


def measure(rounds: int, folder: Path) -> None:
    """On each rank: all rounds; rank 0 writes the seconds to times.json."""
    import torch.distributed as dist

    from mythos_dist.checkpoint.fence import Fence
    from mythos_dist.checkpoint.manifest import Lineage
    from mythos_dist.checkpoint.save import Saver
    from mythos_dist.config.load import load_config
    from mythos_dist.parallel.mesh import build_mesh
    from mythos_dist.parallel.process import join_process_group
    from mythos_dist.train.engine import Engine
    from mythos_dist.train.run_checkpoints import manifest_of

    join_process_group()
    settings = [*MODEL.split(), "data.path=none", "train.global_batch=2", "checkpoint.keep=1"]
    config = load_config(ROOT / "configs" / "tiny_cpu.yaml", settings)
    engine = Engine(config, build_mesh(config.parallel))
    rank, fence = dist.get_rank(), Fence(folder, 1)
    checkpoints = folder / "checkpoints"
    savers = {
        background: Saver(checkpoints, replace(config.checkpoint, background=background), fence, engine.local_shards)
        for background in (False, True)
    }
    fill_with_noise(engine)
    mine = sum(
        4 * value.numel() for held in engine.local_shards.values() if held.writes for value in held.values.values()
    )
    times: dict[str, list[float]] = {}

    def timed(what: str, work: Any) -> None:
        dist.barrier()
        begin = time.perf_counter()
        work()
        dist.barrier()
        times.setdefault(what, []).append(time.perf_counter() - begin)

    def save(background: bool, step: int) -> None:
        savers[background].save(manifest_of(config, step, fence, "", engine, Lineage()))

    plain = folder / f"plain-{rank}"
    savers[True].finish()  # allocates its buffers
    for i in range(rounds):
        timed("plain write", lambda: write_plain(plain, mine))
        timed("save", lambda i=i: save(False, 2 * i + 1))
        timed("stall", lambda i=i: save(True, 2 * i + 2))
        timed("rest", savers[True].finish)
        drop(plain)
        timed("plain read", lambda: read_plain(plain))
        drop_shards(checkpoints)
        timed("load", lambda: load_newest(checkpoints, engine))
        dist.barrier()
        if rank == 0:
            times.setdefault("rewrite", []).append(rewrite_seconds(checkpoints, folder / "copy", mine))
        dist.barrier()
    if rank == 0:
        total = sum(file.stat().st_size for file in checkpoints.glob("step-*/*.safetensors"))
        (folder / "times.json").write_text(json.dumps({"bytes": total, **times}))
    dist.destroy_process_group()


def load_newest(checkpoints: Path, engine: "Engine") -> None:
    """Load the newest checkpoint."""
    from mythos_dist.checkpoint.restore import find_checkpoint, load_state

    checkpoint, _ = find_checkpoint(checkpoints, engine.config.checkpoint)
    assert checkpoint
    load_state(checkpoint, engine.local_shards)


def fill_with_noise(engine: "Engine") -> None:
    """Replace weights and moments by noise, because a disk may compress zeros."""
    for held in engine.local_shards.values():
        for value in held.values.values():
            value.normal_()


def drop_shards(checkpoints: Path) -> None:
    """Remove the files of the checkpoints from the page cache."""
    for file in checkpoints.glob("step-*/*.safetensors"):
        drop(file)


def rewrite_seconds(checkpoints: Path, copy: Path, file_bytes: int) -> float:
    """Seconds to rewrite the checkpoint for one rank: one process, two files at a time."""
    from mythos_dist.checkpoint.canonical import write_canonical
    from mythos_dist.checkpoint.restore import open_checkpoint

    drop_shards(checkpoints)
    begin = time.perf_counter()
    write_canonical(open_checkpoint(checkpoints), copy, workers=2, file_bytes=file_bytes)
    seconds = time.perf_counter() - begin
    shutil.rmtree(copy)
    return seconds


def write_plain(file: Path, size: int) -> None:
    """Write `size` random bytes and fsync."""
    block = os.urandom(BLOCK)
    with open(file, "wb", buffering=0) as stream:
        for start in range(0, size, BLOCK):
            stream.write(block[: min(BLOCK, size - start)])
        os.fsync(stream.fileno())


def read_plain(file: Path) -> None:
    """Read a file."""
    block = bytearray(BLOCK)
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(block):
            pass


def drop(file: Path) -> None:
    """Drop a file from the page cache."""
    handle = os.open(file, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def report(results: dict[str, Any]) -> None:
    """Medians, and ratios against their targets."""
    size = results.pop("bytes")
    seconds = {what: statistics.median(some) for what, some in results.items()}
    print(f"a checkpoint of {size / 1e9:.2f} GB, two ranks")
    for what, some in seconds.items():
        print(f"{what:12} {some:6.2f} s  {size / some / 1e9:5.2f} GB/s")
    rounds = [dict(zip(results, some, strict=True)) for some in zip(*results.values(), strict=True)]

    def ratio(of: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(map(of, rounds))

    print(f"saving:    {ratio(lambda at: at['plain write'] / at['save']):.2f} x the speed of plain files (target: 0.7)")
    print(f"loading:   {ratio(lambda at: at['plain read'] / at['load']):.2f} x (target: 0.7)")
    print(f"stall:     {ratio(lambda at: at['stall'] / at['save']):.1%} of a save that waits (target: 15 %)")
    rewriting = ratio(lambda at: at["rewrite"] / (at["plain write"] + at["plain read"]))
    print(f"rewriting: {rewriting:.2f} x reading and writing the bytes (target: 2)")


if __name__ == "__main__":
    main()
