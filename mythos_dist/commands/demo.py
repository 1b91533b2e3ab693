"""Demo, minutes on a CPU: text -> shards -> train on 4 ranks -> kill -> resume with another layout -> generate text."""

import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import run_command
from mythos_dist.files import read_json_lines
from mythos_dist.ops.earlier_run import make_room

RUN_DIR = Path("runs/demo")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "4", "--log-dir", "runs"]
TRAIN = [*LAUNCH, "-m", "mythos_dist.train", "configs/demo.yaml"]
LAYOUTS = ("parallel.tensor=2", "parallel.expert=2"), ("parallel.pipe=2",)  # 2 replicas on 4 ranks


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stop-at", type=int, default=50, help="kill the first run after this step (%(default)s)")
    return parser


def main() -> None:
    """Run the demo from the repository root. It deletes the run folder of an earlier demo, but not of any other run."""
    stop_at = parse_arguments(build_parser()).stop_at
    begin = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # 4 ranks share the cores
    make_room(RUN_DIR, "configs/demo.yaml", LAYOUTS)

    headline("1. Convert a sample text to shards")
    run([sys.executable, "tools/make_sample_data.py"])
    headline(f"2. Train on 4 ranks, tensor 2 x expert 2; kill the job after step {stop_at}, as a scheduler would")
    train_until(stop_at)
    headline("3. Run the same command with another layout, pipe 2 x data 2: it resumes from the newest checkpoint")
    run([*TRAIN, *LAYOUTS[1]])
    headline("4. Generate text with the trained model")
    run([sys.executable, "tools/generate.py", str(RUN_DIR), "--prompt", "The import statement", "--temperature", "0.6"])

    losses = {line["step"]: line["heldout_loss"] for line in read_json_lines(RUN_DIR / "eval.jsonl")}
    first, last = (losses[min(losses)], losses[max(losses)]) if losses else (math.nan, math.nan)
    seconds = time.monotonic() - begin
    headline(f"Held-out loss {first:.2f} -> {last:.2f} nats ({first - last:.2f} better), {seconds:.0f} s")
    run([sys.executable, "tools/inspect_checkpoint.py", str(RUN_DIR)])
    print(f"Results: {RUN_DIR}/metrics.jsonl (one line per step), eval.jsonl, logs/ and checkpoints/")


def headline(text: str) -> None:
    """Print the headline of a step."""
    print(f"\n== {text}", flush=True)


def run(command: list[str]) -> None:
    """Run a command; exit with its code if it fails. (After Ctrl-C, subprocess.run would kill it.)"""
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


if __name__ == "__main__":
    run_command(main)
