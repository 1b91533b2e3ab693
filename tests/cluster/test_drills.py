"""Fault drills on a real SLURM of several nodes: whatever happens to a run, its job goes on by itself, and all lines of
metrics.jsonl is in the end that of a run to which nothing happened."""

import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster.cluster import Cluster, advice, missing, wait_until
from helpers.disk import enlarge, small_disk
from helpers.launch import train

REPOSITORY = Path(__file__).parents[2]
EXACT = ("step", "loss", "grad_norm", "n_loops", "batch_id", "lr", "tokens", "expert_load_max")
STEPS = 40

pytestmark = [
    pytest.mark.launch,
    pytest.mark.timeout(1600),
    pytest.mark.skipif(bool(missing()), reason=advice(missing())),
]


@dataclass
class Drill:
    """A cluster, and one run of a small model on 2 nodes x 2 ranks."""

    cluster: Cluster
    run_dir: Path
    arguments: list[str]

    def submit(self, *overrides: str, options: tuple[str, ...] = ()) -> int:
        """Through launch/slurm.sbatch; returns the job's number."""
        command = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", f"--output={self.output}", *options]
        command += [str(REPOSITORY / "launch" / "slurm.sbatch"), *self.arguments, *overrides]
        return int(self.cluster.run("ctl", command, cwd=REPOSITORY).stdout)

    @property
    def output(self) -> Path:
        return self.cluster.folder / "job.out"

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def lines(self, name: str = "metrics.jsonl") -> list[dict]:
        """Whole lines: a run may be writing."""
        file = self.run_dir / name
        return (
            [json.loads(text) for text in file.read_text().splitlines(True) if text[-1] == "\n"]
            if file.exists()
            else []
        )

    def wait_step(self, step: int, seconds: float = 60) -> None:
        """Until the run has done a step (and no later than that, if possible)."""
        self.wait(lambda: any(line["step"] >= step for line in self.lines()), seconds, f"step {step}")

    def wait_done(self, job: int, seconds: float = 120) -> None:
        """Until the run is complete and its job has ended well."""
        self.wait((self.run_dir / "COMPLETED").exists, seconds, "COMPLETED")
        self.wait(lambda: self.cluster.job(job)["JobState"] == "COMPLETED", 60, "the job's end")
        assert self.cluster.job(job)["ExitCode"] == "0:0"

    def wait(self, ready, seconds: float, what: str) -> None:
        try:
            wait_until(ready, 4 * seconds, what)  # a busy machine is no failure
        except Exception as error:
            raise AssertionError(f"{error}\n{self.said()[-6000:]}") from None

    def recovered(self, after: float) -> float:
        """Seconds from `after` to the end of the first step of a later start."""
        start = self.lines("restarts.jsonl")[-1]
        return next(line["time"] for line in self.lines() if line["step"] == start["from_step"] + 1) - after


def lines_of(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """Whole lines: a run may be writing."""
    file = run_dir / name
    texts = file.read_text().splitlines(True) if file.exists() else []
    return [json.loads(text) for text in texts if text.endswith("\n")]


def exact(run_dir: Path) -> list[tuple]:
    return [tuple(line[key] for key in EXACT) for line in lines_of(run_dir)]


@pytest.fixture(scope="module")
def arguments(settings) -> list[str]:
    """A layout of every axis but the pipeline, and steps of a tenth of a second."""
    # A rate that does not depend on the number of steps: a longer run begins as a shorter one does.
    more = f"train.steps={STEPS} optim.min_lr_ratio=1 checkpoint.every=10 parallel.expert=2 run.wandb=disabled"
    return [*settings, *more.split(), "faults.lost_after=6", "faults.hang_after=20"]


@pytest.fixture
def drill(tmp_path, arguments):
    """Make a drill: `with drill(nodes=3) as one:`; keywords are the cluster's."""

    @contextlib.contextmanager
    def make(nodes: int = 2, run_dir: Path | None = None, **options) -> Iterator[Drill]:
        run_dir = run_dir or tmp_path / "run"
        with Cluster(nodes=nodes, folder=tmp_path, slurmd_timeout=5, **options) as cluster:
            yield Drill(cluster, run_dir, [*arguments, f"run.dir={run_dir}"])

    return make


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory) -> Path:
    """The folder of a run on the same cluster to which nothing happened."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Cluster(nodes=2, folder=folder) as cluster:
        one = Drill(cluster, folder / "run", [*arguments, f"run.dir={folder / 'run'}"])
        one.wait_done(one.submit())
    assert not (folder / "run" / "restarts.jsonl").exists()
    return folder / "run"


def test_a_signal_to_the_batch_script(drill, undisturbed, recovery):
    """scancel --signal=USR1 --batch: all ranks stop behind one step with a checkpoint, and the job requeues itself."""
    with drill() as one:
        job = one.submit()
        one.wait_step(15)
        begin = time.time()
        one.cluster.run("ctl", ["scancel", "--signal=USR1", "--batch", str(job)])
        one.wait_done(job)
        (line,) = one.lines("restarts.jsonl")
        assert "SIGUSR1" in line["why"] and line["from_step"] == line["last_step"] >= 15
        assert one.cluster.job(job)["Restarts"] == "1"
        recovery(one.recovered(begin), "from USR1 to the next step, requeue included")
    assert exact(one.run_dir) == exact(undisturbed)


def test_preemption(drill, undisturbed, recovery):
    """A job of a higher partition takes the nodes: SIGTERM is a warning like any other."""
    with drill(grace=10) as one:
        job = one.submit(options=("--partition=low",))
        one.wait_step(15)
        begin = time.time()
        options = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
        other = one.cluster.sbatch("#!/bin/sh\nsleep 2\n", *options)
        one.cluster.wait_job(other, "COMPLETED", 240)
        one.wait_done(job)
        (line,) = one.lines("restarts.jsonl")
        assert "SIGTERM" in line["why"] or "SIGUSR1" in line["why"]
        assert line["from_step"] == line["last_step"] >= 15
        recovery(one.recovered(begin), "from the preemption to the next step, the other job included")
    assert exact(one.run_dir) == exact(undisturbed)


def test_the_time_limit(drill, undisturbed, recovery):
    """The scheduler's warning comes before the limit; the run is back in the queue before it is killed.

    Machines differ in how far the run is by then, so it has more steps than any of them does.
    """
    with drill() as one:
        time.sleep(12)  # SLURM looks at limits 30 s after its start, and the run has to be under way then
        job = one.submit("train.steps=1000", options=("--signal=B:USR1@30",))
        one.wait(lambda: one.cluster.job(job)["JobState"] == "RUNNING", 60, "the start")
        one.cluster.end_in(job, 45)
        one.wait(lambda: "stopped behind step" in one.said(), 240, "the warning")
        begin = time.time()
        one.wait(lambda: one.lines("restarts.jsonl"), 240, "the next start")
        line = one.lines("restarts.jsonl")[0]
        assert "SIGUSR1" in line["why"] and line["from_step"] == line["last_step"]
        one.wait_step(line["from_step"] + 5)
        recovery(one.recovered(begin), "from the last checkpoint to the next step")
        one.cluster.run("ctl", ["scancel", str(job)])
    steps = exact(one.run_dir)
    assert [step for step, *_ in steps] == list(range(1, len(steps) + 1))
    assert steps[:STEPS] == exact(undisturbed)[: len(steps)]


def test_a_requeue_from_outside(drill, undisturbed, recovery):
    """scontrol requeue kills the job where it is."""
    with drill() as one:
        job = one.submit()
        one.wait_step(25)
        begin = time.time()
        one.cluster.run("ctl", ["scontrol", "requeue", str(job)])
        one.wait_done(job)
        assert one.lines("restarts.jsonl")[0]["from_step"] >= 10
        recovery(one.recovered(begin), "from scontrol requeue to the next step")
    assert exact(one.run_dir) == exact(undisturbed)


def test_a_node_without_power(drill, undisturbed, recovery):
    """The survivors notice in seconds, long before SLURM does; with a spare node the job goes on."""
    with drill(nodes=3) as one:
        job = one.submit()
        one.wait_step(13)
        begin = time.time()
        one.cluster.power_off(2)
        one.wait(lambda: "error: " in one.said(), 30, "the survivors' word")
        noticed = time.time() - begin
        assert re.search(r"rank [23] on node2 has said nothing for 6 s", one.said()), one.said()
        assert noticed < 15
        one.wait_done(job)
        (line,) = one.lines("restarts.jsonl")
        assert "on node2 has said nothing" in line["why"] and line["from_step"] >= 10
        assert "node2" not in one.cluster.job(job)["NodeList"]
        recovery(one.recovered(begin), f"from the power cut to the next step; noticed after {noticed:.0f} s")
    assert exact(one.run_dir) == exact(undisturbed)


def test_a_cable_of_the_first_node(drill, undisturbed, recovery):
    """Rank 0, who writes, is cut off and its processes go on: they end by themselves, and write nothing any more once
    the run goes on elsewhere."""
    with drill(nodes=3) as one:
        job = one.submit()
        one.wait_step(13)
        begin = time.time()
        one.cluster.unplug(1)
        one.wait(lambda: len(one.lines("restarts.jsonl")) == 1, 240, "the second start")
        writer = json.loads((one.run_dir / "writer.json").read_text())
        assert writer["start"] == 2 and writer["host"] != "node1"
        left = one.cluster.run(
            "node1", ["pgrep", "-f", "^[^ ]*python[^ ]* -m mythos_dist.train"], check=False
        ).stdout.split()
        log = (one.run_dir / "logs" / "rank-00000.log").read_text()
        assert re.search("node1 start 1 INFO .* this rank ends: rank [23] on node2 has said nothing for 6 s", log)
        one.wait_done(job)
        assert not left, "ranks of the first start still run on the node that is cut off"
        newest = (one.run_dir / "logs" / "rank-00000.log").read_text().splitlines()
        first_of_second = next(i for i, text in enumerate(newest) if " start 2 " in text)
        assert not any(" node1 start 1 " in text for text in newest[first_of_second:])
        recovery(one.recovered(begin), "from the cut to the next step")
    assert exact(one.run_dir) == exact(undisturbed)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("kill@25:3", "rank 3 on node2 ended without a word"),
        ("freeze@25:3", "rank 3 on node2 has said nothing for 6 s"),
        ("hang@25:2", "step 25 takes longer than 12 s: rank 2 on node2 (at cluster/inject.py"),
    ],
)
def test_a_rank_that_dies_stops_or_hangs(drill, undisturbed, recovery, fault, why):
    """Named in the others' logs with all stacks; the job requeues itself."""
    with drill() as one:
        job = one.submit(f"faults.inject={fault}", "faults.hang_after=12")
        one.wait_step(24)
        begin = time.time()
        one.wait_done(job)
        (line,) = one.lines("restarts.jsonl")
        assert why in line["why"] and line["from_step"] >= 10
        log = (one.run_dir / "logs" / "rank-00001.log").read_text()
        assert "What every thread of this rank is doing" in log and "train/loop.py" in log
        recovery(one.recovered(begin), f"from {fault} to the next step")
    assert exact(one.run_dir) == exact(undisturbed)


def test_a_nan_in_one_ranks_gradients(drill, undisturbed):
    """All ranks compute the step again together; nothing is lost, and the decision is written down."""
    with drill() as one:
        one.wait_done(one.submit("faults.inject=nan@25:3"))
        decisions = {line["step"]: line["decision"] for line in one.lines() if "decision" in line}
        assert decisions == {25: "computed again: gradients are not finite at first"}
    assert exact(one.run_dir) == exact(undisturbed)


def test_a_full_disk(drill, undisturbed, tmp_path):
    """The run ends with a message and no requeue when its last checkpoint does not fit; with room it goes on."""
    disk = tmp_path / "disk"
    with small_disk(disk, 2500), drill(run_dir=disk / "run") as one:
        job = one.submit("checkpoint.keep=9")
        one.wait(lambda: one.cluster.job(job)["JobState"] == "FAILED", 240, "the failure")
        assert "make room" in one.said() and one.cluster.job(job)["ExitCode"] == "2:0"
        assert not (one.run_dir / "COMPLETED").exists()
        enlarge(disk)
        one.wait_done(one.submit("checkpoint.keep=9"))
        assert exact(one.run_dir) == exact(undisturbed)


def test_two_jobs_on_one_run_folder(drill, undisturbed):
    """The second ends with exit code 2 and names the first; the first takes no notice."""
    with drill() as one:
        job = one.submit("train.steps=100000")  # more than it can do before the second has been refused
        one.wait_step(5)
        second = one.submit(options=(f"--output={one.cluster.folder / 'second.out'}",))
        one.wait(lambda: one.cluster.job(second)["JobState"] == "FAILED", 240, "the refusal")
        said = (one.cluster.folder / "second.out").read_text()
        assert f"is in use: a run of job {job} on node1" in said and "Traceback" not in said
        assert one.cluster.job(second)["ExitCode"] == "2:0"
        refused = one.lines()[-1]["step"]
        one.wait_step(max(STEPS, refused + 5), 240)
        assert not one.lines("restarts.jsonl")
        assert exact(one.run_dir)[:STEPS] == exact(undisturbed)


@pytest.fixture(scope="module")
def demo(shards) -> list[str]:
    """`configs/demo.yaml`, its model and its layout, on shards that are quicker to read."""
    more = "parallel.tensor=2 parallel.expert=2 model.vocab_size=512 train.seq_len=32 train.steps=8 checkpoint.every=2"
    return [str(REPOSITORY / "configs" / "demo.yaml"), *more.split(), f"data.path={shards}", "run.wandb=disabled"]


@pytest.fixture(scope="module")
def one_process(demo, tmp_path_factory) -> list[dict]:
    """The lines of one process on one rank."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    alone = [argument for argument in demo if not argument.startswith("parallel.")]
    assert train(1, *alone, f"run.dir={run_dir}").codes == [0]
    return lines_of(run_dir)


def same(got: list[dict], expected: list[dict]) -> None:
    assert [line["batch_id"] for line in got] == [line["batch_id"] for line in expected]
    assert [line["loss"] for line in got] == pytest.approx([line["loss"] for line in expected], rel=1e-5)


def test_sbatch_trains_as_one_process(drill, demo, one_process):
    """On nodes whose interfaces have other names."""
    with drill(interfaces={"node2": "ens7"}) as one:
        one.arguments = [*demo, f"run.dir={one.run_dir}"]
        one.wait_done(one.submit())
        assert "preflight: 4 ranks on 2 nodes, all-reduce" in one.said()
        same(one.lines(), one_process)
        assert re.search(r" node2 start 1 INFO .* start: import ", (one.run_dir / "logs/rank-00003.log").read_text())


def test_deepspeed_with_pdsh_trains_as_one_process(drill, demo, one_process):
    """launch/deepspeed.sh from a login host; a file STOP ends the first run, the same command goes on."""
    with drill() as one:
        hostfile = one.cluster.folder / "hostfile"
        hostfile.write_text("node1 slots=2\nnode2 slots=2\n")
        command = [REPOSITORY / "launch" / "deepspeed.sh", hostfile, *demo, f"run.dir={one.run_dir}"]
        with one.output.open("w") as output:
            first = one.cluster.popen("ctl", command, cwd=REPOSITORY, stdout=output, stderr=output)
            one.wait_step(1)
            (one.run_dir / "STOP").touch()
            one.wait(lambda: first.poll() is not None, 240, "the end")
        assert first.returncode == 85, one.said()
        assert not (one.run_dir / "COMPLETED").exists() and "STOP asked for it" in one.said()
        done = one.cluster.run("ctl", command, cwd=REPOSITORY, check=False, timeout=360)
        assert done.returncode == 0 and (one.run_dir / "COMPLETED").exists(), done.stdout + done.stderr
        same(one.lines(), one_process)


def test_a_node_without_the_shards_is_left_out(drill, undisturbed, shards):
    """Preflight names it, the job goes back to the queue without it and runs on the spare."""
    with drill(nodes=3, private={"node2": [shards]}) as one:
        one.cluster.run("ctl", ["scontrol", "update", "NodeName=node3", "State=DRAIN", "Reason=later"])
        job = one.submit()
        one.wait(lambda: "unfit: node2" in one.said(), 40, "preflight's word")
        one.cluster.run("ctl", ["scontrol", "update", "NodeName=node3", "State=RESUME"])
        assert re.search(r"^0: error: node2: .*mds: no shards here; set data.path", one.said(), re.M)
        one.wait_done(job)
        assert one.cluster.job(job)["ExcNodeList"] == "node2"
    assert exact(one.run_dir) == exact(undisturbed)


def test_mistakes_on_a_cluster_are_one_line_that_names_the_node(drill, tmp_path):
    """More ranks than the layout needs, a port that is taken, other code on a node, a run folder that is not shared."""
    code, own = tmp_path / "code", tmp_path / "own"
    shutil.copytree(REPOSITORY / "mythos_dist", code)
    (code / "errors.py").open("a").write("\n")
    own.mkdir()
    with drill(nodes=3, private={"node2": [own]}, bind={"node3": [(code, REPOSITORY / "mythos_dist")]}) as one:

        def refused(*options: str, run_dir: Path | None = None, port: int = 0) -> str:
            command = ["srun", "--nodes=2", "--kill-on-bad-exit=1", *options]
            command += [sys.executable, "-m", "mythos_dist.train", *one.arguments]
            env = {"OMP_NUM_THREADS": "1"} | ({"MASTER_PORT": str(port)} if port else {})
            more = [f"run.dir={run_dir or one.run_dir}", "faults.join_within=20"]
            done = one.cluster.run("ctl", [*command, *more], cwd=REPOSITORY, check=False, env=env)
            errors = [text for text in done.stderr.splitlines() if re.match("error: |rank .* error: ", text)]
            assert "Exited with exit code 2" in done.stderr and len(errors) == 1, done.stderr
            assert "Traceback" not in done.stderr
            assert not one.run_dir.exists()
            return errors[0]

        first, other = (
            ("--ntasks-per-node=1", "--nodelist=node1,node2"),
            ("--ntasks-per-node=1", "--nodelist=node1,node3"),
        )
        said = refused("--ntasks-per-node=3", "--nodelist=node1,node2")
        assert "6 ranks" in said and "train.global_batch=8 is not divisible" in said
        with one.cluster.popen("node1", LISTEN) as taken:
            time.sleep(0.5)
            said = refused(*first, port=29511)
            assert "MASTER_PORT=29511: this port of node1 is taken" in said and "free one" in said
            taken.kill()
        said = refused(*other)
        assert "the code (mythos_dist) on node3 is" in said and "one shared folder" in said
        said = refused(*first, run_dir=own / "run")
        assert "node2: it does not see what node1 writes in run.dir" in said and "a folder that all share" in said


LISTEN = [sys.executable, "-c", "import socket, time; s = socket.create_server(('', 29511)); time.sleep(60)"]
