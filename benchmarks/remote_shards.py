"""Read shards from a store, as training does and with StreamingDataset: first batch, waits, requests, bytes.

    python benchmarks/remote_shards.py                       # a store on this machine: 200 ms, 20 MB/s per connection
    python benchmarks/remote_shards.py s3://bucket/shards --step-seconds 0.5 --batch 256

Each side runs in a process of its own, with an empty cache; `--workers` loader processes read ahead, as in training
with `data.workers`. After each batch it sleeps as long as a step would compute. `waits` is the time between a batch's
request and its arrival; `of which CPU` is work of the process that asks. `local` reads a copy of the shards from a
disk: what the other sides wait longer than it is due to the store.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mythos_dist.errors import run_command

SIDES = ("ours", "streaming", "local")
SHARDS, WINDOWS, SEQ_LEN, VOCAB_SIZE = 40, 1000, 2048, 1 << 16  # of the store on this machine


def main() -> None:
    """Parse the command line, run all sides, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("url", nargs="?", help="a folder of shards with manifest.json in a store (default: one on this machine)")
    add("--local", help="the same folder on a disk")
    add("--seq-len", type=int, default=SEQ_LEN, help="of the shards (default: %(default)s)")
    add("--vocab-size", type=int, default=VOCAB_SIZE, help="of the shards, or more (default: %(default)s)")
    add("--batch", type=int, default=256, help="sequences per step (default: %(default)s)")
    add("--workers", type=int, default=1, help="loader processes (default: %(default)s)")
    add("--steps", type=int, default=100, help="(default: %(default)s)")
    add("--step-seconds", type=float, default=0.2, help="seconds that a step computes (default: %(default)s)")
    add("--block", type=int, help="sequences of a shuffle block (default: as training)")
    add("--latency", type=float, default=0.2, help="of the store on this machine, seconds (default: %(default)s)")
    add("--rate", type=float, default=20, help="of each of its connections, MB/s (default: %(default)s)")
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    add("--cache", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments)), flush=True)
        os._exit(0)  # downloads may be in progress
    if arguments.url:
        compare([*sys.argv], arguments.local is not None, lambda: "")
        return
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), arguments.latency, arguments.rate) as requests:
        given = ["s3://benchmark/data", "--local", folder, "--block", str(4 * WINDOWS), "--step-seconds", "0.1"]
        compare([sys.argv[0], *given, *sys.argv[1:]], True, requests)


def compare(command: list[str], has_local: bool, requests: Callable[[], str]) -> None:
    """Run each side and print a line of the table. `requests`: what a side has requested, since the last call."""
    print(f"{'':10} first batch   waits after step 3   of which CPU   longest      cache  requests")
    for side in SIDES if has_local else SIDES[:2]:
        result = run_side(command, side)
        print(
            f"{side:10} {result['first']:9.2f} s   {result['waits']:7.2f} s {100 * result['share']:6.2f} %   "
            f"{100 * result['cpu']:10.2f} %   {result['longest']:5.2f} s   {result['cache'] / 1e6:5.1f} MB  "
            f"{requests()}",
            flush=True,
        )


@contextlib.contextmanager
def serving(folder: Path, latency: float, rate: float) -> Iterator[Callable[[], str]]:
    """Write shards to `folder`, and serve them from s3://benchmark/data by a process of its own."""
    import multiprocessing

    write_shards(folder)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(theirs, folder, latency, rate), daemon=True
    )
    server.start()
    os.environ.update(ours.recv())

    def requests() -> str:
        ours.send("requests")
        return ours.recv()

    try:
        yield requests
    finally:
        server.kill()


def serve(connection: Any, folder: Path, latency: float, rate: float) -> None:
    """The S3 server of the tests, package moto, behind their proxy."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    with importlib.import_module("helpers.s3").serving_s3() as store:
        store.upload(folder, "benchmark")
        store.proxy.latency, store.proxy.bytes_per_second = latency, rate * 1e6
        connection.send(store.env)
        while True:
            connection.recv()
            methods = Counter(method for method, _ in store.proxy.log)
            store.proxy.log.clear()
            connection.send(", ".join(f"{number} {method}" for method, number in methods.most_common()) or "none")


def write_shards(folder: Path) -> None:
    """SHARDS files of random tokens, 4 MB each, with the index, tokenizer and manifest of a conversion."""
    from mythos_dist.data.manifest import (
        EMPTY_INDEX,
        FORMAT_VERSION,
        DocumentCounts,
        Filters,
        ShardManifest,
        SplitCounts,
        index_fingerprint,
    )
    from mythos_dist.prepare.mds import ShardWriter

    (folder / "heldout").mkdir(parents=True)
    (folder / "heldout" / "index.json").write_text(EMPTY_INDEX)
    (folder / "tokenizer.model").write_bytes(b"benchmark")
    shards, draw = [], np.random.RandomState(0)
    for number in range(SHARDS):
        name = f"part-{number:05}"
        writer = ShardWriter(folder / "train" / name, SEQ_LEN, "uint16", None, f"{name}/")
        writer.add(draw.randint(3, VOCAB_SIZE, WINDOWS * (SEQ_LEN + 1)).astype(np.uint16))
        writer.finish()
        shards += writer.shards
    (folder / "train" / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    windows = SHARDS * WINDOWS
    tokens = windows * (SEQ_LEN + 1)
    manifest = ShardManifest(
        format_version=FORMAT_VERSION,
        seq_len=SEQ_LEN,
        dtype="uint16",
        vocab_size=VOCAB_SIZE,
        eos="</s>",
        eos_id=2,
        tokenizer="tokenizer.model",
        tokenizer_sha256=hashlib.sha256(b"benchmark").hexdigest(),
        heldout=0.0,
        compression=None,
        text_column="text",
        sample_by="document",
        filters=Filters(),
        inputs=(),
        documents=DocumentCounts(),
        splits={"train": SplitCounts(0, tokens, windows, tokens, 0, 0), "heldout": SplitCounts(0, 0, 0, 0, 0, 0)},
        fingerprint=index_fingerprint(folder),
    )
    (folder / "manifest.json").write_text(json.dumps(manifest.to_json()))


def run_side(command: list[str], side: str) -> dict[str, float]:
    """The result of a side, in a process of its own with an empty cache."""
    import subprocess

    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, *command, "--side", side, "--cache", cache]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        size = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
        return json.loads(lines[-1]) | {"cache": size}


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of one side: from its start, without imports, to the first batch; waits of the steps after step 3."""
    sides = {"ours": read_ours, "local": read_ours, "streaming": read_streaming}
    batches = sides[arguments.side](arguments)
    next(batches)  # imports are done
    waits, cpu, began = [], [], time.perf_counter()
    for _ in range(arguments.steps):
        asked, worked = time.perf_counter(), time.thread_time()
        if next(batches, None) is None:
            break
        waits.append(time.perf_counter() - asked)
        cpu.append(time.thread_time() - worked)
        time.sleep(arguments.step_seconds)
    total, late = time.perf_counter() - began, waits[3:]
    shares = {"share": sum(late) / total, "cpu": sum(cpu[3:]) / total}
    return {"first": waits[0], "waits": sum(late), "longest": max(late), **shares}


def read_ours(arguments: argparse.Namespace) -> Iterator[Any]:
    """None when all is imported, then the batches; opening the folder is part of the first one."""
    from mythos_dist.data import order
    from mythos_dist.data.corpora import open_corpora
    from mythos_dist.data.lookahead import Lookahead
    from mythos_dist.data.prefetch import Prefetcher
    from mythos_dist.data.shard_cache import ShardCache
    from mythos_dist.data.stream import ReplicaStream

    for name in ("botocore.session", "pydantic"):  # imported when they are first used; streaming imports them at once
        importlib.import_module(name)
    yield None
    order.SHUFFLE_BLOCK = arguments.block or order.SHUFFLE_BLOCK
    is_local = arguments.side == "local"
    name, batch = arguments.local if is_local else arguments.url, arguments.batch
    shape: dict[str, Any] = {"seq_len": arguments.seq_len, "vocab_size": arguments.vocab_size}
    corpora = open_corpora({name: 1}, **shape, splits=["train"], cache=arguments.cache)
    cache = ShardCache(Path(arguments.cache))
    rest: dict[str, Any] = dict(global_batch=batch, micro_batch=batch, replica=0, num_replicas=1, seed=0, cache=cache)
    rest |= {"workers": arguments.workers}
    stream, plan = (ReplicaStream(corpora, "train", **shape, **rest) for _ in range(2))
    positions = (np.arange(i * batch, (i + 1) * batch) for i in range(arguments.steps))
    needs = ((i, plan.shards_of(of_step, [0])) for i, of_step in enumerate(positions))
    prefetcher = (
        None if is_local else Prefetcher(cache, Lookahead(needs, cache.key, len(corpora[0].shards["train"])), 8)
    )
    steps = stream.steps(0)
    for i in range(arguments.steps):
        if prefetcher:
            prefetcher.advance(i)
        yield next(steps)


def read_streaming(arguments: argparse.Namespace) -> Iterator[Any]:
    """As `read_ours`; it downloads the shards of the next 8 batches, and shuffles with the block that is given."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

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
    yield from islice(DataLoader(data, arguments.batch, num_workers=arguments.workers), arguments.steps)


if __name__ == "__main__":
    run_command(main)
