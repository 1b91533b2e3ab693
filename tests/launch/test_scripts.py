"""The decisions of the launch scripts, with stubs of srun, scontrol, sinfo, ssh and DeepSpeed's launcher.

tests/cluster uses the real programs; here each decision takes a second.
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


def write_program(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("name", ["slurm.sbatch", "deepspeed.sh", "env.sh", "install_gpu.sh"])
def test_shell_scripts_are_valid_bash(name):
    done = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["deepspeed.sh", "status.py", "submit.py"])
def test_scripts_have_a_help_text(name):
    interpreter = "bash" if name.endswith(".sh") else sys.executable
    done = subprocess.run([interpreter, LAUNCH / name, "--help"], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: " in done.stdout


# env.sh


def environment(**variables: str) -> dict[str, str]:
    """The variables that env.sh sets, as a child process sees them."""
    script = (
        f'run_dir=/runs/x; ranks_per_node=4; source {LAUNCH}/env.sh; for n in "${{env_names[@]}}"; do printenv $n; done'
    )
    done = subprocess.run(
        ["bash", "-ec", script + '; echo "${env_names[@]}"'], env=CLEAN | variables, capture_output=True
    )
    *values, names = done.stdout.decode().splitlines()
    return dict(zip(names.split(), values, strict=True))


def test_the_folder_of_compiled_code_must_belong_to_the_user(tmp_path):
    """It is created with mode 700; a link, a file or a folder that others can write to is refused."""
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
        assert done.returncode == 2 and f"{folder} is not a folder that belongs to you" in done.stderr
    folder.rmdir()
    folder.symlink_to(tmp_path / "elsewhere")
    assert sourced().returncode == 2
    (tmp_path / "elsewhere").mkdir()
    assert sourced().returncode == 2
    folder.unlink()
    folder.touch()
    assert sourced().returncode == 2


def test_env_keeps_variables_that_are_set():
    assert environment()["NCCL_DEBUG"] == "WARN"
    assert environment(NCCL_DEBUG="INFO")["NCCL_DEBUG"] == "INFO"
    assert environment()["TORCH_FR_DUMP_TEMP_FILE"] == "/runs/x/logs/nccl-rank-"


def test_threads_are_cpus_per_task_or_a_ranks_share_of_the_cores():
    assert environment(SLURM_CPUS_PER_TASK="12")["OMP_NUM_THREADS"] == "12"
    assert environment(cores="64")["OMP_NUM_THREADS"] == "16"
    assert environment(cores="2")["OMP_NUM_THREADS"] == "1"
    assert environment(OMP_NUM_THREADS="3", SLURM_CPUS_PER_TASK="12")["OMP_NUM_THREADS"] == "3"


# slurm.sbatch

SRUN = """
while [[ $1 == -* ]]; do shift; done   # options of srun
case $3 in
    mythos_dist.train) echo "$MASTER_ADDR $MASTER_PORT" >> {work}/rendezvous; run={work}/run; source {work}/ranks ;;
    *) exec "$@" ;;
esac
"""
SCONTROL = """
case "$1 $2" in
    "show job") cat {work}/job ;;
    "show hostnames") tr , '\\n' <<<"$3" ;;
    *) echo "$@" >> {work}/scontrol_calls ;;
esac
"""


class Launch:
    """A script of launch/ that finds the stubs in `work`/bin."""

    def __init__(self, work: Path, python: str):
        self.work, self.run_dir = work, work / "run"
        self.env = CLEAN | {"PATH": f"{work}/bin:{os.environ['PATH']}", "PYTHON": python}
        (work / "bin").mkdir()

    def command(self, **options: Any) -> list[Any]:
        """The command line before the config."""
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
    """A job whose ranks run the bash script `ranks`, in which `$run` is the run folder."""

    def __init__(self, work: Path):
        super().__init__(work, sys.executable)
        self.env |= {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_TASKS_PER_NODE": "2(x2)"}
        self.env |= {
            "SLURM_JOB_NODELIST": "localhost,node2",
            "SLURM_JOB_PARTITION": "gpus",
            "SLURM_SUBMIT_DIR": str(work),
        }
        write_program(work / "bin" / "srun", SRUN.format(work=work))
        write_program(work / "bin" / "scontrol", SCONTROL.format(work=work))
        write_program(work / "bin" / "sinfo", "printf 'node2\\nlocalhost\\nnode3\\nnode3\\n'")
        write_program(work / "slurm_script", (LAUNCH / "slurm.sbatch").read_text())  # SLURM runs a copy
        self.set_record("RUNNING")

    def set_record(self, state: str, reason: str = "None", excluded: str = "(null)", requeue: int = 1) -> str:
        """Set SLURM's record of the job; returns a command that does the same, for `ranks`."""
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
    def scontrol_calls(self) -> list[str]:
        """Arguments of the scontrol calls that change something."""
        file = self.work / "scontrol_calls"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


DONE = "mkdir -p $run/checkpoints; echo step-00000020 > $run/checkpoints/latest; touch $run/COMPLETED"


def test_a_run_with_a_completed_file_is_done(job):
    assert job.run(DONE) == 0, job.err
    assert job.scontrol_calls == []
    assert "the run is done" in job.out


def test_the_completed_file_has_precedence_over_the_exit_code(job):
    """srun returns 0 without the file: a failure. It returns 137 with the file: done."""
    assert job.run("exit 0") == 1
    assert job.scontrol_calls == ["requeue 77"]
    assert job.run(DONE + "; exit 137") == 0


def test_a_done_run_starts_nothing(job):
    """Such as later jobs of a chain, unless train.steps was raised."""
    job.run(DONE)
    (job.work / "rendezvous").unlink()
    assert job.run("exit 1") == 0
    assert not (job.work / "rendezvous").exists()
    assert job.run("exit 5", "train.steps=21") == 5
    assert (job.work / "rendezvous").exists()


@pytest.mark.parametrize("code", [2, 5])
def test_errors_that_a_restart_would_repeat_are_not_requeued(job, code):
    assert job.run(f"exit {code}") == code
    assert job.scontrol_calls == []


def test_the_exit_code_that_ranks_report_has_precedence_over_sruns(job):
    """One rank exited with 5, then srun killed the others: 143."""
    assert job.run("echo 5 > $MYTHOS_VERDICT; exit 143") == 5
    assert job.scontrol_calls == []
    assert job.run("exit 143") == 143  # the report of the previous start does not count
    assert job.scontrol_calls == ["requeue 77"]


@pytest.mark.parametrize("code", [85, 137])
def test_a_signal_is_forwarded_to_srun_and_the_job_requeued(job, code):
    """SIGUSR1 to the batch script, twice. Whatever code ranks exit with, it does not count as a failure."""
    process = job.start(f"trap 'echo warned; exit {code}' USR1; touch $run/here; while :; do sleep 0.05; done")
    wait_for(job.run_dir / "here")
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code
    assert "warned" in out
    assert job.scontrol_calls == ["requeue 77"]
    assert not (job.run_dir / "launch" / "failures").exists()


def wait_for(file: Path) -> None:
    end = time.monotonic() + 240
    while not file.exists():
        assert time.monotonic() < end, f"{file} was not created"
        time.sleep(0.02)


def test_ranks_that_stopped_by_themselves_are_requeued(job):
    """run.max_seconds, or a preemption where SLURM signals only the ranks."""
    assert job.run("exit 85") == 85
    assert job.scontrol_calls == ["requeue 77"]


def test_a_cancelled_job_stays_cancelled(job):
    """After scancel the job is COMPLETING when its ranks have exited, and `scontrol requeue` would restart it."""
    assert job.run(job.set_record("COMPLETING") + "exit 85") == 85
    assert job.scontrol_calls == []
    assert "SLURM is ending job 77" in job.out


def test_a_job_at_its_time_limit_is_requeued(job):
    assert job.run(job.set_record("COMPLETING", "TimeLimit") + "exit 137") == 137
    assert job.scontrol_calls == ["requeue 77"]


def test_failures_without_a_new_checkpoint_end_the_job(job):
    """Three consecutive ones by default; a new checkpoint resets the count."""
    assert [job.run("exit 4") for _ in range(2)] == [4, 4]
    assert job.run("mkdir $run/checkpoints; echo step-00000010 > $run/checkpoints/latest; exit 4") == 4
    assert len(job.scontrol_calls) == 3
    assert [job.run("exit 4") for _ in range(2)] == [4, 4]
    assert len(job.scontrol_calls) == 4
    assert "not requeued; see" in job.err
    job.env["SLURM_JOB_ID"] = "78"  # submitted again by the user
    assert job.run("exit 4") == 4
    assert job.scontrol_calls[-1] == "requeue 78"


def test_an_array_task_is_requeued_alone(job):
    """The last task has the array's own job id: `scontrol requeue` of that would requeue all tasks."""
    job.env |= {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}
    assert job.run("exit 85") == 85
    assert job.scontrol_calls == ["requeue 77_3"]


def test_a_job_that_may_not_be_requeued_ends(job):
    job.set_record("RUNNING", requeue=0)
    assert job.run("exit 85") == 85
    assert job.scontrol_calls == []
    assert "the next job with this run.dir resumes the run" in job.out


def test_unfit_nodes_are_excluded_after_the_requeue(job):
    """SLURM accepts excluded nodes only for pending jobs. Nodes that were excluded before stay excluded."""
    job.set_record("RUNNING", excluded="node9")
    assert job.run("echo node2.cluster.local >> $MYTHOS_BAD_NODES; echo node2 >> $MYTHOS_BAD_NODES; exit 3") == 3
    assert len(job.scontrol_calls) == 2
    assert job.scontrol_calls[0] == "requeue 77"
    assert job.scontrol_calls[1].startswith("update JobId=77 ExcNodeList=node2")
    assert job.scontrol_calls[1].endswith(",node9")


def test_a_job_with_too_few_nodes_left_ends(job):
    """The partition has three nodes, two are unfit, and the job needs two."""
    assert job.run("printf 'node2\\nnode3\\n' >> $MYTHOS_BAD_NODES; exit 3") == 3
    assert job.scontrol_calls == []
    assert "this partition has 1 nodes, but the job needs 2" in job.err


def test_a_layout_that_does_not_fit_ends_the_job_before_ranks_start(job):
    job.env |= {"SLURM_JOB_NUM_NODES": "3", "SLURM_TASKS_PER_NODE": "4(x3)"}
    assert job.run("exit 0") == 2
    assert "set the number of nodes to 2" in job.err
    assert not job.run_dir.exists()


def test_an_uneven_placement_of_tasks_is_refused(job):
    job.env["SLURM_TASKS_PER_NODE"] = "3,1"
    assert job.run("exit 0") == 2
    assert "give sbatch --ntasks-per-node" in job.err


def test_each_start_uses_its_own_port(job):
    """The next start and the next job use other ports."""
    for number, restarts in (("77", ""), ("77", "1"), ("78", "")):
        job.env |= {"SLURM_JOB_ID": number, "SLURM_RESTART_COUNT": restarts}
        job.run("exit 85")
    lines = (job.work / "rendezvous").read_text().split("\n")[:3]
    assert len(set(lines)) == 3
    assert all(line.startswith("localhost ") and 10000 <= int(line.split()[1]) < 32768 for line in lines)


def test_the_config_is_looked_up_in_the_submit_folder(job):
    """Relative paths in settings are relative to the project folder."""
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
    """Two hosts that are both this machine, and a launcher that runs the bash script `ranks`."""

    def __init__(self, work: Path):
        super().__init__(work, str(work / "bin" / "python"))
        (work / "hostfile").write_text("# comment\nlocalhost slots=2\n127.0.0.1 slots=2\n")
        write_program(work / "bin" / "python", PYTHON.format(work=work, python=sys.executable))
        write_program(work / "bin" / "pdsh", "exit 1")
        write_program(
            work / "bin" / "ssh",
            'while [[ $1 == -[^-]* ]]; do shift 2; done; [[ $1 == -- ]] || exit 9; shift 2; exec bash -c "$*"',
        )

    def command(self, hostfile: str = "hostfile") -> list[Any]:
        return [LAUNCH / "deepspeed.sh", hostfile]

    @property
    def starts(self) -> list[str]:
        """The launcher's arguments at each start."""
        file = self.work / "started"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def hosts(tmp_path) -> Hosts:
    return Hosts(tmp_path)


def test_a_launch_ends_when_the_run_is_done(hosts):
    """The ranks get one config file that includes the overrides."""
    assert hosts.run(DONE, "data.mix={a: 1,b: 2}", 'data.path=""') == 0, hosts.err
    (line,) = hosts.starts
    assert line.endswith(f"--module --no_local_rank mythos_dist.train {hosts.run_dir}/launch/config.yaml")
    assert "--launcher=pdsh --master_addr=localhost" in line
    assert "b: 2" in (hosts.run_dir / "launch" / "config.yaml").read_text()
    assert hosts.run("exit 1") == 0
    assert len(hosts.starts) == 1, "a run that is done is not started again"


def test_a_launcher_that_returns_0_before_the_run_is_done_has_failed(hosts):
    """It is restarted until the run is done."""
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
    assert len(hosts.starts) == 7, "there was a new checkpoint each time"


@pytest.mark.parametrize(("ranks", "code"), [
    ("exit 2", 2),
    ("echo 5 > $MYTHOS_VERDICT; exit 0", 5),
    ("echo 85 > $MYTHOS_VERDICT; exit 1", 85),
    ("echo 3 > $MYTHOS_VERDICT; echo node7 >> $MYTHOS_BAD_NODES; exit 1", 3),
])  # fmt: skip
def test_errors_that_a_restart_would_repeat_end_a_launch(hosts, ranks, code):
    assert hosts.run(ranks) == code
    assert len(hosts.starts) == 1
    assert code != 3 or "unfit nodes: node7" in hosts.err


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_and_the_script_waits(hosts, number):
    """Through the file STOP. The launcher does not get the signal: it would exit before its ranks."""
    ranks = (
        "touch $run/here; until [ -e $run/STOP ]; do sleep 0.05; done; rm $run/STOP; echo 85 > $MYTHOS_VERDICT; exit 1"
    )
    process = hosts.start(ranks)
    wait_for(hosts.run_dir / "here")
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 85, err
    assert "the run stops after the current step" in out


def test_a_stop_file_that_was_not_handled_is_removed(hosts):
    process = hosts.start("touch $run/here; until [ -e $run/STOP ]; do sleep 0.05; done; exit 4")
    wait_for(hosts.run_dir / "here")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 4
    assert not (hosts.run_dir / "STOP").exists()


def is_running(hosts: Hosts) -> bool:
    """Whether the process that the run started is still there and not a zombie."""
    status = Path("/proc", (hosts.run_dir / "pid").read_text().strip(), "status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_ranks_that_outlive_their_launcher_are_killed_before_a_restart(hosts):
    """But no process of another launch of the same user, nor a shell with this launch in its command line."""
    ranks = f"""if [ -e $run/pid ]; then
            if grep -q '^State:[^Z]*$' /proc/$(cat $run/pid)/status; then touch $run/alive; fi
            {DONE}
        else
            setsid sleep 300 >/dev/null 2>&1 & echo $! > $run/pid
        fi"""
    other_launch = subprocess.Popen(["sleep", "300"], env=os.environ | {"MYTHOS_LAUNCH": "another-1-2"})
    try:
        assert hosts.run(ranks) == 0, hosts.err
        assert len(hosts.starts) == 2
        assert not (hosts.run_dir / "alive").exists()
        assert not is_running(hosts)
        assert other_launch.poll() is None
    finally:
        other_launch.kill()
        other_launch.wait()


def test_a_second_ctrl_c_kills_the_run(hosts):
    process = hosts.start("echo $$ > $run/pid; trap '' USR1 TERM INT; while :; do sleep 0.1; done")
    wait_for(hosts.run_dir / "pid")
    process.send_signal(signal.SIGINT)
    wait_for(hosts.run_dir / "STOP")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode not in (0, 85)
    assert not is_running(hosts)


def test_ranks_get_the_variables_that_launchers_drop_but_no_secrets(hosts):
    """In the file DS_ENV_FILE, which only the user can read and which is removed at the end."""
    hosts.env |= {
        "NCCL_IB_HCA": "mlx5_0,mlx5_1",
        "WANDB_API_KEY": "secret",
        "WANDB_PROJECT": "mine",
        "MYTHOS_CHECKPOINT_KEY_FILE": "/home/me/key",
        "TORCH_X": 'a "b"',
    }
    ranks = f"cp $DS_ENV_FILE $run/env; stat -c %a $DS_ENV_FILE > $run/mode; echo $DS_ENV_FILE > $run/name; {DONE}"
    assert hosts.run(ranks) == 0
    variables = dict(line.split("=", 1) for line in (hosts.run_dir / "env").read_text().splitlines())
    assert variables["NCCL_IB_HCA"] == "mlx5_0,mlx5_1"
    assert variables["WANDB_PROJECT"] == "mine"
    assert variables["MYTHOS_CHECKPOINT_KEY_FILE"] == "/home/me/key"  # a path; without it other hosts refuse to start
    assert variables["NCCL_DEBUG"] == "WARN"
    assert variables["MASTER_ADDR"] == "localhost"
    assert variables["LOCAL_WORLD_SIZE"] == "2"
    assert variables["MYTHOS_VERDICT"] == f"{hosts.run_dir}/launch/verdict"
    assert {"MYTHOS_LAUNCH", "MYTHOS_BAD_NODES", "TORCH_EXTENSIONS_DIR"} <= variables.keys()
    assert not {"WANDB_API_KEY", "TORCH_X"} & variables.keys()
    assert 'TORCH_X=a "b" is not passed to the ranks' in hosts.err
    assert (hosts.run_dir / "mode").read_text() == "600\n"
    assert not Path((hosts.run_dir / "name").read_text().strip()).exists()


def test_unreachable_hosts_are_named_before_anything_starts(hosts):
    write_program(hosts.work / "bin" / "ssh", "exit 255")
    assert hosts.run(DONE) == 2
    assert "localhost" in hosts.err and "127.0.0.1" in hosts.err and "unreachable without a password" in hosts.err
    assert hosts.starts == []


def test_a_host_that_goes_down_during_a_run_is_waited_for(hosts):
    """If it does not come back in time: exit code 3, with its name."""
    ssh = (hosts.work / "bin" / "ssh").read_text()
    write_program(hosts.work / "bin" / "ssh", f"[ ! -e {hosts.run_dir}/down ] || exit 255\n{ssh}")
    hosts.env["HOSTS_WITHIN"] = "0"
    assert hosts.run("touch $run/down; exit 4") == 3
    assert "unreachable for 0 s: " in hosts.err and "127.0.0.1" in hosts.err
    (hosts.run_dir / "down").unlink()
    hosts.env["HOSTS_WITHIN"] = "600"
    write_program(
        hosts.work / "bin" / "sleep", f"rm {hosts.run_dir}/down"
    )  # the host comes back while the script waits
    assert hosts.run(f"if [ -e $run/once ]; then {DONE}; else touch $run/once $run/down; exit 4; fi") == 0
    assert hosts.out.count("unreachable: ") == 1 and "; waiting" in hosts.out
    assert len(hosts.starts) == 3


@pytest.mark.parametrize(("launcher", "words"), [
    ("ssh", "set it to one of pdsh, mpich, openmpi, slurm"),
    ("slurm", "needs an allocation; run it in salloc --nodes=2 --ntasks-per-node=2"),
])  # fmt: skip
def test_launchers_that_cannot_work_are_refused(hosts, launcher, words):
    write_program(hosts.work / "bin" / "srun", "exit 1")
    hosts.env["LAUNCHER"] = launcher
    assert hosts.run(DONE) == 2
    assert words in hosts.err


def test_errors_in_hostfile_and_config_are_reported_together(hosts):
    (hosts.work / "hostfile").write_text("node1 slots=8\nnode2 slots=4\n")
    assert hosts.run(DONE, "model.dimm=3") == 2
    assert "node1 has slots=8" in hosts.err or "node2 has slots=4" in hosts.err
    assert "did you mean model.dim?" in hosts.err


HOST_INJECTIONS = [
    "x';touch${IFS}FILE;'", "$(touch${IFS}FILE)", "`touch${IFS}FILE`", "-oProxyCommand=touch${IFS}FILE", "a;touch",
    "node[1-3]", "a,b", "^file", "exec:node1", "::1", "a\\b", "näme", "a" * 300, "@b", "-x@b", "a&b", "a|b", "{a,b}",
]  # fmt: skip


def test_host_names_with_shell_syntax_are_refused(hosts):
    """All are reported together, before ssh, bash or a launcher gets one."""
    write_program(hosts.work / "bin" / "ssh", f"touch {hosts.work}/ssh_called")
    (hosts.work / "hostfile").write_text("".join(f"{host} slots=2\n" for host in ["localhost", *HOST_INJECTIONS]))
    assert hosts.run(DONE) == 2
    for number, _ in enumerate(HOST_INJECTIONS, 2):
        assert re.search(f"line {number}: .* is not a host name: use letters", hosts.err), number
    assert "Traceback" not in hosts.err
    assert nothing_ran(hosts) and not (hosts.work / "ssh_called").exists()


def nothing_ran(hosts: Hosts) -> bool:
    return not list(hosts.work.rglob("FILE")) and not (REPOSITORY / "FILE").exists() and hosts.starts == []


@pytest.mark.parametrize(("variable", "value"), [
    ("MASTER_ADDR", "x';touch FILE;'"), ("MAX_FAILURES", "a[$(touch FILE)]"), ("HOSTS_WITHIN", "a[$(touch FILE)]"),
    ("MAX_FAILURES", "08"), ("MASTER_ADDR", "-x"),
])  # fmt: skip
def test_variables_with_shell_commands_are_refused(variable, value, hosts):
    """Bash arithmetic runs commands in subscripts, and MASTER_ADDR was once part of a bash command line."""
    hosts.env[variable] = value
    assert hosts.run(DONE) == 2
    assert f"{variable}={value}" in hosts.err and nothing_ran(hosts)


@pytest.mark.parametrize("name", ["a'b", "$(touch FILE)"])
def test_a_run_folder_with_shell_syntax_is_refused(name, hosts):
    assert hosts.run(DONE, f'run.dir="{hosts.work}/{name}"') == 2
    assert "launchers pass it to shells on other hosts" in hosts.err and nothing_ran(hosts)


def test_settings_with_shell_syntax_are_not_executed(hosts):
    """They are written to a file and do not pass through shells."""
    text = "it's $(touch FILE) `touch FILE` ; touch FILE & \\ {a,b}"
    assert hosts.run(DONE, f"run.wandb_project={text}") in (0, 2)
    assert not list(hosts.work.rglob("FILE")) and not (REPOSITORY / "FILE").exists()


def test_a_reported_exit_code_with_shell_syntax_is_not_executed(hosts):
    """Write access to the run folder must not allow running commands as the user."""
    assert hosts.run("echo 'a[$(touch $run/FILE)]' > $MYTHOS_VERDICT; exit 4") == 4
    assert not (hosts.run_dir / "FILE").exists()


def test_files_of_a_job_with_shell_syntax_are_not_executed(job):
    text = "a[$(touch $run/FILE)]"
    assert job.run(f"echo '{text}' > $MYTHOS_VERDICT; echo '77 {text} x' > $run/launch/failures; exit 4") == 4
    assert not (job.run_dir / "FILE").exists()
    assert job.scontrol_calls == ["requeue 77"]
    assert job.run("echo 'ALL' > $MYTHOS_BAD_NODES; echo 'node9 Requeue=0' >> $MYTHOS_BAD_NODES; exit 3") == 3
    assert job.scontrol_calls[1:] == ["requeue 77"] and "not a node of this partition, ignored: ALL" in job.out


def test_ranks_of_a_launch_share_a_secret_file(hosts):
    """Only the user can read it, and it is removed at the end; the environment has its path, not the secret."""
    record_mode = "stat -c %a $MYTHOS_SECRET_FILE > $run/mode; wc -c < $MYTHOS_SECRET_FILE >> $run/mode"
    ranks = f"grep SECRET $DS_ENV_FILE > $run/path; {record_mode}; {DONE}"
    assert hosts.run(ranks) == 0, hosts.err
    name, _, file = (hosts.run_dir / "path").read_text().strip().partition("=")
    assert name == "MYTHOS_SECRET_FILE" and Path(file).parent == hosts.run_dir / "launch" and not Path(file).exists()
    assert (hosts.run_dir / "mode").read_text() == "600\n45\n"


def test_each_start_of_a_job_has_a_new_secret(job):
    for _ in range(2):
        job.run("echo $MYTHOS_SECRET >> $run/secrets; exit 85")
    values = (job.run_dir / "secrets").read_text().split()
    assert len(set(values)) == 2 and all(len(secret) == 44 for secret in values)


# submit.py


def submit(*arguments: str, config: str | Path = TINY, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess:
    command = [sys.executable, LAUNCH / "submit.py", config, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=CLEAN | {"PATH": path})


def test_a_dry_run_prints_the_sbatch_command():
    arguments = (
        "run.dir=runs/one --nodes 2 --gpus-per-node 4 --cpus-per-rank 8 --time 1:00:00 --partition p --account a"
    )
    done = submit(*arguments.split(), "--sbatch=--qos=high", "train.steps=9", "--dry-run")
    assert done.returncode == 0, done.stderr
    options = "--job-name=one --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8 --time=1:00:00"
    rest = f"--partition=p --account=a --qos=high {LAUNCH}/slurm.sbatch {TINY} run.dir=runs/one train.steps=9"
    assert done.stdout == f"sbatch {options} {rest}\n"


def test_a_chain_is_an_array_with_one_task_at_a_time():
    done = submit("--nodes", "1", "--chain", "3", "--dry-run")
    assert "--array=1-3%1 --no-requeue" in done.stdout


def test_a_layout_that_does_not_fit_is_not_submitted(tmp_path):
    write_program(tmp_path / "sbatch", f"touch {tmp_path}/submitted")
    done = submit("--nodes", "3", "--ranks-per-node", "4", path=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "set the number of nodes to 2" in done.stderr
    assert not (tmp_path / "submitted").exists()


def test_the_exit_code_of_sbatch_is_returned(tmp_path):
    write_program(tmp_path / "sbatch", f'echo "$@" > {tmp_path}/submitted; exit 7')
    done = submit("--nodes", "2", path=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 7
    assert (tmp_path / "submitted").read_text() == done.stdout.removeprefix("sbatch ")


def test_without_sbatch_the_command_is_printed(tmp_path):
    done = submit("--nodes", "2", path=str(tmp_path))
    assert done.returncode == 2
    assert "sbatch is not installed here" in done.stderr
    assert done.stdout.startswith("sbatch --job-name=tiny_cpu")


@pytest.mark.parametrize("number", ["0", "-1", "1000000000000"])
def test_invalid_counts_are_refused_together(number):
    """--chain -1 once became an array of 1 to -1, and --ranks-per-node 0 was treated as not given."""
    options = ["--nodes", "--ranks-per-node", "--gpus-per-node", "--cpus-per-rank", "--chain"]
    done = submit(*[word for option in options for word in (option, number)], "--dry-run")
    assert done.returncode == 2 and done.stdout == ""
    for option in options:
        assert f"{option} {number}: give an integer from 1 to" in done.stderr
    assert "Traceback" not in done.stderr


def test_scripts_are_executable():
    for name in ("deepspeed.sh", "slurm.sbatch", "install_gpu.sh"):
        assert os.access(LAUNCH / name, os.X_OK), name


def test_stages_of_which_a_later_one_does_not_fit_are_not_submitted(tmp_path):
    config = tmp_path / "stages.yaml"
    config.write_text(
        f"base: {TINY}\nstages: [{{name: a, steps: 2}}, {{name: b, steps: 2, parallel: {{tensor: 4}}}}]\n"
    )
    write_program(tmp_path / "sbatch", f"touch {tmp_path}/submitted")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = submit("--nodes", "2", config=config, path=path)
    assert done.returncode == 2
    assert "stage b: the number of ranks, 2, is not divisible by" in done.stderr
    assert not (tmp_path / "submitted").exists()
    assert submit("--nodes", "4", config=config, path=path).returncode == 0
    assert (tmp_path / "submitted").exists()
