"""Read shards from a store, as training does and with StreamingDataset: time to the first batch, waits, bytes.

    python benchmarks/remote_shards.py s3://bucket/shards --step-seconds 0.5 --batch 256

Each side runs in a process of its own, with an empty cache. After each batch it sleeps as long as a step would compute.
`local` reads a copy of the shards from a disk, if there is one: the time that reading takes without a store.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mythos_dist.errors import run_command

SIDES = ("ours", "streaming", "local")


def main() -> None:
    """Parse the command line, run all sides, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("url", help="a folder of shards with manifest.json in a store")
    add("--local", help="the same folder on a disk")
    add("--batch", type=int, default=256, help="sequences per step (default: %(default)s)")
    add("--steps", type=int, default=100, help="(default: %(default)s)")
    add("--step-seconds", type=float, default=0.2, help="seconds that a step computes (default: %(default)s)")
    add("--block", type=int, help="sequences of a shuffle block (default: as training)")
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    add("--cache", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments)), flush=True)
        os._exit(0)  # downloads may be in progress
    print(f"{'':10} first batch   waits after step 3   longest    cache")
    for side in SIDES if arguments.local else SIDES[:2]:
        result = run_side(side)
        print(
            f"{side:10} {result['first']:9.2f} s   {result['waits']:7.2f} s {100 * result['share']:6.2f} %   "
            f"{result['longest']:5.2f} s   {result['cache'] / 1e6:.1f} MB",
            flush=True,
        )


def run_side(side: str) -> dict[str, float]:
    """The result of a side, in a process of its own with an empty cache."""
    import subprocess

    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, *sys.argv, "--side", side, "--cache", cache]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        size = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
        return json.loads(lines[-1]) | {"cache": size}


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of one side: from its start, without imports, to the first batch; waits of the steps after step 3."""
    sides = {"ours": read_ours, "local": read_ours, "streaming": read_streaming}
    batches = sides[arguments.side](arguments)
    next(batches)  # imports are done
    waits, began = [], time.perf_counter()
    for _ in range(arguments.steps):
        asked = time.perf_counter()
        if next(batches, None) is None:
            break
        waits.append(time.perf_counter() - asked)
        time.sleep(arguments.step_seconds)
    total, late = time.perf_counter() - began, waits[3:]
    return {"first": waits[0], "waits": sum(late), "share": sum(late) / total, "longest": max(late)}


def read_ours(arguments: argparse.Namespace) -> Iterator[Any]:
    """None when all is imported, then the batches; opening the folder is part of the first one."""
    from mythos_dist.data import order
    from mythos_dist.data.corpora import open_corpora
    from mythos_dist.data.lookahead import Lookahead
    from mythos_dist.data.manifest import read_shard_manifest
    from mythos_dist.data.prefetch import Prefetcher
    from mythos_dist.data.remote import read_manifest
    from mythos_dist.data.shard_cache import ShardCache
    from mythos_dist.data.stream import ReplicaStream

    yield None
    order.SHUFFLE_BLOCK = arguments.block or order.SHUFFLE_BLOCK
    is_local = arguments.side == "local"
    name, batch = arguments.local if is_local else arguments.url, arguments.batch
    manifest = read_shard_manifest(name) if is_local else read_manifest(name)
    shape: dict[str, Any] = {"seq_len": manifest.seq_len, "vocab_size": manifest.vocab_size}
    corpora = open_corpora({name: 1}, **shape, splits=["train"], cache=arguments.cache)
    cache = ShardCache(Path(arguments.cache))
    rest: dict[str, Any] = dict(global_batch=batch, micro_batch=batch, replica=0, num_replicas=1, seed=0, cache=cache)
    stream, plan = (ReplicaStream(corpora, "train", **shape, **rest) for _ in range(2))
    positions = (np.arange(i * batch, (i + 1) * batch) for i in range(arguments.steps))
    needs = ((i, plan.shards_of(of_step, [0])) for i, of_step in enumerate(positions))
    prefetcher = (
        None if is_local else Prefetcher(cache, Lookahead(needs, cache.key, len(corpora[0].shards["train"])), 8)
    )
    for i in range(arguments.steps):
        if prefetcher:
            prefetcher.advance(i)
        yield stream.step(i)


def read_streaming(arguments: argparse.Namespace) -> Iterator[Any]:
    """As `read_ours`; it downloads the shards of the next 8 batches, and shuffles with the block that is given."""
    from streaming import StreamingDataset

    yield None
    data = StreamingDataset(
        remote=arguments.url + "/train",
        local=arguments.cache,
        batch_size=arguments.batch,
        predownload=8 * arguments.batch,
        shuffle=True,
        shuffle_seed=0,
        num_canonical_nodes=1,
        shuffle_block_size=arguments.block or 1 << 18,
    )
    samples = iter(data)
    for _ in range(arguments.steps):
        yield np.stack([next(samples)["tokens"] for _ in range(arguments.batch)])


if __name__ == "__main__":
    run_command(main)
