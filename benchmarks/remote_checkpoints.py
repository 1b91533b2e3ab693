"""Checkpoints of about 0.94 GB to a store: seconds of an upload, its cost to the step, and how fast a run is restored.

    python benchmarks/remote_checkpoints.py                          # moto's server on this machine
    python benchmarks/remote_checkpoints.py --remote s3://bucket/x   # a store

Runs of one rank and one thread with and without `checkpoint.remote` alternate; every 20 steps they save. Steps of the
same numbers are compared: those after the first checkpoint, in which an upload is in progress. Then the run's folder is
removed, and the run is restored from the store; the bytes are transferred alone before and after, with boto3. With a
server on this machine, which takes CPU time of the same cores, run it with at least three cores; the CPU seconds of the
runs' own processes say what uploads take from the step wherever the server is. The defaults take half an hour.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mythos_dist.checkpoint import range_plan
from mythos_dist.errors import run_command
from mythos_dist.store import upload
from mythos_dist.store.folder import THREADS as READ_THREADS

ROOT = Path(__file__).parents[1]
MODEL = "model.dim=768 model.n_heads=12 model.vocab_size=16384 model.n_experts=32 model.expert_dim=768"
EVERY = 20


def main() -> None:
    """Parse the command line, run the rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--remote", help="a new folder in a store (default: a server on this machine)")
    add("--rounds", type=int, default=3, help="(default: %(default)s)")
    add("--steps", type=int, default=60, help="of a run (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        if not arguments.remote:
            stack.enter_context(serving(folder))
        remote = arguments.remote or "s3://bench/runs"
        command = [sys.executable, "tools/make_sample_data.py", "--out", str(folder / "data"), "--seq-len", "256"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        report(measure(folder, remote, arguments.rounds, arguments.steps))


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[None]:
    """An S3 server with a bucket, which runs only while a core is idle: a real one takes no CPU time here.

    moto reads the whole object to answer a request for a part of it, so its seconds say how many requests there were.
    Of two faster servers, rclone's does not keep the metadata of large objects, and s3rver lists no unfinished uploads.
    """
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{address}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(["chrt", "--idle", "0", *command], stdout=log, stderr=log)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.1)
        boto3.client("s3").create_bucket(Bucket="bench")
        yield
    finally:
        server.terminate()
        server.wait()


def measure(folder: Path, remote: str, rounds: int, steps: int) -> dict[str, Any]:
    """All rounds: step seconds of both sides, uploads, and seconds of restoring and of raw transfers."""
    results: dict[str, Any] = defaultdict(list)
    for i in range(rounds):
        alone, copied, url = folder / f"alone-{i}", folder / f"copied-{i}", f"{remote}/{i}"
        results["cpu alone"].append(train(folder, alone, steps))
        results["cpu uploading"].append(train(folder, copied, steps, f"checkpoint.remote={url}"))
        results["alone"] += step_seconds(alone)
        results["uploading"] += step_seconds(copied)
        results["uploads"] += [upload for line in read(copied / "metrics.jsonl") for upload in line.get("uploads", ())]
        checkpoint = max((copied / "checkpoints").glob("step-*"))
        results["put"].append(raw_put(checkpoint, f"{remote}/raw-{i}"))
        results["get"].append(raw_get(checkpoint, f"{url}/checkpoints/{checkpoint.name}"))
        shutil.rmtree(copied)
        train(folder, copied, steps + 1, f"checkpoint.remote={url}", "checkpoint.remote_wait=1")
        results["restore"].append(read(copied / "restarts.jsonl")[-1]["startup_seconds"]["loading"])
        results["get"].append(raw_get(alone / "checkpoints" / checkpoint.name, f"{url}/checkpoints/{checkpoint.name}"))
        results["bytes"] = sum(file.stat().st_size for file in (alone / "checkpoints" / checkpoint.name).iterdir())
        shutil.rmtree(copied)
        shutil.rmtree(alone)
    return results


def train(folder: Path, run_dir: Path, steps: int, *overrides: str) -> float:
    """A run on one rank with one thread; returns the CPU seconds of its processes."""
    settings = [*MODEL.split(), f"data.path={folder / 'data'}", f"run.dir={run_dir}", f"train.steps={steps}"]
    settings += [f"checkpoint.every={EVERY}", "checkpoint.keep=1", "train.global_batch=2", "train.eval_samples=2"]
    settings += ["run.peak_tflops=1", "optim.warmup_steps=2", *overrides]
    command = [sys.executable, "-m", "mythos_dist.train", "configs/tiny_cpu.yaml", *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = cpu_seconds_of_children()
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    if result.returncode:
        sys.exit(result.returncode)
    return cpu_seconds_of_children() - before


def cpu_seconds_of_children() -> float:
    """Of those that have ended; the server has not."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def step_seconds(run_dir: Path) -> list[float]:
    """Of the steps after the first checkpoint."""
    return [line["step_seconds"] for line in read(run_dir / "metrics.jsonl") if line["step"] > EVERY]


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def raw_put(checkpoint: Path, url: str) -> float:
    """Seconds in which boto3 alone uploads a checkpoint's files."""
    import boto3
    from boto3.s3.transfer import TransferConfig

    bucket, _, key = url.removeprefix("s3://").partition("/")
    client, config = (
        boto3.client("s3"),
        TransferConfig(multipart_chunksize=upload.PART_BYTES, max_concurrency=upload.THREADS),
    )
    begin = time.perf_counter()
    for file in checkpoint.iterdir():
        client.upload_file(str(file), bucket, f"{key}/{file.name}", Config=config)
    return time.perf_counter() - begin


def raw_get(checkpoint: Path, url: str) -> float:
    """Seconds in which threads alone get all bytes of a checkpoint's files, in requests of the trainer's size: what
    moto takes for a request does not depend on it."""
    import boto3

    bucket, _, key = url.removeprefix("s3://").partition("/")
    client, part = boto3.client("s3"), range_plan.PART_BYTES
    ranges = [
        (file.name, begin) for file in checkpoint.iterdir() for begin in range(0, max(1, file.stat().st_size), part)
    ]

    def get(one: tuple[str, int]) -> int:
        name, begin = one
        span = f"bytes={begin}-{begin + part - 1}"
        return len(client.get_object(Bucket=bucket, Key=f"{key}/{name}", Range=span)["Body"].read())

    begin = time.perf_counter()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        list(pool.map(get, ranges))
    return time.perf_counter() - begin


def report(results: dict[str, Any]) -> None:
    """The table, with the targets."""
    size, median = results["bytes"], statistics.median
    upload = median(one["seconds"] for one in results["uploads"]) if results["uploads"] else float("nan")
    print(f"a checkpoint of {size / 1e9:.2f} GB, one rank")
    rows = {"upload": upload, "upload by boto3 alone": median(results["put"])}
    rows |= {"restore": median(results["restore"]), "download alone": median(results["get"])}
    for name, seconds in rows.items():
        print(f"{name:22} {seconds:7.2f} s  {size / seconds / 1e9:6.3f} GB/s")
    print(f"{'':22} {'median':>9}  {'mean':>9}  {'longest':>9}")
    for name in ("alone", "uploading"):
        steps = results[name]
        print(f"step, {name:16} {median(steps):7.3f} s  {statistics.fmean(steps):7.3f} s  {max(steps):7.3f} s")
    cpu = [statistics.fmean(results[f"cpu {name}"]) for name in ("alone", "uploading")]
    print(f"CPU of the run: {cpu[0]:.1f} s alone, {cpu[1]:.1f} s with uploads: {cpu[1] / cpu[0] - 1:+.1%}")
    mean = statistics.fmean(results["uploading"]) / statistics.fmean(results["alone"]) - 1
    middle = median(results["uploading"]) / median(results["alone"]) - 1
    print(f"step:    {mean:+.1%} by the mean, {middle:+.1%} by the median (target: at most 2 %)")
    print(f"restore: {rows['restore'] / rows['download alone']:.2f} x the raw transfer (target: 1.2)")


if __name__ == "__main__":
    run_command(main)
