"""A report of a run of a million steps: seconds and peak memory of the process, and the size of the page.

The run folder has the lines that training writes, with telemetry of 8 loops every 100 steps; it is written first, and
not measured.

    python benchmarks/report_page.py [--steps 1000000]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import orjson

MEASURE = """
import sys, time
began, used = time.perf_counter(), time.process_time()
from mythos_dist.ops.report.command import run
from pathlib import Path
run([Path(sys.argv[1])], None, None)
seconds, used = time.perf_counter() - began, time.process_time() - used
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")) / 1024
print(f"{seconds:.1f} s with imports ({used:.1f} s of CPU), peak memory {peak:.0f} MB", file=sys.stderr)
"""


def write_run(folder: Path, steps: int) -> None:
    """The files of a complete run that a report reads."""
    loops = [round(0.1 * i, 3) for i in range(8)]
    probe = dict.fromkeys(("change", "norm", "fixed_point", "act_mass", "expert_entropy"), loops)
    corpora = [{"name": f"shards/{name}", "fingerprint": 8 * name, "sequences": 10**6} for name in "ab"]
    (folder / "config.yaml").write_text(f"train: {{steps: {steps}, seq_len: 4096}}\n")
    writer = {"start": 1, "state": "completed", "why": "", "host": "node1", "step": steps, "time": 1.7e9}
    (folder / "writer.json").write_text(json.dumps(writer))
    (folder / "COMPLETED").write_text(f"{steps}\n")
    with (folder / "metrics.jsonl").open("wb") as file:
        for step in range(1, steps + 1):
            line = {
                "step": step, "time": 1.7e9 + 2.1 * step, "loss": 2 + 9 / (1 + step / 997), "grad_norm": 1 + 1 / step,
                "lr": 3e-4 * min(1.0, step / 2000), "phase": "warmup" if step < 2000 else "stable", "n_loops": 8,
                "backprop": 4, "tokens": 1048576 * step, "tokens_total": 1048576 * step,
                "batch_id": f"{step:016x}", "step_seconds": 2.1 + step % 7 / 31, "tokens_per_second": 499321.9,
                "mfu": 0.41 + step % 5 / 977, "objective": 2.1 + 9 / (1 + step / 997), "expert_load_max": 1.25,
                "experts_idle": 0, "skipped": step % 50000 == 0, "data_wait_seconds": 0.01,
                "memory_gb": 61.25, "by_corpus": [192, 64],
            }  # fmt: skip
            if step == 1:
                line["data"] = {"seq_len": 4096, "corpora": corpora}
            if step % 100 == 0:
                line["depth"] = probe
            file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
    evaluations = ({"step": step, "heldout_loss": 3.0, "accuracy": 0.4} for step in range(0, steps + 1, 1000))
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000, help="(%(default)s)")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        folder.mkdir()
        write_run(folder, steps)
        size = (folder / "metrics.jsonl").stat().st_size
        print(f"{steps:,} steps, metrics.jsonl of {size / 1e6:.0f} MB", flush=True)
        subprocess.run([sys.executable, "-c", MEASURE, str(folder)], check=True, stdout=subprocess.DEVNULL)
        print(f"page of {(folder / 'report.html').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
