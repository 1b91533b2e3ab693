"""launch/status.py on run folders in every state."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mythos_dist.checkpoint.remote import RemoteState
from mythos_dist.config.dump import dump_config
from mythos_dist.config.load import load_config
from mythos_dist.errors import UserError
from mythos_dist.ops.cluster.status import RunStatus, SlurmJob, format_status, read_status
from mythos_dist.parallel.process_identity import identity, is_running
from mythos_dist.units import format_duration

REPOSITORY = Path(__file__).parents[2]
NOW = 1_700_000_000.0
TOKENS = 8 * 256  # of a step of tiny_cpu


def run_folder(
    tmp_path: Path, *, steps: int = 40, each: float = 2.0, life: float = 5, quiet: float = 1, **writer: Any
) -> Path:
    """A run with train.steps=100 that has done `steps`, one every `each` seconds, the last `quiet` seconds before NOW.

    life: seconds since the heartbeat. writer: more values for writer.json, or other ones.
    """
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        dump_config(load_config(REPOSITORY / "configs/tiny_cpu.yaml", ["train.steps=100"]))
    )
    about = {"start": 1, "host": "node1", "pid": 77, "state": "running", "why": "", "step": None, "time": NOW - 1000}
    (folder / "writer.json").write_text(json.dumps(about | writer))
    os.utime(folder / "writer.json", (NOW - life, NOW - life))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            ended = NOW - quiet - (steps - step) * each
            line = {"step": step, "loss": 7 - step / 100, "step_seconds": each * 0.9, "tokens": step * TOKENS}
            file.write(json.dumps(line | {"tokens_per_second": TOKENS / each / 0.9, "time": ended}) + "\n")
    return folder


def status_of(folder: Path, job: SlurmJob | None = None, patience: float = 120) -> RunStatus:
    return read_status(folder, patience, slurm=lambda number: job, now=NOW)


# States


def test_a_running_run_has_a_speed_and_an_eta(tmp_path):
    """Speeds include the time between steps, such as checkpoints; 60 steps of 2 s are left."""
    seen = status_of(run_folder(tmp_path))
    assert (seen.state, seen.step, seen.steps, seen.tokens, seen.exit_code) == ("running", 40, 100, 40 * TOKENS, 0)
    assert seen.loss == pytest.approx(6.6)
    assert seen.seconds_per_step == pytest.approx(2)
    assert seen.tokens_per_second == pytest.approx(TOKENS / 2)
    assert seen.eta_seconds == pytest.approx(120)
    first, progress, process = format_status(seen)
    assert first == f"{seen.run_dir}: running"
    assert progress == "  step 40/100  loss 6.600  tokens/s 1.02k  2.00 s/step  40.0% done  2 min 0 s left"
    assert process == "  start 1 on node1 (pid 77); last heartbeat 5 s ago, last step 1 s ago"


def test_uploads_are_shown_with_what_waits_and_why(tmp_path):
    folder = run_folder(tmp_path)
    text = dump_config(load_config(REPOSITORY / "configs/tiny_cpu.yaml", ["checkpoint.remote=s3://bucket/run"]))
    (folder / "config.yaml").write_text(text)
    assert "uploads to" not in "".join(format_status(status_of(folder))), "no upload has begun"
    state = RemoteState("id", "s3://bucket/run", 20, NOW, [30, 40], "access is denied")
    (folder / "remote.json").write_text(state.to_text())
    seen = status_of(folder)
    assert "  uploads to s3://bucket/run: step 20 is the newest, 2 checkpoints waiting (step 30, 40)" in format_status(
        seen
    )
    assert "    failing: access is denied" in format_status(seen) and seen.uploads and seen.uploads["uploaded"] == 20
    (folder / "remote.json").write_text("{}")
    assert status_of(folder).uploads is None, "damaged"


def test_in_a_ramp_of_the_batch_the_eta_counts_sequences(tmp_path):
    """Steps of 2 sequences take 2 s. Left are 10 of them and 50 steps of 8: 420 sequences, or 420 s."""
    folder = run_folder(tmp_path)
    overrides = ["train.steps=100", "train.batch_ramp=[[2,50]]", "train.global_batch=8", "train.micro_batch=1"]
    config = load_config(REPOSITORY / "configs/tiny_cpu.yaml", overrides)
    (folder / "config.yaml").write_text(dump_config(config))
    lines = [json.loads(line) | {"global_batch": 2} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = status_of(folder)
    assert seen.eta_seconds == pytest.approx(420)
    assert seen.tokens_per_second == pytest.approx(2 * 256 / 2)


def test_speed_excludes_pauses_between_starts(tmp_path):
    folder = run_folder(tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    earlier = [json.loads(line) for line in lines[:20]]
    for line in earlier:
        line["time"] -= 3600
    (folder / "metrics.jsonl").write_text("\n".join([*map(json.dumps, earlier), *lines[20:]]) + "\n")
    assert status_of(folder).seconds_per_step == pytest.approx(2)


def test_a_run_with_a_completed_file_is_completed(tmp_path):
    """Whatever the last start has recorded, and however old its heartbeat is."""
    folder = run_folder(tmp_path, life=9999, quiet=9999)
    assert status_of(folder).state == "dead"
    (folder / "COMPLETED").touch()
    assert (status_of(folder).state, status_of(folder).exit_code) == ("completed", 0)


def test_a_finished_run_whose_steps_were_raised_is_running_again(tmp_path):
    folder = run_folder(tmp_path, start=2)
    (folder / "COMPLETED").touch()
    assert status_of(folder).state == "running"


@pytest.mark.parametrize(("state", "own"), [("weights", 60), ("everything", 100)])
def test_a_stage_without_a_step_yet_has_the_steps_of_all_stages(tmp_path, state, own):
    """Stage 1 had 40 steps. `everything`: train.steps counts them; `weights`: the stage's own 60 only."""
    folder = run_folder(tmp_path)
    overrides = [f"train.steps={own}", "run.stage=b", "run.stage_begin=40", f"run.start_from_state={state}"]
    (folder / "config.yaml").write_text(dump_config(load_config(REPOSITORY / "configs/tiny_cpu.yaml", overrides)))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(line | {"stage": "a", "schedule_step": line["step"]}) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    assert (status_of(folder).step, status_of(folder).steps) == (40, 100)


def test_a_stopped_run_is_requeued_if_its_job_is_pending_or_restarted(tmp_path):
    why = "stopped after step 40: SIGUSR1 to rank 0"
    folder = run_folder(tmp_path, state="stopped", why=why, slurm_job_id="12", slurm_restart_count="1", life=300)
    seen = status_of(folder)
    assert (seen.state, seen.why) == ("stopped", f"{why}; the same command resumes the run")
    assert format_status(seen)[0] == f"{folder}: {why}; the same command resumes the run"
    seen = status_of(folder, SlurmJob("PENDING", "BeginTime", 2))
    assert (seen.state, seen.why) == ("requeued", f"job 12 is pending in SLURM's queue (BeginTime); {why}")
    seen = status_of(folder, SlurmJob("RUNNING", "None", 2))
    assert seen.state == "requeued"
    assert "restarted job 12, and its ranks are starting" in seen.why
    assert status_of(folder, SlurmJob("RUNNING", "None", 1)).state == "stopped"  # its batch script has not decided yet


@pytest.mark.parametrize(
    ("quiet", "each", "state"), [(100, 2, "running"), (130, 2, "hung"), (130, 20, "running"), (190, 20, "hung")]
)
def test_a_run_is_hung_after_ten_step_times_and_two_minutes_without_a_step(tmp_path, quiet, each, state):
    """A step takes 0.9 of the time between two steps: 10 x 18 s are 180 s."""
    seen = status_of(run_folder(tmp_path, quiet=quiet, each=each))
    assert (seen.state, seen.exit_code) == (state, int(state == "hung"))
    assert ("no step for" in seen.why) == (state == "hung")


def test_patience_can_be_set(tmp_path):
    folder = run_folder(tmp_path, quiet=60)
    assert [status_of(folder, patience=seconds).state for seconds in (30, 120)] == ["hung", "running"]


def test_before_its_first_step_a_start_may_take_hang_after_seconds(tmp_path):
    """Loading may take minutes: faults.hang_after = 600 s. Steps of the previous start do not count."""
    folder = run_folder(tmp_path, quiet=5000, start=2, time=NOW - 500)
    assert status_of(folder).state == "running"
    (folder / "writer.json").write_text(json.dumps({"start": 2, "state": "running", "time": NOW - 700}))
    os.utime(folder / "writer.json", (NOW - 5, NOW - 5))
    assert status_of(folder).state == "hung"


def test_a_run_without_a_heartbeat_for_a_minute_is_dead(tmp_path):
    folder = run_folder(tmp_path, life=61, slurm_job_id="12")
    seen = status_of(folder)
    assert (seen.state, seen.exit_code) == ("dead", 1)
    assert seen.why.startswith("no heartbeat for 1 min 1 s: rank 0 was killed")
    assert status_of(folder, SlurmJob("PENDING", "BeginTime", 1)).state == "requeued"
    assert "cancel it with scancel" in status_of(folder, SlurmJob("RUNNING", "None", 0)).why


def test_a_failed_run_is_dead_with_its_reason(tmp_path):
    seen = status_of(run_folder(tmp_path, state="failed", why="rank 3 on node2 exited unexpectedly"))
    assert (seen.state, seen.exit_code) == ("dead", 1)
    assert seen.why.startswith("rank 3 on node2 exited unexpectedly; the same command resumes from")


# The process


def process() -> tuple[subprocess.Popen, dict[str, Any]]:
    """A process of this machine, and its identity."""
    program = (
        "import json, time\nfrom mythos_dist.parallel.process_identity import identity\n"
        "print(json.dumps(identity()), flush=True)\ntime.sleep(600)"
    )
    running = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    return running, json.loads(running.stdout.readline())


def test_a_killed_process_of_this_host_is_dead_at_once(tmp_path):
    """However recent its heartbeat is, and also while it is a zombie."""
    running, about = process()
    with running:
        folder = run_folder(tmp_path, **about)
        assert status_of(folder).state == "running"
        running.kill()
        os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT)  # a zombie
        for _ in range(2):
            seen = status_of(folder)
            assert (seen.state, seen.exit_code) == ("dead", 1)
            assert seen.why.startswith(f"rank 0 (pid {running.pid}) has exited on this host")
            running.wait()
    assert status_of(folder, SlurmJob("PENDING", "BeginTime", 1)).state == "dead"  # it is not a SLURM job


def test_a_process_with_the_same_pid_is_not_rank_0_and_other_hosts_are_not_checked(tmp_path):
    """A reused pid; another host, boot or container; an identity with missing values."""
    running, about = process()
    try:
        others = [{"pid_started": about["pid_started"] - 1}, {"host": "elsewhere"}, {"boot": "x"}]
        others += [{"pid_namespace": "pid:[1]"}, {"pid_started": None}, {"pid": "77"}, {"pid": -1}]
        states = []
        for i, other in enumerate(others):
            (tmp_path / str(i)).mkdir()
            states.append(status_of(run_folder(tmp_path / str(i), **(about | other))).state)
        assert states == ["dead", *["running"] * 6]
        assert [is_running(about | other) for other in others] == [False, *[None] * 6]
    finally:
        running.kill()
        running.wait()


def test_a_process_finds_itself_running():
    assert is_running(identity()) is True
    assert is_running({"host": identity()["host"], "pid": os.getpid()}) is None  # as without /proc


# Damaged files


def test_invalid_data_in_the_files_is_ignored(tmp_path):
    """Not UTF-8, not an object, values of another type, in metrics.jsonl, restarts.jsonl and writer.json."""
    folder = run_folder(tmp_path, steps=3)
    bad = [b"\xff\xfe", b'{"loss": 3}', b"[1]", b'{"step": "x", "time": "y"}', b'{"step": 4, "time": "y", "loss": []}']
    with (folder / "metrics.jsonl").open("ab") as stream:
        stream.write(b"\n".join(bad) + b"\n")
    (folder / "restarts.jsonl").write_bytes(b'\xff\n{"start": [], "seconds_lost": "much", "why": 3}\n')
    seen = status_of(folder)
    assert (seen.step, seen.loss) == (4, None) and format_status(seen)
    (folder / "config.yaml").write_bytes(b"\xff")
    about = {"start": 2, "time": "now", "pid": [], "host": 3, "state": {}, "why": 5, "slurm_job_id": 1}
    (folder / "writer.json").write_text(json.dumps(about))
    assert format_status(status_of(folder))
    for content in (b"", b"\xff", b"[]", b'{"start": 1'):
        (folder / "writer.json").write_bytes(content)
        with pytest.raises(UserError, match=r"writer\.json is damaged"):
            status_of(folder)


def test_an_incomplete_line_is_ignored(tmp_path):
    folder = run_folder(tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    assert status_of(folder).step == 40


def test_only_the_end_of_a_long_file_is_read(tmp_path):
    """More than 256 KiB; the first line of the part that is read is incomplete."""
    folder = run_folder(tmp_path, steps=4000)
    assert (folder / "metrics.jsonl").stat().st_size > 1 << 18
    assert status_of(folder).step == 4000


def test_a_run_before_its_first_step_has_a_status(tmp_path):
    folder = run_folder(tmp_path, steps=0, time=NOW - 3)
    (folder / "config.yaml").write_text("model: {")  # not completely written yet
    seen = status_of(folder)
    assert (seen.state, seen.step, seen.steps, seen.loss, seen.eta_seconds) == ("running", 0, None, None, None)
    assert format_status(seen)[1] == "  step 0"


def test_the_last_restart_is_shown(tmp_path):
    folder = run_folder(tmp_path, start=3)
    line = {"start": 3, "why": "rank 3 on node2 exited unexpectedly", "from_step": 30, "seconds_lost": 95.2}
    (folder / "restarts.jsonl").write_text(json.dumps({"start": 2}) + "\n" + json.dumps(line) + "\n")
    text = "  start 3 resumed after step 30 (1 min 35 s lost): rank 3 on node2 exited unexpectedly"
    assert format_status(status_of(folder))[-1] == text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        status_of(tmp_path)
    (tmp_path / "launch").mkdir()
    with pytest.raises(UserError, match="no start of this run has reached its first step"):
        status_of(tmp_path)


def test_durations():
    texts = [format_duration(seconds) for seconds in (0.4, 59, 61, 3600, 90000)]
    assert texts == ["0 s", "59 s", "1 min 1 s", "1 h 0 min", "1 d 1 h"]


# The script


def script(*arguments: str | Path, path: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, REPOSITORY / "launch" / "status.py", *arguments]
    env = os.environ | {"PATH": path or os.environ["PATH"]}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)


def test_the_script_queries_squeue(tmp_path):
    """A stub of squeue with one pending job."""
    squeue = tmp_path / "squeue"
    squeue.write_text(
        f"#!{sys.executable}\nimport sys\nprint('PENDING   2    BeginTime') if '--jobs=12' in sys.argv else 0\n"
    )
    squeue.chmod(0o755)
    folder = run_folder(tmp_path, state="stopped", why="stopped after step 40: SIGUSR1", slurm_job_id="12")
    done = script(folder, "--json", path=str(tmp_path))
    status = json.loads(done.stdout)
    assert (done.returncode, status["state"], status["job_state"]) == (0, "requeued", "PENDING")


def test_the_exit_code_of_the_script(tmp_path):
    """1: dead; 2: no run folder, without a traceback."""
    assert script(run_folder(tmp_path)).returncode == 1  # its last step was long ago
    done = script(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path} is not a run folder: give the run.dir of a run, such as runs/demo\n"


def test_watch_ends_with_the_run(tmp_path):
    folder, later = run_folder(tmp_path), time.time() + 3600  # so that it is running whenever it is read
    (folder / "writer.json").write_text(json.dumps({"start": 1, "state": "running", "time": later}))
    os.utime(folder / "writer.json", (later, later))
    command = [sys.executable, REPOSITORY / "launch" / "status.py", folder, "--watch", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        lines = iter(watching.stdout)
        assert any(line.endswith(": running\n") for line in lines)
        (folder / "writer.json").write_text(json.dumps({"start": 1, "state": "completed", "time": time.time()}))
        (folder / "COMPLETED").touch()
        assert any(line.endswith(": completed\n") for line in lines)
        assert watching.wait(240) == 0
