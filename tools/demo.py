"""In minutes on a CPU: text -> shards -> 4 ranks -> killed halfway -> resumed at another layout -> a sample of text."""

import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from mythos_dist.errors import run_command
from mythos_dist.files import read_json_lines
from mythos_dist.ops.earlier_run import make_room

RUN_DIR = Path("runs/demo")
TRAIN = [
    *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "4", "--log-dir", "runs"),
    *("-m", "mythos_dist.train", "configs/demo.yaml"),
]
FIRST, THEN = ("parallel.tensor=2", "parallel.expert=2"), ("parallel.pipe=2",)  # on 4 ranks, so 2 replicas each


def main() -> None:
    """Run the demo from the project's root; an earlier demo's run folder is replaced, another run's is not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stop-at", type=int, default=50, help="step at which the first run is killed (%(default)s)")
    stop_at = parser.parse_args().stop_at
    begin = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # 4 ranks share the cores
    make_room(RUN_DIR, "configs/demo.yaml", (FIRST, THEN))

    say("1. Text that every machine has becomes shards")
    run([sys.executable, "tools/make_sample_data.py"])
    say(f"2. Training on 4 ranks, tensor 2 x expert 2; at step {stop_at} the job is killed, as a scheduler would")
    train_until(stop_at)
    say("3. The same command again at another layout, pipe 2 x data 2: it resumes from the newest checkpoint")
    run([*TRAIN, *THEN])
    say("4. A sample from the trained model")
    run([sys.executable, "tools/generate.py", str(RUN_DIR), "--prompt", "The import statement", "--temperature", "0.6"])

    losses = {line["step"]: line["heldout_loss"] for line in read_json_lines(RUN_DIR / "eval.jsonl")}
    first, last = (losses[min(losses)], losses[max(losses)]) if losses else (math.nan, math.nan)
    say(f"Held-out loss {first:.2f} -> {last:.2f} nats ({first - last:.2f} better), {time.monotonic() - begin:.0f} s")
    run([sys.executable, "tools/inspect_checkpoint.py", str(RUN_DIR)])
    print(f"Look at {RUN_DIR}/metrics.jsonl (a line a step), eval.jsonl, logs/ and checkpoints/")


def say(text: str) -> None:
    """Print a headline."""
    print(f"\n== {text}", flush=True)


def run(command: list[str]) -> None:
    """Run a command and leave with its exit code if it fails. Ctrl-C reaches it, too, and is not followed by a kill."""
    if code := subprocess.Popen(command).wait():
        sys.exit(code)


def train_until(step: int) -> None:
    """Start training and kill it, all ranks at once, when `step` has been logged."""
    metrics = RUN_DIR / "metrics.jsonl"
    job = subprocess.Popen([*TRAIN, *FIRST])
    while job.poll() is None:
        lines = metrics.read_text().count("\n") if metrics.exists() else 0
        if lines >= step:
            # The launcher's ranks are in sessions of their own: killed alone, it would leave them running.
            for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
                process.kill()
            job.wait()
            print(f"killed at step {lines}")
            return
        time.sleep(0.2)
    sys.exit(job.returncode or f"the job ended before step {step}")


if __name__ == "__main__":
    run_command(main)
