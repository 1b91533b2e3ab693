"""Fault drills on a real SLURM cluster of several nodes: after each fault the job resumes by itself, and its
metrics.jsonl finally equals that of an uninterrupted run.

A drill has one rank on each of two nodes; they exchange tokens (parallel.expert=2) and gradients. With `wide` there are
two ranks on each node, for the drill in which rank 0's node is cut off with another rank on it.

Starting a rank takes 4 s of a core, so a run has few starts and steps. If a drill injects its fault from outside, the
first start sleeps before each step from PACED_FROM on (helpers/paced.py), so that the run is not complete before the
fault. Timeouts are much longer than a rank on a busy machine needs, except for those that a drill tests.
"""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster.cluster import Cluster, install_hint, missing, wait_until
from helpers.disk import enlarge, small_disk
from helpers.launch import train
from helpers.once import once
from helpers.paced import paced

REPOSITORY = Path(__file__).parents[2]
EXACT = ("step", "loss", "grad_norm", "n_loops", "batch_id", "lr", "tokens", "expert_load_max")
STEPS, EVERY = 16, 4  # of a run, and between checkpoints
PACED_FROM = 6  # after the first checkpoint
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # by default a rank that is alone on its node has one thread per core
LOST_AFTER, HANG_AFTER = 20, 60  # seconds, in drills that test these timeouts

pytestmark = [
    pytest.mark.launch,
    pytest.mark.timeout(1600),
    pytest.mark.skipif(bool(missing()), reason=install_hint(missing())),
]


@dataclass
class Drill:
    """A cluster, and one run of a small model on 2 of its nodes."""

    cluster: Cluster
    run_dir: Path
    arguments: list[str]
    ranks_per_node: int

    def submit(self, *overrides: str, options: tuple[str, ...] = (), pace: float = 0) -> int:
        """Submit launch/slurm.sbatch; returns the job id. `pace`: seconds to sleep before each step from PACED_FROM."""
        command = ["sbatch", "--parsable", "--nodes=2", f"--ntasks-per-node={self.ranks_per_node}"]
        command += [f"--output={self.output}", *options]
        command += [str(REPOSITORY / "launch" / "slurm.sbatch"), *self.arguments, *overrides]
        env = {"PYTHON": str(paced(self.cluster.folder, PACED_FROM, pace))} if pace else {}
        return int(self.cluster.run("ctl", command, cwd=REPOSITORY, env=ONE_THREAD | env).stdout)

    @property
    def output(self) -> Path:
        return self.cluster.folder / "job.out"

    def log(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def lines(self, name: str = "metrics.jsonl") -> list[dict]:
        return lines_of(self.run_dir, name)

    def wait_step(self, step: int, seconds: float = 60) -> None:
        """Wait until the run has completed a step."""
        self.wait(lambda: any(line["step"] >= step for line in self.lines()), seconds, f"step {step}")

    def wait_paced(self) -> None:
        """Wait until the run is paced and has saved a checkpoint."""
        self.wait_step(PACED_FROM - 1)
        self.wait((self.run_dir / "checkpoints" / "latest").exists, 60, "a checkpoint")

    def wait_done(self, job: int, seconds: float = 120) -> None:
        """Wait until the run is complete and its job has ended with exit code 0."""
        self.wait((self.run_dir / "COMPLETED").exists, seconds, "COMPLETED")
        self.wait(lambda: self.cluster.job(job)["JobState"] == "COMPLETED", 60, "the job's end")
        assert self.cluster.job(job)["ExitCode"] == "0:0"

    def wait(self, ready, seconds: float, what: str) -> None:
        try:
            wait_until(ready, 4 * seconds, what)  # allow for a busy machine
        except Exception as error:
            raise AssertionError(f"{error}\n{self.log()[-6000:]}") from None

    def recovered(self, after: float) -> float:
        """Seconds from `after` to the end of the first step of a later start."""
        start = self.lines("restarts.jsonl")[-1]
        return next(line["time"] for line in self.lines() if line["step"] == start["from_step"] + 1) - after


def lines_of(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The complete lines of a file that a run may be writing."""
    file = run_dir / name
    texts = file.read_text().splitlines(True) if file.exists() else []
    return [json.loads(text) for text in texts if text.endswith("\n")]


def exact(run_dir: Path) -> list[tuple]:
    return [tuple(line[key] for key in EXACT) for line in lines_of(run_dir)]


@pytest.fixture(scope="module")
def arguments(settings) -> list[str]:
    """Settings for two and for four ranks."""
    # The learning rate does not depend on the number of steps, so that longer runs have the same first steps.
    more = f"train.steps={STEPS} train.global_batch=4 optim.min_lr_ratio=1 checkpoint.every={EVERY} run.wandb=disabled"
    return [*settings, *more.split(), "train.micro_batch=1", "faults.lost_after=60", "faults.hang_after=600"]


NARROW, WIDE = ["parallel.expert=2"], ["parallel.expert=2", "parallel.tensor=2"]


@pytest.fixture
def drill(tmp_path, arguments):
    """A function that starts a drill: `with drill(nodes=3) as one:`; other keywords are passed to Cluster."""

    @contextlib.contextmanager
    def make(nodes: int = 2, run_dir: Path | None = None, wide: bool = False, **options) -> Iterator[Drill]:
        run_dir = run_dir or tmp_path / "run"
        layout = WIDE if wide else NARROW
        # When one rank has failed, the others have `kill_wait` seconds to report why; 30 is SLURM's default.
        with Cluster(nodes=nodes, folder=tmp_path, kill_wait=30, **({"slurmd_timeout": 5} | options)) as cluster:
            yield Drill(cluster, run_dir, [*arguments, *layout, f"run.dir={run_dir}"], 1 + wide)

    return make


def run_uninterrupted(folder: Path, arguments: list[str], ranks_per_node: int) -> None:
    """An uninterrupted run on nodes whose interfaces have different names."""
    with Cluster(nodes=2, folder=folder, interfaces={"node2": "ens7"}) as cluster:
        one = Drill(cluster, folder / "run", [*arguments, f"run.dir={folder / 'run'}"], ranks_per_node)
        one.wait_done(one.submit())
    assert not (folder / "run" / "restarts.jsonl").exists()


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of two ranks."""
    return (
        once(tmp_path_factory, "uninterrupted", lambda folder: run_uninterrupted(folder, [*arguments, *NARROW], 1))
        / "run"
    )


@pytest.fixture(scope="module")
def uninterrupted_wide(arguments, tmp_path_factory) -> Path:
    """The same with four ranks."""
    return (
        once(tmp_path_factory, "uninterrupted_wide", lambda folder: run_uninterrupted(folder, [*arguments, *WIDE], 2))
        / "run"
    )


def test_sbatch_gives_the_losses_of_one_process(uninterrupted, uninterrupted_wide, arguments, tmp_path):
    """The uninterrupted runs: 2 and 4 ranks, on nodes whose interfaces have different names."""
    assert train(1, *arguments, f"run.dir={tmp_path / 'run'}").codes == [0]
    expected = lines_of(tmp_path / "run")
    assert [line["step"] for line in expected] == list(range(1, STEPS + 1))
    for run_dir, ranks in ((uninterrupted, 2), (uninterrupted_wide, 4)):
        got = lines_of(run_dir)
        assert [line["batch_id"] for line in got] == [line["batch_id"] for line in expected]
        assert [line["loss"] for line in got] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
        assert f"preflight: {ranks} ranks on 2 nodes, all-reduce" in (run_dir.parent / "job.out").read_text()
        assert re.search(
            " node2 start 1 INFO .* startup: import ", (run_dir / f"logs/rank-{ranks - 1:05d}.log").read_text()
        )


def test_a_signal_to_the_batch_script(drill, uninterrupted, recovery):
    """scancel --signal=USR1 --batch: all ranks stop after the same step with a checkpoint, and the job is requeued."""
    with drill() as one:
        job = one.submit(pace=1)
        one.wait_paced()
        begin = time.time()
        one.cluster.run("ctl", ["scancel", "--signal=USR1", "--batch", str(job)])
        one.wait_done(job)
        (line,) = one.lines("restarts.jsonl")
        assert "SIGUSR1" in line["why"] and line["from_step"] == line["last_step"] >= PACED_FROM - 1
        assert one.cluster.job(job)["Restarts"] == "1"
        recovery(one.recovered(begin), "from USR1 to the next step, requeue included")
    assert exact(one.run_dir) == exact(uninterrupted)


def test_preemption(drill, uninterrupted, recovery):
    """A job of a partition with higher priority takes the nodes: SIGTERM stops the run as SIGUSR1 does."""
    with drill(grace=100) as one:
        job = one.submit(options=("--partition=low",), pace=1)
        one.wait_paced()
        begin = time.time()
        options = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
        other = one.cluster.sbatch("#!/bin/sh\n", *options)
        one.cluster.wait_job(other, "COMPLETED", 480)
        one.wait_done(job)
        (line,) = one.lines("restarts.jsonl")
        assert "SIGTERM" in line["why"] or "SIGUSR1" in line["why"]
        assert line["from_step"] == line["last_step"] >= PACED_FROM - 1
        recovery(one.recovered(begin), "from the preemption to the next step, the other job included")
    assert exact(one.run_dir) == exact(uninterrupted)


@pytest.mark.long  # the run handles the same signal as in the first drill; here SLURM sends it a minute later
def test_the_time_limit(drill, uninterrupted, recovery):
    """SLURM signals before the limit, and the job is requeued before it is killed."""
    with drill() as one:
        job = one.submit("train.steps=1000", options=("--signal=B:USR1@30",), pace=1)
        one.wait_paced()
        one.cluster.end_in(job, 58)  # less than 30 + 30 s: the signal is sent at SLURM's next check of limits
        one.wait(lambda: "stopped after step" in one.log(), 240, "the signal")
        begin = time.time()
        one.wait(lambda: one.lines("restarts.jsonl"), 240, "the next start")
        line = one.lines("restarts.jsonl")[0]
        assert "SIGUSR1" in line["why"] and line["from_step"] == line["last_step"]
        one.wait_step(max(line["from_step"] + 5, STEPS))
        recovery(one.recovered(begin), "from the last checkpoint to the next step")
        one.cluster.run("ctl", ["scancel", str(job)])
    steps = exact(one.run_dir)
    assert [step for step, *_ in steps] == list(range(1, len(steps) + 1))
    assert steps[:STEPS] == exact(uninterrupted)


@pytest.mark.long  # SLURM requeues a preempted job in the same way, and the run ends as after a killed rank
def test_a_requeue_from_outside(drill, uninterrupted, recovery):
    """scontrol requeue kills the job during a step."""
    with drill() as one:
        job = one.submit(pace=1)
        one.wait_paced()
        begin = time.time()
        one.cluster.run("ctl", ["scontrol", "requeue", str(job)])
        one.wait_done(job)
        assert one.lines("restarts.jsonl")[0]["from_step"] >= EVERY
        recovery(one.recovered(begin), "from scontrol requeue to the next step")
    assert exact(one.run_dir) == exact(uninterrupted)


def test_a_node_without_power(drill, uninterrupted, recovery):
    """The other rank detects it within seconds, before SLURM does; the job resumes on a spare node."""
    with drill(nodes=3, slurmd_timeout=30) as one:
        job = one.submit(f"faults.lost_after={LOST_AFTER}", pace=1)
        one.wait_paced()
        begin = time.time()
        one.cluster.power_off(2)
        one.wait(lambda: "error: " in one.log(), 30, "the other rank's error")
        detected = time.time() - begin
        assert re.search(rf"rank 1 on node2 has not responded for {LOST_AFTER} s", one.log()), one.log()
        one.wait_done(job)
        (line,) = one.lines("restarts.jsonl")
        assert "on node2 has not responded" in line["why"] and line["from_step"] >= EVERY
        assert "node2" not in one.cluster.job(job)["NodeList"]
        recovery(one.recovered(begin), f"from the power cut to the next step; detected after {detected:.0f} s")
    assert exact(one.run_dir) == exact(uninterrupted)


def test_a_cable_of_the_first_node(drill, uninterrupted_wide, recovery):
    """Rank 0 and the other rank of its node are cut off. Their processes exit by themselves, and write nothing after
    the run has resumed on other nodes."""
    with drill(nodes=3, wide=True) as one:
        job = one.submit(f"faults.lost_after={LOST_AFTER}", pace=1)
        one.wait_paced()
        begin = time.time()
        one.cluster.unplug(1)
        one.wait(lambda: len(one.lines("restarts.jsonl")) == 1, 240, "the second start")
        writer = json.loads((one.run_dir / "writer.json").read_text())
        assert writer["start"] == 2 and writer["host"] != "node1"
        ranks = ["pgrep", "-f", "^[^ ]*python[^ ]* .*-m mythos_dist.train"]
        one.wait(lambda: not one.cluster.run("node1", ranks, check=False).stdout, 60, "no rank on node1")
        log = (one.run_dir / "logs" / "rank-00000.log").read_text()
        reason = rf"rank [23] on node2 has not responded for {LOST_AFTER} s"
        assert re.search(f"node1 start 1 INFO .* this rank exits in phase '.*': {reason}", log), log
        one.wait_done(job)
        newest = (one.run_dir / "logs" / "rank-00000.log").read_text().splitlines()
        first_of_second = next(i for i, text in enumerate(newest) if " start 2 " in text)
        assert not any(" node1 start 1 " in text for text in newest[first_of_second:])
        recovery(one.recovered(begin), "from the cut to the next step")
    assert exact(one.run_dir) == exact(uninterrupted_wide)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("kill@10:1", "rank 1 on node2 exited unexpectedly"),
        pytest.param(
            "freeze@10:1", f"rank 1 on node2 has not responded for {LOST_AFTER} s",
            marks=pytest.mark.long,  # detected like a node without power; train/test_faults.py also suspends ranks
        ),
        pytest.param(
            "hang@10:1",
            f"step 10 exceeded faults.hang_after={HANG_AFTER} s: rank 1 on node2 (at ops/cluster/inject.py",
            marks=pytest.mark.long,  # it ends as a killed rank does, with code 4; train/test_faults.py has a hang, too
        ),
    ],
)  # fmt: skip
def test_a_rank_that_is_killed_suspended_or_hangs(drill, uninterrupted, recovery, fault, why):
    """Rank 0's log has the reason and all stacks; the job is requeued."""
    limits = [f"faults.lost_after={LOST_AFTER}"] * ("freeze" in fault)
    limits += [f"faults.hang_after={HANG_AFTER}"] * ("hang" in fault)
    with drill() as one:
        job = one.submit(f"faults.inject={fault}", "checkpoint.background=false", *limits)
        one.wait_step(9)
        begin = time.time()
        one.wait_done(job)
        (line,) = one.lines("restarts.jsonl")
        assert why in line["why"] and line["from_step"] == 8
        log = (one.run_dir / "logs" / "rank-00000.log").read_text()
        assert "Stacks of all threads of this rank" in log and "train/loop.py" in log
        recovery(one.recovered(begin), f"from {fault} to the next step")
    assert exact(one.run_dir) == exact(uninterrupted)


@pytest.mark.long  # SLURM is not involved; train/test_faults.py tests it on two ranks
def test_a_nan_in_one_ranks_gradients(drill, uninterrupted):
    """All ranks recompute the step; metrics.jsonl has the decision."""
    with drill() as one:
        one.wait_done(one.submit("faults.inject=nan@10:1"))
        decisions = {line["step"]: line["decision"] for line in one.lines() if "decision" in line}
        assert decisions == {10: "recomputed: gradients were not finite"}
    assert exact(one.run_dir) == exact(uninterrupted)


@pytest.mark.long  # train/test_resume.py fills a disk under two ranks, launch/test_scripts.py ends a job with code 2
def test_a_full_disk(drill, uninterrupted, tmp_path):
    """The job fails with a message when a checkpoint does not fit, and is not requeued; with more space it resumes."""
    disk = tmp_path / "disk"
    checkpoint = (uninterrupted / "checkpoints" / f"step-{STEPS:08d}").rglob("*")
    kilobytes = sum(path.stat().st_blocks for path in checkpoint) // 2
    with small_disk(disk, int(2.8 * kilobytes)), drill(run_dir=disk / "run") as one:
        job = one.submit("checkpoint.keep=9")
        one.wait(lambda: one.cluster.job(job)["JobState"] == "FAILED", 240, "the failure")
        assert "free space on a full disk" in " ".join(one.log().split()) and one.cluster.job(job)["ExitCode"] == "2:0"
        assert not (one.run_dir / "COMPLETED").exists()
        enlarge(disk)
        one.wait_done(one.submit("checkpoint.keep=9"))
        assert exact(one.run_dir) == exact(uninterrupted)


def test_two_jobs_on_one_run_folder(drill, uninterrupted):
    """The second exits with code 2 and names the first, which is not affected."""
    with drill() as one:
        job = one.submit("train.steps=100000", pace=1)  # must still run when the second job is refused
        one.wait_step(3)
        second = one.submit(options=(f"--output={one.cluster.folder / 'second.out'}",))
        one.wait(lambda: one.cluster.job(second)["JobState"] == "FAILED", 240, "the refusal")
        output = (one.cluster.folder / "second.out").read_text()
        assert f"is in use: a run of job {job} on node1" in output and "Traceback" not in output
        assert one.cluster.job(second)["ExitCode"] == "2:0"
        refused = one.lines()[-1]["step"]
        one.wait_step(max(STEPS, refused + 2), 240)
        assert not one.lines("restarts.jsonl")
        assert exact(one.run_dir)[:STEPS] == exact(uninterrupted)


@pytest.mark.long  # test_launch_readme.py runs deepspeed.sh in the same way, but without STOP
def test_deepspeed_with_pdsh(drill, uninterrupted):
    """launch/deepspeed.sh from a login host; a file STOP ends the first run, and the same command resumes it."""
    with drill() as one:
        hostfile = one.cluster.folder / "hostfile"
        hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
        command = [REPOSITORY / "launch" / "deepspeed.sh", hostfile, *one.arguments, "train.steps=100000"]
        with one.output.open("w") as output:
            first = one.cluster.popen("ctl", command, cwd=REPOSITORY, env=ONE_THREAD, stdout=output, stderr=output)
            one.wait_step(1)
            (one.run_dir / "STOP").touch()
            one.wait(lambda: first.poll() is not None, 240, "the end")
        assert first.returncode == 85, one.log()
        assert not (one.run_dir / "COMPLETED").exists() and f"found {one.run_dir / 'STOP'}" in one.log()
        stopped = one.lines()[-1]["step"]
        command[-1] = f"train.steps={max(STEPS, stopped + 2)}"
        done = one.cluster.run("ctl", command, cwd=REPOSITORY, env=ONE_THREAD, check=False, timeout=1200)
        assert done.returncode == 0 and (one.run_dir / "COMPLETED").exists(), done.stdout + done.stderr
        assert [line["from_step"] for line in one.lines("restarts.jsonl")] == [stopped]
        assert exact(one.run_dir)[:STEPS] == exact(uninterrupted)


def test_a_node_without_the_shards_is_excluded(drill, uninterrupted, shards):
    """Preflight names it, and the job is requeued without it and runs on a spare node."""
    with drill(nodes=3, private={"node2": [shards]}) as one:
        one.cluster.run("ctl", ["scontrol", "update", "NodeName=node3", "State=DRAIN", "Reason=later"])
        job = one.submit()
        one.wait(lambda: "unfit nodes: node2" in one.log(), 60, "preflight's error")
        one.cluster.run("ctl", ["scontrol", "update", "NodeName=node3", "State=RESUME"])
        assert re.search(r"^0: error: node2: .*mds: no shards here; set data.path", one.log(), re.M)
        one.wait_done(job)
        assert one.cluster.job(job)["ExcNodeList"] == "node2"
    assert exact(one.run_dir) == exact(uninterrupted)


def test_errors_on_a_cluster_are_one_line_that_names_the_node(drill, tmp_path):
    """Too many ranks for the layout, a port in use, different code on a node, a run folder that is not shared."""
    code, own = tmp_path / "code", tmp_path / "own"
    shutil.copytree(REPOSITORY / "mythos_dist", code)
    (code / "errors.py").open("a").write("\n")
    own.mkdir()
    with drill(nodes=3, private={"node2": [own]}, bind={"node3": [(code, REPOSITORY / "mythos_dist")]}) as one:

        def refused(nodes: str, *options: str, run_dir: Path | None = None, port: int = 0) -> str:
            command = ["srun", f"--nodelist={nodes}", "--kill-on-bad-exit=1", *options]
            command += [sys.executable, "-m", "mythos_dist.train", *one.arguments]
            env = ONE_THREAD | ({"MASTER_PORT": str(port)} if port else {})
            more = [f"run.dir={run_dir or one.run_dir}"]
            done = one.cluster.run("ctl", [*command, *more], cwd=REPOSITORY, check=False, env=env, timeout=600)
            errors = [text for text in done.stderr.splitlines() if re.match("error: |rank .* error: ", text)]
            assert "Exited with exit code 2" in done.stderr and len(errors) == 1, done.stderr
            assert "Traceback" not in done.stderr
            assert not one.run_dir.exists()
            return errors[0]

        error = refused("node1,node2", "--ntasks-per-node=3")
        assert "6 ranks" in error and "train.global_batch=4 is not divisible" in error
        with one.cluster.popen("node1", LISTEN, stdout=subprocess.PIPE) as taken:
            assert taken.stdout and taken.stdout.readline() == "listening\n"
            error = refused("node1,node2", "--ntasks=2", port=29511)
            assert "MASTER_PORT=29511: another program on node1 uses this port" in error and "free one" in error
            taken.kill()
        error = refused("node1,node3", "--ntasks=2")
        assert "the code (mythos_dist) on node3 is" in error and "a shared folder" in error
        error = refused("node1,node2", "--ntasks=2", run_dir=own / "run")
        assert "node2: files that node1 writes in run.dir are not visible" in error and "a shared folder" in error


LISTEN = [
    sys.executable,
    "-c",
    "import signal, socket; s = socket.create_server(('', 29511)); print('listening', flush=True); signal.pause()",
]
