"""What launch scripts decide, with programs of our own for srun, scontrol, sinfo, ssh and DeepSpeed's launcher.

tests/cluster has the real ones; here every decision is taken once, in a second.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launch

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
TINY = str(REPOSITORY / "configs" / "tiny_cpu.yaml")
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("SLURM", "SRUN", "SBATCH", "MYTHOS", "OMP", "NCCL", "TORCH", "MASTER", "LAUNCHER", "MAX_F"))
}


def program(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("name", ["slurm.sbatch", "deepspeed.sh", "env.sh", "install_gpu.sh"])
def test_shell_scripts_are_valid_bash(name):
    done = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["deepspeed.sh", "status.py", "submit.py"])
def test_scripts_answer_help(name):
    interpreter = "bash" if name.endswith(".sh") else sys.executable
    done = subprocess.run([interpreter, LAUNCH / name, "--help"], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: " in done.stdout


# env.sh


def environment(**variables: str) -> dict[str, str]:
    """All variables that a program sees behind env.sh, of those that it sets."""
    script = (
        f'run_dir=/runs/x; ranks_per_node=4; source {LAUNCH}/env.sh; for n in "${{env_names[@]}}"; do printenv $n; done'
    )
    done = subprocess.run(
        ["bash", "-ec", script + '; echo "${env_names[@]}"'], env=CLEAN | variables, capture_output=True
    )
    *values, names = done.stdout.decode().splitlines()
    return dict(zip(names.split(), values, strict=True))


def test_the_folder_of_compiled_code_must_be_this_users_own(tmp_path):
    """It is made for the user alone; with one that is a link, open to others or no folder nothing starts."""
    folder = tmp_path / f"mythos_dist-{os.getuid()}"
    script = f"run_dir=/runs/x; ranks_per_node=4; source {LAUNCH}/env.sh; echo $TRITON_CACHE_DIR"

    def sourced() -> subprocess.CompletedProcess:
        env = CLEAN | {"TMPDIR": str(tmp_path)}
        return subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)

    assert sourced().stdout == f"{folder}/triton\n"
    assert folder.stat().st_mode & 0o777 == 0o700
    for mode in (0o777, 0o770, 0o702):
        folder.chmod(mode)
        done = sourced()
        assert done.returncode == 2 and f"{folder} is no folder that is yours" in done.stderr
    folder.rmdir()
    folder.symlink_to(tmp_path / "elsewhere")
    assert sourced().returncode == 2
    (tmp_path / "elsewhere").mkdir()
    assert sourced().returncode == 2
    folder.unlink()
    folder.touch()
    assert sourced().returncode == 2


def test_env_sets_what_is_not_set():
    assert environment()["NCCL_DEBUG"] == "WARN"
    assert environment(NCCL_DEBUG="INFO")["NCCL_DEBUG"] == "INFO"
    assert environment()["TORCH_FR_DUMP_TEMP_FILE"] == "/runs/x/logs/nccl-rank-"


def test_threads_are_those_of_slurm_or_a_ranks_share_of_the_cores_and_at_least_one():
    assert environment(SLURM_CPUS_PER_TASK="12")["OMP_NUM_THREADS"] == "12"
    assert environment(cores="64")["OMP_NUM_THREADS"] == "16"
    assert environment(cores="2")["OMP_NUM_THREADS"] == "1"
    assert environment(OMP_NUM_THREADS="3", SLURM_CPUS_PER_TASK="12")["OMP_NUM_THREADS"] == "3"


# slurm.sbatch

SRUN = """
while [[ $1 == -* ]]; do shift; done   # its own options
case $3 in
    mythos_dist.train) echo "$MASTER_ADDR $MASTER_PORT" >> {work}/rendezvous; run={work}/run; source {work}/ranks ;;
    *) exec "$@" ;;
esac
"""
SCONTROL = """
case "$1 $2" in
    "show job") cat {work}/job ;;
    "show hostnames") tr , '\\n' <<<"$3" ;;
    *) echo "$@" >> {work}/asked ;;
esac
"""


class Launch:
    """A script of launch/ under way, among programs in `work`/bin."""

    def __init__(self, work: Path, python: str):
        self.work, self.run_dir = work, work / "run"
        self.env = CLEAN | {"PATH": f"{work}/bin:{os.environ['PATH']}", "PYTHON": python}
        (work / "bin").mkdir()

    def command(self, **options: Any) -> list[Any]:
        """What is typed before the config."""
        raise NotImplementedError

    def start(self, ranks: str, *overrides: str, **options: Any) -> subprocess.Popen:
        (self.work / "ranks").write_text(ranks)
        command = [*self.command(**options), TINY, f"run.dir={self.run_dir}", *overrides]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.env, cwd=self.work, stdout=pipe, stderr=pipe, text=True)

    def run(self, ranks: str, *overrides: str, **options: Any) -> int:
        """Returns the script's exit code."""
        process = self.start(ranks, *overrides, **options)
        self.out, self.err = process.communicate(timeout=240)
        return process.returncode


class Job(Launch):
    """A job whose ranks do what the bash lines in `ranks` say; `$run` is their run folder."""

    def __init__(self, work: Path):
        super().__init__(work, sys.executable)
        self.env |= {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_TASKS_PER_NODE": "2(x2)"}
        self.env |= {
            "SLURM_JOB_NODELIST": "localhost,node2",
            "SLURM_JOB_PARTITION": "gpus",
            "SLURM_SUBMIT_DIR": str(work),
        }
        program(work / "bin" / "srun", SRUN.format(work=work))
        program(work / "bin" / "scontrol", SCONTROL.format(work=work))
        program(work / "bin" / "sinfo", "printf 'node2\\nlocalhost\\nnode3\\nnode3\\n'")
        program(work / "slurm_script", (LAUNCH / "slurm.sbatch").read_text())  # SLURM runs a copy
        self.says("RUNNING")

    def says(self, state: str, reason: str = "None", excluded: str = "(null)", requeue: int = 1) -> str:
        """SLURM's record of the job, from now on; also as a line for `ranks`."""
        text = f"""JobId=77 JobName=x
   JobState={state} Reason={reason} Dependency=(null)
   Requeue={requeue} Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   ReqNodeList=(null) ExcNodeList={excluded}
   Command={REPOSITORY}/launch/slurm.sbatch {TINY}
"""
        (self.work / "job").write_text(text)
        return f"cat > {self.work}/job <<'EOF'\n{text}EOF\n"

    def command(self) -> list[Any]:
        return ["bash", self.work / "slurm_script"]

    @property
    def asked(self) -> list[str]:
        """What scontrol was asked to change."""
        file = self.work / "asked"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


DONE = "mkdir -p $run/checkpoints; echo step-00000020 > $run/checkpoints/latest; touch $run/COMPLETED"


def test_a_run_with_its_marker_is_done(job):
    assert job.run(DONE) == 0, job.err
    assert job.asked == []
    assert "the run is done" in job.out


def test_the_marker_counts_and_not_the_exit_code(job):
    """srun left with 0, and the run is not done: a failure. And the other way round."""
    assert job.run("exit 0") == 1
    assert job.asked == ["requeue 77"]
    assert job.run(DONE + "; exit 137") == 0


def test_a_done_run_starts_nothing(job):
    """Later jobs of a chain; unless train.steps was raised."""
    job.run(DONE)
    (job.work / "rendezvous").unlink()
    assert job.run("exit 1") == 0
    assert not (job.work / "rendezvous").exists()
    assert job.run("exit 5", "train.steps=21") == 5
    assert (job.work / "rendezvous").exists()


@pytest.mark.parametrize("code", [2, 5])
def test_what_a_person_has_to_mend_is_not_requeued(job, code):
    assert job.run(f"exit {code}") == code
    assert job.asked == []


def test_the_word_that_ranks_leave_counts_more_than_what_srun_makes_of_their_end(job):
    """One rank left with 5, srun killed the others: 143."""
    assert job.run("echo 5 > $MYTHOS_VERDICT; exit 143") == 5
    assert job.asked == []
    assert job.run("exit 143") == 143  # a word is of one start
    assert job.asked == ["requeue 77"]


@pytest.mark.parametrize("code", [85, 137])
def test_a_warning_is_handed_to_srun_and_the_job_requeued(job, code):
    """SIGUSR1 to the batch script, twice. Whatever ranks made of it, it is no failure of theirs."""
    process = job.start(f"trap 'echo warned; exit {code}' USR1; touch $run/here; while :; do sleep 0.05; done")
    wait_for(job.run_dir / "here")
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code
    assert "warned" in out
    assert job.asked == ["requeue 77"]
    assert not (job.run_dir / "launch" / "failures").exists()


def wait_for(file: Path) -> None:
    end = time.monotonic() + 240
    while not file.exists():
        assert time.monotonic() < end, f"{file} did not come"
        time.sleep(0.02)


def test_ranks_that_stopped_by_themselves_are_requeued(job):
    """run.max_seconds, or a preemption of which SLURM told the ranks alone."""
    assert job.run("exit 85") == 85
    assert job.asked == ["requeue 77"]


def test_a_cancelled_job_stays_cancelled(job):
    """scancel: the job is COMPLETING when ranks have left, and `scontrol requeue` would bring it back to life."""
    assert job.run(job.says("COMPLETING") + "exit 85") == 85
    assert job.asked == []
    assert "SLURM has ended job 77" in job.out


def test_a_job_whose_time_ran_out_is_requeued(job):
    assert job.run(job.says("COMPLETING", "TimeLimit") + "exit 137") == 137
    assert job.asked == ["requeue 77"]


def test_failures_without_a_new_checkpoint_end_the_job(job):
    """Three in a row by default; a checkpoint in between counts from the start again."""
    assert [job.run("exit 4") for _ in range(2)] == [4, 4]
    assert job.run("mkdir $run/checkpoints; echo step-00000010 > $run/checkpoints/latest; exit 4") == 4
    assert len(job.asked) == 3
    assert [job.run("exit 4") for _ in range(2)] == [4, 4]
    assert len(job.asked) == 4
    assert "not started again; see" in job.err
    job.env["SLURM_JOB_ID"] = "78"  # submitted again by a person
    assert job.run("exit 4") == 4
    assert job.asked[-1] == "requeue 78"


def test_an_element_of_an_array_is_requeued_alone(job):
    """The last element has the array's own number: `scontrol requeue` of that would requeue all elements."""
    job.env |= {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}
    assert job.run("exit 85") == 85
    assert job.asked == ["requeue 77_3"]


def test_a_job_that_may_not_be_requeued_leaves_the_rest_to_the_next(job):
    job.says("RUNNING", requeue=0)
    assert job.run("exit 85") == 85
    assert job.asked == []
    assert "the next job with this run.dir goes on" in job.out


def test_unfit_nodes_are_excluded_once_the_job_is_back_in_the_queue(job):
    """SLURM takes excluded nodes of waiting jobs only. Those that were excluded before stay so."""
    job.says("RUNNING", excluded="node9")
    assert job.run("echo node2.cluster.local >> $MYTHOS_BAD_NODES; echo node2 >> $MYTHOS_BAD_NODES; exit 3") == 3
    assert len(job.asked) == 2
    assert job.asked[0] == "requeue 77"
    assert job.asked[1].startswith("update JobId=77 ExcNodeList=node2")
    assert job.asked[1].endswith(",node9")


def test_a_job_is_not_left_waiting_for_nodes_that_are_not_there(job):
    """The partition has three nodes, two are unfit, and the job needs two."""
    assert job.run("printf 'node2\\nnode3\\n' >> $MYTHOS_BAD_NODES; exit 3") == 3
    assert job.asked == []
    assert "this partition has 1 nodes, and the job needs 2" in job.err


def test_a_layout_that_does_not_fit_ends_the_job_before_ranks_are_started(job):
    job.env |= {"SLURM_JOB_NUM_NODES": "3", "SLURM_TASKS_PER_NODE": "4(x3)"}
    assert job.run("exit 0") == 2
    assert "set the number of nodes to 2" in job.err
    assert not job.run_dir.exists()


def test_ranks_that_slurm_placed_unevenly_are_refused(job):
    job.env["SLURM_TASKS_PER_NODE"] = "3,1"
    assert job.run("exit 0") == 2
    assert "give sbatch --ntasks-per-node" in job.err


def test_a_start_meets_at_a_port_of_its_own(job):
    """The next start and the next job have others."""
    for number, restarts in (("77", ""), ("77", "1"), ("78", "")):
        job.env |= {"SLURM_JOB_ID": number, "SLURM_RESTART_COUNT": restarts}
        job.run("exit 85")
    lines = (job.work / "rendezvous").read_text().split("\n")[:3]
    assert len(set(lines)) == 3
    assert all(line.startswith("localhost ") and 10000 <= int(line.split()[1]) < 32768 for line in lines)


def test_the_config_may_lie_where_the_job_was_submitted(job):
    """And relative settings count from the project folder, wherever that was."""
    (job.work / "mine.yaml").write_text(f"base: {TINY}\nmodel: {{dimm: 3}}\n")
    done = subprocess.run(["bash", job.work / "slurm_script", "mine.yaml"], env=job.env, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{job.work}/mine.yaml" in done.stderr
    assert "did you mean model.dim?" in done.stderr


# deepspeed.sh

PYTHON = """
case "$*" in
    *deepspeed.launcher.runner*) echo "$@" >> {work}/started; run={work}/run; source {work}/ranks ;;
    *) exec {python} "$@" ;;
esac
"""


class Hosts(Launch):
    """Two hosts that are both this machine, and a launcher that does what the bash lines in `ranks` say."""

    def __init__(self, work: Path):
        super().__init__(work, str(work / "bin" / "python"))
        (work / "hostfile").write_text("# ours\nlocalhost slots=2\n127.0.0.1 slots=2\n")
        program(work / "bin" / "python", PYTHON.format(work=work, python=sys.executable))
        program(work / "bin" / "pdsh", "exit 1")
        program(
            work / "bin" / "ssh",
            'while [[ $1 == -[^-]* ]]; do shift 2; done; [[ $1 == -- ]] || exit 9; shift 2; exec bash -c "$*"',
        )

    def command(self, hostfile: str = "hostfile") -> list[Any]:
        return [LAUNCH / "deepspeed.sh", hostfile]

    @property
    def starts(self) -> list[str]:
        """Arguments of the launcher, of each start."""
        file = self.work / "started"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def hosts(tmp_path) -> Hosts:
    return Hosts(tmp_path)


def test_a_launch_ends_with_the_runs_marker(hosts):
    """The config goes along as one file, with what was set on the command line."""
    assert hosts.run(DONE, "data.mix={a: 1,b: 2}", 'data.path=""') == 0, hosts.err
    (line,) = hosts.starts
    assert line.endswith(f"--module --no_local_rank mythos_dist.train {hosts.run_dir}/launch/config.yaml")
    assert "--launcher=pdsh --master_addr=localhost" in line
    assert "b: 2" in (hosts.run_dir / "launch" / "config.yaml").read_text()
    assert hosts.run("exit 1") == 0
    assert len(hosts.starts) == 1, "a run that is done is not started"


def test_a_launcher_that_returns_0_without_the_marker_has_failed(hosts):
    """It starts again, until the run is done."""
    assert hosts.run(f"if [ -e $run/once ]; then {DONE}; else touch $run/once; fi") == 0
    assert len(hosts.starts) == 2
    assert "exit code 1: failure 1 of 3" in hosts.out


def test_failures_without_a_new_checkpoint_end_a_launch(hosts):
    assert hosts.run("exit 4") == 4
    assert len(hosts.starts) == 3
    hosts.env["MAX_FAILURES"] = "2"
    ranks = f"""mkdir -p $run/checkpoints
        wc -l < {hosts.work}/started > $run/checkpoints/latest
        if (($(cat $run/checkpoints/latest) < 7)); then exit 4; fi
        {DONE}"""
    assert hosts.run(ranks) == 0
    assert len(hosts.starts) == 7, "each time with another checkpoint"


@pytest.mark.parametrize(("ranks", "code"), [
    ("exit 2", 2),
    ("echo 5 > $MYTHOS_VERDICT; exit 0", 5),
    ("echo 85 > $MYTHOS_VERDICT; exit 1", 85),
    ("echo 3 > $MYTHOS_VERDICT; echo node7 >> $MYTHOS_BAD_NODES; exit 1", 3),
])  # fmt: skip
def test_what_no_new_start_would_mend_ends_a_launch(hosts, ranks, code):
    assert hosts.run(ranks) == code
    assert len(hosts.starts) == 1
    assert code != 3 or "unfit: node7" in hosts.err


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_the_run_to_stop_and_waits_for_it(hosts, number):
    """By the file STOP; the launcher itself hears nothing, because it would leave ranks behind."""
    ranks = (
        "touch $run/here; until [ -e $run/STOP ]; do sleep 0.05; done; rm $run/STOP; echo 85 > $MYTHOS_VERDICT; exit 1"
    )
    process = hosts.start(ranks)
    wait_for(hosts.run_dir / "here")
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 85, err
    assert "the run stops behind its next step" in out


def test_a_request_to_stop_that_nobody_heard_does_not_stop_the_next_start(hosts):
    process = hosts.start("touch $run/here; until [ -e $run/STOP ]; do sleep 0.05; done; exit 4")
    wait_for(hosts.run_dir / "here")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 4
    assert not (hosts.run_dir / "STOP").exists()


def outlives(hosts: Hosts) -> bool:
    """Whether a process that the run has left is there; one that nobody has waited for is not."""
    status = Path("/proc", (hosts.run_dir / "pid").read_text().strip(), "status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_ranks_that_outlive_their_launcher_are_killed_before_the_next_start(hosts):
    """And nobody else's: neither another launch of the same user nor a shell that only names this one."""
    ranks = f"""if [ -e $run/pid ]; then
            if grep -q '^State:[^Z]*$' /proc/$(cat $run/pid)/status; then touch $run/alive; fi
            {DONE}
        else
            setsid sleep 300 >/dev/null 2>&1 & echo $! > $run/pid
        fi"""
    stranger = subprocess.Popen(["sleep", "300"], env=os.environ | {"MYTHOS_LAUNCH": "another-1-2"})
    try:
        assert hosts.run(ranks) == 0, hosts.err
        assert len(hosts.starts) == 2
        assert not (hosts.run_dir / "alive").exists()
        assert not outlives(hosts)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_second_ctrl_c_kills_the_run(hosts):
    process = hosts.start("echo $$ > $run/pid; trap '' USR1 TERM INT; while :; do sleep 0.1; done")
    wait_for(hosts.run_dir / "pid")
    process.send_signal(signal.SIGINT)
    wait_for(hosts.run_dir / "STOP")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode not in (0, 85)
    assert not outlives(hosts)


def test_ranks_get_the_variables_that_launchers_drop_and_no_secrets(hosts):
    """They come by the file that DS_ENV_FILE names, which nobody else can read and which is gone afterwards."""
    hosts.env |= {
        "NCCL_IB_HCA": "mlx5_0,mlx5_1",
        "WANDB_API_KEY": "secret",
        "WANDB_PROJECT": "mine",
        "MYTHOS_CHECKPOINT_KEY_FILE": "/home/me/key",
        "TORCH_X": 'a "b"',
    }
    ranks = f"cp $DS_ENV_FILE $run/given; stat -c %a $DS_ENV_FILE > $run/mode; echo $DS_ENV_FILE > $run/name; {DONE}"
    assert hosts.run(ranks) == 0
    given = dict(line.split("=", 1) for line in (hosts.run_dir / "given").read_text().splitlines())
    assert given["NCCL_IB_HCA"] == "mlx5_0,mlx5_1"
    assert given["WANDB_PROJECT"] == "mine"
    assert given["MYTHOS_CHECKPOINT_KEY_FILE"] == "/home/me/key"  # a name; without it other hosts refuse to start
    assert given["NCCL_DEBUG"] == "WARN"
    assert given["MASTER_ADDR"] == "localhost"
    assert given["LOCAL_WORLD_SIZE"] == "2"
    assert given["MYTHOS_VERDICT"] == f"{hosts.run_dir}/launch/verdict"
    assert {"MYTHOS_LAUNCH", "MYTHOS_BAD_NODES", "TORCH_EXTENSIONS_DIR"} <= given.keys()
    assert not {"WANDB_API_KEY", "TORCH_X"} & given.keys()
    assert 'TORCH_X=a "b" does not reach the ranks' in hosts.err
    assert (hosts.run_dir / "mode").read_text() == "600\n"
    assert not Path((hosts.run_dir / "name").read_text().strip()).exists()


def test_hosts_that_cannot_be_reached_are_named_before_anything_is_started(hosts):
    program(hosts.work / "bin" / "ssh", "exit 255")
    assert hosts.run(DONE) == 2
    assert "localhost" in hosts.err and "127.0.0.1" in hosts.err and "not to be reached" in hosts.err
    assert hosts.starts == []


def test_a_host_that_goes_down_during_a_run_is_waited_for(hosts):
    """And named, with exit code 3, if it does not come back."""
    ssh = (hosts.work / "bin" / "ssh").read_text()
    program(hosts.work / "bin" / "ssh", f"[ ! -e {hosts.run_dir}/down ] || exit 255\n{ssh}")
    hosts.env["HOSTS_WITHIN"] = "0"
    assert hosts.run("touch $run/down; exit 4") == 3
    assert "not to be reached for 0 s: " in hosts.err and "127.0.0.1" in hosts.err
    (hosts.run_dir / "down").unlink()
    hosts.env["HOSTS_WITHIN"] = "600"
    program(hosts.work / "bin" / "sleep", f"rm {hosts.run_dir}/down")  # it comes back while the script waits
    assert hosts.run(f"if [ -e $run/once ]; then {DONE}; else touch $run/once $run/down; exit 4; fi") == 0
    assert hosts.out.count("not to be reached: ") == 1 and "; waiting" in hosts.out
    assert len(hosts.starts) == 3


@pytest.mark.parametrize(("launcher", "words"), [
    ("ssh", "set it to one of pdsh, mpich, openmpi, slurm"),
    ("slurm", "works inside an allocation; start it from salloc --nodes=2 --ntasks-per-node=2"),
])  # fmt: skip
def test_launchers_that_cannot_work_are_refused(hosts, launcher, words):
    program(hosts.work / "bin" / "srun", "exit 1")
    hosts.env["LAUNCHER"] = launcher
    assert hosts.run(DONE) == 2
    assert words in hosts.err


def test_mistakes_in_hostfile_and_config_are_told_together(hosts):
    (hosts.work / "hostfile").write_text("node1 slots=8\nnode2 slots=4\n")
    assert hosts.run(DONE, "model.dimm=3") == 2
    assert "node1 has slots=8" in hosts.err or "node2 has slots=4" in hosts.err
    assert "did you mean model.dim?" in hosts.err


HOST_INJECTIONS = [
    "x';touch${IFS}FILE;'", "$(touch${IFS}FILE)", "`touch${IFS}FILE`", "-oProxyCommand=touch${IFS}FILE", "a;touch",
    "node[1-3]", "a,b", "^file", "exec:node1", "::1", "a\\b", "näme", "a" * 300, "@b", "-x@b", "a&b", "a|b", "{a,b}",
]  # fmt: skip


def test_host_names_that_a_shell_would_read_otherwise_are_refused(hosts):
    """All at once, before ssh, bash or a launcher sees one."""
    program(hosts.work / "bin" / "ssh", f"touch {hosts.work}/asked")
    (hosts.work / "hostfile").write_text("".join(f"{host} slots=2\n" for host in ["localhost", *HOST_INJECTIONS]))
    assert hosts.run(DONE) == 2
    for number, _ in enumerate(HOST_INJECTIONS, 2):
        assert re.search(f"line {number}: .* is no host name: use letters", hosts.err), number
    assert "Traceback" not in hosts.err
    assert nothing_ran(hosts) and not (hosts.work / "asked").exists()


def nothing_ran(hosts: Hosts) -> bool:
    return not list(hosts.work.rglob("FILE")) and not (REPOSITORY / "FILE").exists() and hosts.starts == []


@pytest.mark.parametrize(("variable", "value"), [
    ("MASTER_ADDR", "x';touch FILE;'"), ("MAX_FAILURES", "a[$(touch FILE)]"), ("HOSTS_WITHIN", "a[$(touch FILE)]"),
    ("MAX_FAILURES", "08"), ("MASTER_ADDR", "-x"),
])  # fmt: skip
def test_a_variable_that_a_shell_would_run_is_refused(variable, value, hosts):
    """Arithmetic of bash runs commands that stand in a subscript, and /dev/tcp was opened by a line of bash."""
    hosts.env[variable] = value
    assert hosts.run(DONE) == 2
    assert f"{variable}={value}" in hosts.err and nothing_ran(hosts)


@pytest.mark.parametrize("name", ["a'b", "$(touch FILE)"])
def test_a_run_folder_that_shells_on_other_hosts_would_read_otherwise_is_refused(name, hosts):
    assert hosts.run(DONE, f'run.dir="{hosts.work}/{name}"') == 2
    assert "launchers give it to shells on other hosts" in hosts.err and nothing_ran(hosts)


def test_settings_reach_the_run_as_they_were_given_whatever_is_in_them(hosts):
    """They go into a file and not through shells; bash runs nothing of them."""
    text = "it's $(touch FILE) `touch FILE` ; touch FILE & \\ {a,b}"
    assert hosts.run(DONE, f"run.wandb_project={text}") in (0, 2)
    assert not list(hosts.work.rglob("FILE")) and not (REPOSITORY / "FILE").exists()


def test_what_lies_in_a_verdict_is_not_run(hosts):
    """Whoever may write into the run folder must not thereby run commands as the user."""
    assert hosts.run("echo 'a[$(touch $run/FILE)]' > $MYTHOS_VERDICT; exit 4") == 4
    assert not (hosts.run_dir / "FILE").exists()


def test_a_jobs_record_of_failures_and_nodes_is_not_run(job):
    text = "a[$(touch $run/FILE)]"
    assert job.run(f"echo '{text}' > $MYTHOS_VERDICT; echo '77 {text} x' > $run/launch/failures; exit 4") == 4
    assert not (job.run_dir / "FILE").exists()
    assert job.asked == ["requeue 77"]
    assert job.run("echo 'ALL' > $MYTHOS_BAD_NODES; echo 'node9 Requeue=0' >> $MYTHOS_BAD_NODES; exit 3") == 3
    assert job.asked[1:] == ["requeue 77"] and "no node of this partition, left alone: ALL" in job.out


def test_ranks_of_a_launch_share_a_secret_that_is_in_no_command_line(hosts):
    """A file that only the user can read, gone at the end; the environment names it."""
    look = "stat -c %a $MYTHOS_SECRET_FILE > $run/mode; wc -c < $MYTHOS_SECRET_FILE >> $run/mode"
    ranks = f"grep SECRET $DS_ENV_FILE > $run/named; {look}; {DONE}"
    assert hosts.run(ranks) == 0, hosts.err
    name, _, file = (hosts.run_dir / "named").read_text().strip().partition("=")
    assert name == "MYTHOS_SECRET_FILE" and Path(file).parent == hosts.run_dir / "launch" and not Path(file).exists()
    assert (hosts.run_dir / "mode").read_text() == "600\n45\n"


def test_ranks_of_a_job_share_a_secret_that_each_start_has_anew(job):
    for _ in range(2):
        job.run("echo $MYTHOS_SECRET >> $run/secrets; exit 85")
    found = (job.run_dir / "secrets").read_text().split()
    assert len(set(found)) == 2 and all(len(secret) == 44 for secret in found)


# submit.py


def submit(*arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess:
    command = [sys.executable, LAUNCH / "submit.py", TINY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=CLEAN | {"PATH": path})


def test_a_dry_run_prints_the_line_that_would_be_typed():
    asked = "run.dir=runs/one --nodes 2 --gpus-per-node 4 --cpus-per-rank 8 --time 1:00:00 --partition p --account a"
    done = submit(*asked.split(), "--sbatch=--qos=high", "train.steps=9", "--dry-run")
    assert done.returncode == 0, done.stderr
    options = "--job-name=one --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8 --time=1:00:00"
    rest = f"--partition=p --account=a --qos=high {LAUNCH}/slurm.sbatch {TINY} run.dir=runs/one train.steps=9"
    assert done.stdout == f"sbatch {options} {rest}\n"


def test_a_chain_is_an_array_of_which_one_runs_at_a_time():
    done = submit("--nodes", "1", "--chain", "3", "--dry-run")
    assert "--array=1-3%1 --no-requeue" in done.stdout


def test_a_layout_that_does_not_fit_is_not_submitted(tmp_path):
    program(tmp_path / "sbatch", f"touch {tmp_path}/submitted")
    done = submit("--nodes", "3", "--ranks-per-node", "4", path=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "set the number of nodes to 2" in done.stderr
    assert not (tmp_path / "submitted").exists()


def test_what_sbatch_returns_is_returned(tmp_path):
    program(tmp_path / "sbatch", f'echo "$@" > {tmp_path}/submitted; exit 7')
    done = submit("--nodes", "2", path=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 7
    assert (tmp_path / "submitted").read_text() == done.stdout.removeprefix("sbatch ")


def test_without_sbatch_that_is_said(tmp_path):
    done = submit("--nodes", "2", path=str(tmp_path))
    assert done.returncode == 2
    assert "there is no sbatch here" in done.stderr
    assert done.stdout.startswith("sbatch --job-name=tiny_cpu")


@pytest.mark.parametrize("number", ["0", "-1", "1000000000000"])
def test_counts_that_are_none_are_refused_together(number):
    """--chain -1 went to sbatch as an array of 1 to -1, and --ranks-per-node 0 was taken for not given."""
    options = ["--nodes", "--ranks-per-node", "--gpus-per-node", "--cpus-per-rank", "--chain"]
    done = submit(*[word for option in options for word in (option, number)], "--dry-run")
    assert done.returncode == 2 and done.stdout == ""
    for option in options:
        assert f"{option} {number}: give a whole number from 1 to" in done.stderr
    assert "Traceback" not in done.stderr


def test_scripts_that_are_run_may_be_run():
    for name in ("deepspeed.sh", "slurm.sbatch", "install_gpu.sh"):
        assert os.access(LAUNCH / name, os.X_OK), name
