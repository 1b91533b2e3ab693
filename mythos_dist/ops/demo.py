"""`mythos demo`: a small run on 4 CPU ranks that is killed and resumes at another layout."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from mythos_dist.files import read_json_lines
from mythos_dist.ops.earlier_run import make_room

RUN_DIR = Path("runs/demo")
MYTHOS = [sys.executable, "-m", "mythos_dist"]
# Without --local-addr torchrun waits 5 minutes where the machine's own name has no address, as in some containers.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--local-addr", "localhost"]
LAUNCH = [*TORCHRUN, "--nproc_per_node", "4", "--log-dir", "runs"]
TRAIN = [*LAUNCH, "-m", "mythos_dist.train", "demo"]
LAYOUTS = ("parallel.tensor=2", "parallel.expert=2"), ("parallel.pipe=2",)  # 2 replicas on 4 ranks


def run_demo(stop_at: int) -> None:
    """Run it in the current folder; the first run is killed after step `stop_at`.

    Deletes the run folder of an earlier demo, but not of any other run. Exits with the code of a command that fails.
    """
    begin = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # 4 ranks share the cores
    make_room(RUN_DIR, "demo", LAYOUTS)

    run("1. Convert a sample text to shards", *MYTHOS, "sample-data")
    headline(f"2. Train on 4 ranks, tensor 2 x expert 2; kill the job after step {stop_at}, as a scheduler would")
    train_until(stop_at)
    title = "3. Run the same command with another layout, pipe 2 x data 2: it resumes from the newest checkpoint"
    run(title, *TRAIN, *LAYOUTS[1])
    options = ("--prompt", "The import statement", "--temperature", "0.6")
    run("4. Generate text with the trained model", *MYTHOS, "generate", str(RUN_DIR), *options)

    losses = {line["step"]: line["heldout_loss"] for line in read_json_lines(RUN_DIR / "eval.jsonl")}
    first, last = (losses[min(losses)], losses[max(losses)]) if losses else (math.nan, math.nan)
    title = f"Held-out loss {first:.2f} -> {last:.2f} nats ({first - last:.2f} better)"
    run(f"{title}, {time.monotonic() - begin:.0f} s", *MYTHOS, "inspect", str(RUN_DIR))
    print(f"Results: {RUN_DIR}/metrics.jsonl (one line per step), eval.jsonl, logs/ and checkpoints/")
    print(f"Open in a browser: {RUN_DIR}/report.html")


def headline(text: str) -> None:
    """Print the headline of a step."""
    print(f"\n== {text}", flush=True)


def run(title: str, *command: str) -> None:
    """Run a command; exit with its code if it fails. (After Ctrl-C, subprocess.run would kill it.)"""
    headline(title)
    if code := subprocess.Popen(command).wait():
        sys.exit(code)


def train_until(step: int) -> None:
    """Start training, and kill all its processes when `step` has been logged."""
    metrics = RUN_DIR / "metrics.jsonl"
    job = subprocess.Popen([*TRAIN, *LAYOUTS[0]])
    while job.poll() is None:
        lines = metrics.read_text().count("\n") if metrics.exists() else 0
        if lines >= step:
            # Ranks have their own sessions: killing the launcher alone would leave them running.
            for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
                process.kill()
            job.wait()
            print(f"killed at step {lines}")
            return
        time.sleep(0.2)
    sys.exit(job.returncode or f"the job ended before step {step}")
