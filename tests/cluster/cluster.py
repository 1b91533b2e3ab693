"""A real SLURM cluster of several nodes on one Linux machine, for tests and for trying things by hand.

One set of namespaces is the cluster and holds a bridge, the switch; every host is a set of its own inside it (PID,
mount, network, UTS, IPC). Its first process dies with the process that asked for it, and the kernel then ends all the
others: nothing outlives a test, a killed one included. The hosts share the machine's file system, CPUs and clock.

    with Cluster(nodes=2, folder=tmp_path) as cluster:
        cluster.run("ctl", ["srun", "-N2", "--ntasks-per-node=2", "hostname"])

Clocks of SLURM (22.05, measured here), for whoever plans a drill:

- A time limit counts whole minutes and is looked at every 30 s, first 30 s after slurmctld's start. `end_in(job, S)`
  sets the end of a running job in seconds; SIGTERM comes at the first look after that, 0 to 30 s late, SIGKILL
  `kill_wait` (5) seconds later. `--signal=B:USR1@S` fires at the first look that is less than S + 30 s before the end,
  so up to 30 s early. The cheapest drill submits at once, calls `end_in(job, 20)`, and has its SIGTERM 30 s after `up`.
- Requeue: by the job itself 7 s, from outside 11 s when its ranks ignore SIGTERM; `cred_expire` is 5 s of it.
- Preemption: ranks get SIGTERM within 1 s, the batch shell only when the grace time is over, SIGKILL 5 s later, the
  job is back 10 s after that. The end of the grace time is noticed every 10 s: grace=1 is 10 s, grace=0 none.
- A silent node is DOWN after 11 to 20 s (slurmd_timeout=10) or 15 s (5), 10 s with conf=["MessageTimeout=2"] too. Its
  job runs elsewhere 14 s later, 20 to 30 s if the batch shell's own node was lost: the other ranks wait for its srun.
- That a job has left a node takes slurmd 2 to 3 s to say. With MessageTimeout=2 messages are lost on a busy
  machine, and the node goes on COMPLETING, the next job waiting, until slurmctld asks again a minute later.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

INSTALL = "apt-get install slurm-wlm munge iproute2 util-linux procps openssh-server openssh-client pdsh"
PROGRAMS = "slurmctld slurmd sbatch munged ip unshare nsenter setpriv ps sshd ssh ssh-keygen pdsh".split()
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
FOLDER = Path("/tmp/mythos-cluster")  # of one that is started by hand
NAMESPACES = ["--mount", "--net", "--uts", "--ipc", "--pid"]
DIE_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"]
INSIDE = Path(__file__).resolve().parent / "inside.py"

Command = Sequence[str | Path] | str  # the words, or a line for bash
Paths = Sequence[Path | str]


class ClusterError(RuntimeError):
    """The cluster, or a command on it, did not do what was asked."""


def missing() -> list[str]:
    """What this machine lacks for a cluster, programs and rights; empty where one can run."""
    path = os.environ.get("PATH", "") + ":" + PATH
    lacks = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if os.geteuid() != 0:
        return ["root", *lacks]
    if not {"unshare", "ip"} & set(lacks):
        trial = "ip link add br0 type bridge && ip link add one type veth peer name two && mount -t tmpfs none /run"
        command = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "sh", "-c", trial]
        if subprocess.run(command, capture_output=True).returncode:
            lacks.append("the right to make namespaces, a bridge and mounts (docker: --privileged)")
    return lacks


def advice(lacks: Sequence[str]) -> str:
    """The line that a person or a skipped test shows for what `missing` returned."""
    return f"a SLURM cluster lacks {', '.join(lacks)} here; as root: {INSTALL}"


def wait_until(ready: Callable[[], object], seconds: float, what: str) -> float:
    """Ask until the answer is true; returns the seconds that it took, raises ClusterError after `seconds`."""
    start = time.monotonic()
    while not ready():
        if (waited := time.monotonic() - start) > seconds:
            raise ClusterError(f"not within {seconds} s: {what}")
        time.sleep(min(max(0.05, waited / 20), 0.5))  # an answer of SLURM's costs hundredths of a second of a core
    return time.monotonic() - start


def wait_for(ask: Callable[[], str], state: str, seconds: float, what: str) -> float:
    """The same until the answer is `state`; the error says what it was instead."""
    try:
        return wait_until(lambda: ask() == state, seconds, f"{what} {state}")
    except ClusterError as error:
        raise ClusterError(f"{error}; it is {ask()}") from None


@dataclass
class Cluster:
    """`ctl` (login, slurmctld) and `node1` to `nodeN` (slurmd), all with munge and sshd, at 10.77.0.254 and 10.77.0.K.

    Everything of ours lies in `folder`/.slurm, logs in `folder`/.slurm/log. Commands start in `folder`.
    The thread that calls `up` (or `with`) must live as long as the cluster: the kernel ends it with that thread.
    """

    nodes: int
    folder: Path
    cpus: int = 8  # that a node says it has
    memory_mib: int = 16000  # likewise
    gpus: int = 0  # likewise: device files that are /dev/null, so CUDA_VISIBLE_DEVICES is set and no more
    slurmd_timeout: int = 10  # seconds of silence until a node is DOWN
    kill_wait: int = 5  # seconds from SIGTERM to SIGKILL when a job, or the rest of its ranks, is ended
    cred_expire: int = 5  # seconds before a requeued job may start
    grace: int = 20  # seconds from a preemption's SIGTERM to the end, partition `low`; 1 to 10 are the same
    interfaces: Mapping[str, str] = field(default_factory=dict)  # host -> name of its interface, otherwise eth0
    private: Mapping[str, Paths] = field(default_factory=dict)  # host, or "*" -> folders of its own, empty at boot
    bind: Mapping[str, Sequence[Paths]] = field(default_factory=dict)  # host, or "*" -> (what it sees, at which path)
    conf: Sequence[str] = ()  # more lines for slurm.conf, stronger than ours
    process: "subprocess.Popen[str] | None" = field(default=None, init=False, repr=False)  # started by `up`

    def __post_init__(self) -> None:
        self.folder = Path(self.folder).resolve()
        if not 1 <= self.nodes <= 64:
            raise ValueError(f"nodes={self.nodes}; a cluster has 1 to 64")
        if strangers := {*self.interfaces, *self.private, *self.bind} - {*self.hosts, "*"}:
            raise ValueError(f"no such host: {', '.join(sorted(strangers))}; there are {', '.join(self.hosts)}")
        if {Path("/run"), Path("/dev"), Path("/proc"), Path("/sys")} & {self.folder, *self.folder.parents}:
            raise ValueError(f"folder={self.folder}: a host has a /run, /dev/shm, /proc and /sys of its own; use /tmp")

    @classmethod
    def attach(cls, folder: Path | str) -> "Cluster":
        """The running cluster of a folder; raises ClusterError if there is none."""
        saved = Path(folder).resolve() / ".slurm" / "cluster.json"
        if not saved.exists():
            raise ClusterError(f"no cluster in {folder}; start one with `up N`")
        cluster = cls(**json.loads(saved.read_text()))
        cluster.pid()
        return cluster

    @property
    def hosts(self) -> list[str]:
        return ["ctl", *(f"node{k}" for k in range(1, self.nodes + 1))]

    @property
    def state(self) -> Path:
        return self.folder / ".slurm"

    # ---- up and down

    def __enter__(self) -> "Cluster":
        return self.up()

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self, tied: bool = True) -> "Cluster":
        """Start the hosts, return when all nodes are idle: 0.5 s, 2 s on a busy machine. Raises ClusterError.

        tied: the cluster ends with this process, however it ends; otherwise with `down`.
        """
        if lacks := missing():
            raise ClusterError(advice(lacks))
        if self.running():
            raise ClusterError(f"a cluster is up in {self.folder} already")
        shutil.rmtree(self.state, ignore_errors=True)
        (self.state / "log").mkdir(parents=True)
        settings = {item.name: getattr(self, item.name) for item in fields(self) if item.init}
        (self.state / "cluster.json").write_text(json.dumps(settings, default=str, indent=1))
        command = [*DIE_WITH_PARENT * tied, "unshare", *NAMESPACES, "--fork", "--kill-child=KILL"]
        command += [*self.insider("cluster"), *self.hosts]
        with (self.state / "log" / "cluster").open("w") as log:
            self.process = process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True, env={"PATH": PATH, "HOME": "/root", "SHELL": "/bin/bash"}, text=True,
            )  # fmt: skip
        try:
            assert process.stdout
            if process.stdout.readline() != "up\n":
                raise ClusterError("a host did not start")
            idle = ["idle"] * self.nodes
            wait_until(lambda: self.node_states() == idle, 120, "all nodes idle")
        except BaseException as error:
            self.down()
            if isinstance(error, ClusterError):
                raise ClusterError(f"{error}; its logs are in {self.state / 'log'}") from None
            raise
        return self

    def down(self) -> None:
        """End every process of the cluster; returns when they are gone. Logs stay."""
        if pid := self.running():
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not Path(f"/proc/{pid}").exists(), 60, f"process {pid} gone")
        if self.process:
            self.process.kill()
            self.process.communicate()

    def running(self) -> int | None:
        """Process id, here outside, of the cluster's first process."""
        try:
            pid = int((self.state / "cluster.pid").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return pid if os.fsencode(self.state) in command else None

    def pid(self) -> int:
        """The same; raises ClusterError if there is no cluster."""
        if pid := self.running():
            return pid
        raise ClusterError(f"no cluster is up in {self.folder}")

    # ---- commands on a host

    def inside(self, host: int | str | None, command: Sequence[str]) -> list[str]:
        """The command line, for outside, of a command on a host, or with None between the hosts, at the switch."""
        steps = [self.pid()]
        if host is not None:
            # A process id as the cluster counts: only from within it can the host's namespaces be entered.
            steps.append(int(self.pid_file(host).read_text()))
        line: list[str] = []
        for pid in steps:
            line += ["nsenter", f"--target={pid}", *NAMESPACES, "--", *DIE_WITH_PARENT]
        return [*line, *command]

    def insider(self, part: str) -> list[str]:
        """The command line of inside.py."""
        return [sys.executable, "-I", "-S", str(INSIDE), str(self.state), part]

    def at_switch(self, *command: str) -> None:
        """Run a command between the hosts. Raises ClusterError if it fails."""
        done = subprocess.run(self.inside(None, command), env={"PATH": PATH}, capture_output=True, text=True)
        if done.returncode:
            raise ClusterError(f"{shlex.join(command)}: exit code {done.returncode} {done.stderr.strip()}")

    def pid_file(self, host: int | str, on: bool = True) -> Path:
        """Of the host's first process; there while the host is on. Raises ClusterError for a host that is not `on`."""
        name = f"node{host}" if isinstance(host, int) or host.isdigit() else host
        if name not in self.hosts:
            raise ClusterError(f"no such host: {name}; there are {', '.join(self.hosts)}")
        path = self.state / f"{name}.pid"
        if path.exists() != on:
            raise ClusterError(f"{name} is {'switched off' if on else 'on'}")
        return path

    def popen(
        self, host: int | str, command: Command, *, cwd: Path | str | None = None, env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> "subprocess.Popen[str]":  # fmt: skip
        """Start a command on a host, a string by bash; `options` as in subprocess.Popen.

        It sees this process's environment without SLURM's variables, and `env`. A signal to the returned process ends
        the command by SIGKILL; for another signal, send it on the host: `run(host, ["pkill", ...])`.
        """
        words = ["bash", "-c", command] if isinstance(command, str) else [str(word) for word in command]
        line = self.inside(host, ["env", f"--chdir={cwd or self.folder}", *words])
        return subprocess.Popen(line, env=environment(env or {}), text=True, **options)

    def run(
        self, host: int | str, command: Command, *, check: bool = True, timeout: float = 240, stdin: str = "",
        **options: Any,
    ) -> "subprocess.CompletedProcess[str]":  # fmt: skip
        """Run a command on a host as `popen` does (cwd, env) and return what it wrote to stdout and stderr.

        stdin: what it reads. Raises ClusterError if it fails (unless check=False) or takes longer than `timeout` s.
        """
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with self.popen(host, command, start_new_session=True, **pipes, **options) as process:
            try:
                out, err = process.communicate(stdin, timeout)
                ended = f"exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # its children, too: they hold the pipes
                out, err = process.communicate()
                log = (self.state / "log" / "slurmctld").read_text(errors="replace").splitlines()
                check, ended = True, "\n".join([f"not done in {timeout} s; slurmctld's log ends:", *log[-10:]])
        if check and process.returncode:
            words = command if isinstance(command, str) else shlex.join(map(str, command))
            raise ClusterError(f"{host}: {words}: {ended}\n{out[-2000:]}{err[-2000:]}".rstrip())
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    # ---- hardware

    def power_off(self, host: int | str) -> None:
        """Take the power from a node (its number) or any host: the others see silence, no closed connection."""
        path = self.pid_file(host)
        self.unplug(host)
        pid = path.read_text()
        self.at_switch("sh", "-c", f"kill -KILL {pid} && while kill -0 {pid} 2>&-; do sleep 0.01; done")
        path.unlink()

    def boot(self, host: int | str) -> None:
        """Power up again what `power_off` took down, cable plugged in; returns when its daemons run (0.2 s).

        SLURM sees a node a moment later, all nodes 5 s after a boot of ctl: `wait_node`. /run, /dev/shm and private
        folders start empty. slurmctld writes down within 5 s what happens: the latest news is lost with ctl's power.
        """
        self.at_switch(*self.insider("boot"), self.pid_file(host, on=False).stem)

    def unplug(self, host: int | str) -> None:
        """Pull the network cable of a node (its number) or any host; the processes on it go on."""
        self.at_switch("ip", "link", "set", f"to-{self.pid_file(host).stem}", "down")

    def plug(self, host: int | str) -> None:
        """Plug the cable in again.

        A requeued job that may start on this node at once finds its old self there: SLURM drains the node then.
        """
        self.at_switch("ip", "link", "set", f"to-{self.pid_file(host).stem}", "up")

    # ---- SLURM

    def node_states(self) -> list[str]:
        """Of node1, node2 ...: "idle", "mixed", "down" ...; a star means that the node does not answer."""
        done = self.run("ctl", ["sinfo", "-h", "-N", "-p", "debug", "-o", "%N %T"], check=False)
        states = dict(line.split() for line in done.stdout.splitlines())
        return [states.get(name, "unknown") for name in self.hosts[1:]]

    def sbatch(self, script: str, *options: str) -> int:
        """Submit a script (its text); returns the job's number."""
        return int(self.run("ctl", ["sbatch", "--parsable", *options], stdin=script).stdout)

    def job(self, job: int) -> dict[str, str]:
        """What SLURM says of a job: JobState, Restarts, NodeList, ExitCode and so on."""
        words = self.run("ctl", ["scontrol", "show", "job", "-o", str(job)]).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_job(self, job: int, state: str, seconds: float) -> float:
        """Wait for a job to be PENDING, RUNNING, COMPLETED ...; returns the seconds that it took."""
        return wait_for(lambda: self.job(job)["JobState"], state, seconds, f"job {job}")

    def wait_node(self, k: int, state: str, seconds: float) -> float:
        """Wait for the node to be "idle", "down" ... (see `node_states`); returns the seconds that it took."""
        return wait_for(lambda: self.node_states()[k - 1], state, seconds, f"node{k}")

    def end_in(self, job: int, seconds: int) -> None:
        """Let a running job's time limit fall `seconds` from now; see the module's docstring for what follows."""
        self.run("ctl", ["scontrol", "update", f"JobId={job}", f"EndTime=now+{seconds}"])


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's, without what a SLURM job around it has set, and with the daemons' folders on PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
    return {**kept, "PATH": f"{kept.get('PATH', '')}:{PATH}", **more}


def main() -> int | str:
    parser = argparse.ArgumentParser(description="A real SLURM cluster on this machine: ctl and node1 to nodeN.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="what this machine lacks")
    up = commands.add_parser("up", help="start N nodes; they stay until `down`")
    up.add_argument("nodes", type=int, metavar="N")
    up.add_argument("--cpus", type=int, default=8, help="that a node says it has (default: %(default)s)")
    up.add_argument("--gpus", type=int, default=0, help="likewise (default: %(default)s)")
    up.add_argument("--slurmd-timeout", type=int, default=10, help="seconds (default: %(default)s)")
    commands.add_parser("down", help="end everything; logs stay")
    commands.add_parser("status", help="nodes and jobs")
    on = commands.add_parser("exec", help="run CMD on HOST (ctl, node1, ...), in this folder")
    on.add_argument("host")
    on.add_argument("words", nargs=argparse.REMAINDER, metavar="CMD")
    for name in ("power-off", "boot", "unplug", "plug"):
        commands.add_parser(name, help=f"{name} node K, or any host by name").add_argument("host", metavar="K")
    args = parser.parse_args()
    try:
        return command(args)
    except (ClusterError, ValueError, OSError) as error:
        return f"cluster.py: {error}"


def command(args: argparse.Namespace) -> int | str:
    """Do what the command line says; returns the exit code, or the line for stderr that makes it 1."""
    if args.command == "check" or os.geteuid() != 0:
        lacks = missing()
        print(advice(lacks) if lacks else "nothing is missing", file=sys.stderr if lacks else sys.stdout)
        return int(bool(lacks))
    if args.command == "up":
        if args.folder == FOLDER:  # anybody can make it, and keys of sshd and munge go there
            from mythos_dist.private import make_private_folder

            make_private_folder(FOLDER, "give another --folder")
        cluster = Cluster(args.nodes, args.folder, cpus=args.cpus, gpus=args.gpus, slurmd_timeout=args.slurmd_timeout)
        cluster.up(tied=False)
        print(f"{' '.join(cluster.hosts)} are up in {cluster.folder}")
        return 0
    cluster = Cluster.attach(args.folder)
    if args.command == "down":
        cluster.down()
    elif args.command == "status":
        print(cluster.run("ctl", "sinfo -N -p debug -o '%8N %8T %5C %12G %E' && squeue").stdout, end="")
    elif args.command == "exec":
        line = cluster.inside(args.host, ["env", f"--chdir={os.getcwd()}", *(args.words or ["bash"])])
        os.execvpe(line[0], line, environment({}))
    else:
        getattr(cluster, args.command.replace("-", "_"))(args.host)
    return 0


if __name__ == "__main__":
    sys.exit(main())
