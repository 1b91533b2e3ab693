"""A real SLURM cluster of several nodes on one Linux machine, for tests and for manual use.

The cluster has its own namespaces (PID, mount, network, UTS, IPC) with a bridge as the network switch, and each host
has its own namespaces inside them. The cluster's first process dies with the process that started it, and the kernel
then ends all others, so no process outlives a test, even a killed one. The hosts share the machine's file system, CPUs
and clock.

    with Cluster(nodes=2, folder=tmp_path) as cluster:
        cluster.run("ctl", ["srun", "-N2", "--ntasks-per-node=2", "hostname"])

Timing of SLURM 22.05, as measured with this cluster:

- Time limits have a resolution of a minute and are checked every 30 s, first 30 s after the start of slurmctld.
  `end_in(job, S)` sets the end of a running job in seconds. SIGTERM is sent at the first check after that, 0 to 30 s
  late, SIGKILL `kill_wait` (5) seconds later. `--signal=B:USR1@S` is sent at the first check that is less than S + 30 s
  before the end, so up to 30 s early. The fastest drill submits at once and calls `end_in(job, 20)`: SIGTERM is sent
  30 s after `up`.
- A requeue takes 7 s if the job itself requests it, 11 s from outside if its ranks ignore SIGTERM; 5 s of this are
  `cred_expire`.
- Preemption: ranks get SIGTERM within 1 s, the batch shell at the end of the grace time, SIGKILL is sent 5 s later, and
  the job starts again 10 s after that. The end of the grace time is checked every 10 s: grace=1 means 10 s, grace=0
  none.
- A node that does not respond is DOWN after 11 to 20 s (slurmd_timeout=10) or 15 s (5), or 10 s with 5 and
  conf=["MessageTimeout=2"]. Its job runs elsewhere 14 s later, or 20 to 30 s later if the batch shell's node was lost,
  because the other ranks wait for its srun.
- slurmd reports the end of a job 2 to 3 s late. With MessageTimeout=2, messages are lost on a busy machine: the node
  stays COMPLETING, and the next job waits, until slurmctld asks again a minute later.
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
FOLDER = Path("/tmp/mythos-cluster")  # default of the command line
NAMESPACES = ["--mount", "--net", "--uts", "--ipc", "--pid"]
DIE_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"]
INSIDE = Path(__file__).resolve().parent / "inside.py"

Command = Sequence[str | Path] | str  # an argument list, or a line for bash
Paths = Sequence[Path | str]


class ClusterError(RuntimeError):
    """The cluster, or a command on it, failed."""


def missing() -> list[str]:
    """Programs and permissions for a cluster that this machine does not have; empty if a cluster can run."""
    path = os.environ.get("PATH", "") + ":" + PATH
    missing_items = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if os.geteuid() != 0:
        return ["root", *missing_items]
    if not {"unshare", "ip"} & set(missing_items):
        trial = "ip link add br0 type bridge && ip link add one type veth peer name two && mount -t tmpfs none /run"
        command = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "sh", "-c", trial]
        if subprocess.run(command, capture_output=True).returncode:
            missing_items.append("permission to create namespaces, a bridge and mounts (docker: --privileged)")
    return missing_items


def install_hint(missing_items: Sequence[str]) -> str:
    """The message for what `missing` returned."""
    return f"a SLURM cluster needs {', '.join(missing_items)} on this machine; as root: {INSTALL}"


def wait_until(ready: Callable[[], object], seconds: float, what: str) -> float:
    """Poll until `ready` returns true; returns the seconds that this took. Raises ClusterError after `seconds`."""
    start = time.monotonic()
    while not ready():
        if (waited := time.monotonic() - start) > seconds:
            raise ClusterError(f"not within {seconds} s: {what}")
        time.sleep(min(max(0.05, waited / 20), 0.5))  # a SLURM command takes about 0.01 s of a core
    return time.monotonic() - start


def wait_for(get_state: Callable[[], str], state: str, seconds: float, what: str) -> float:
    """The same until `get_state` returns `state`; the error has the actual state."""
    try:
        return wait_until(lambda: get_state() == state, seconds, f"{what} {state}")
    except ClusterError as error:
        raise ClusterError(f"{error}; it is {get_state()}") from None


@dataclass
class Cluster:
    """`ctl` (login, slurmctld) and `node1` to `nodeN` (slurmd), all with munge and sshd, at 10.77.0.254 and 10.77.0.K.

    The cluster's files are in `folder`/.slurm, its logs in `folder`/.slurm/log. Commands start in `folder`. The kernel
    ends the cluster with the thread that calls `up` (or `with`).
    """

    nodes: int
    folder: Path
    cpus: int = 8  # that each node reports
    memory_mib: int = 16000  # that each node reports
    gpus: int = 0  # that each node reports: copies of /dev/null, so that SLURM sets CUDA_VISIBLE_DEVICES
    slurmd_timeout: int = 10  # seconds without a response until a node is DOWN
    kill_wait: int = 5  # seconds from SIGTERM to SIGKILL when SLURM ends a job, or the remaining ranks of one
    cred_expire: int = 5  # seconds before a requeued job may start
    grace: int = 20  # seconds from a preemption's SIGTERM to the end, partition `low`; 1 to 10 are the same
    interfaces: Mapping[str, str] = field(default_factory=dict)  # host -> name of its interface, otherwise eth0
    private: Mapping[str, Paths] = field(default_factory=dict)  # host, or "*" -> its own folders, empty at boot
    bind: Mapping[str, Sequence[Paths]] = field(default_factory=dict)  # host, or "*" -> bind mounts (source, target)
    conf: Sequence[str] = ()  # additional lines for slurm.conf, which override others
    process: "subprocess.Popen[str] | None" = field(default=None, init=False, repr=False)  # started by `up`

    def __post_init__(self) -> None:
        self.folder = Path(self.folder).resolve()
        if not 1 <= self.nodes <= 64:
            raise ValueError(f"nodes={self.nodes}; a cluster has 1 to 64")
        if unknown := {*self.interfaces, *self.private, *self.bind} - {*self.hosts, "*"}:
            raise ValueError(f"no such host: {', '.join(sorted(unknown))}; there are {', '.join(self.hosts)}")
        if {Path("/run"), Path("/dev"), Path("/proc"), Path("/sys")} & {self.folder, *self.folder.parents}:
            raise ValueError(f"folder={self.folder}: each host has its own /run, /dev/shm, /proc and /sys; use /tmp")

    @classmethod
    def attach(cls, folder: Path | str) -> "Cluster":
        """The running cluster in a folder; raises ClusterError if there is none."""
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

    def up(self, end_with_process: bool = True) -> "Cluster":
        """Start the hosts; returns when all nodes are idle, after 0.5 s, or 2 s on a busy machine. Raises ClusterError.

        end_with_process: the cluster ends with this process, however that ends; otherwise only with `down`.
        """
        if missing_items := missing():
            raise ClusterError(install_hint(missing_items))
        if self.running():
            raise ClusterError(f"a cluster is up in {self.folder} already")
        shutil.rmtree(self.state, ignore_errors=True)
        (self.state / "log").mkdir(parents=True)
        settings = {item.name: getattr(self, item.name) for item in fields(self) if item.init}
        (self.state / "cluster.json").write_text(json.dumps(settings, default=str, indent=1))
        command = [*DIE_WITH_PARENT * end_with_process, "unshare", *NAMESPACES, "--fork", "--kill-child=KILL"]
        command += [*self.inside_command("cluster"), *self.hosts]
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
            wait_until(lambda: self.node_states() == idle, 600, "all nodes idle")
        except BaseException as error:
            self.down()
            if isinstance(error, ClusterError):
                raise ClusterError(f"{error}; its logs are in {self.state / 'log'}") from None
            raise
        return self

    def down(self) -> None:
        """End all processes of the cluster and wait until they have ended. Logs are kept."""
        if pid := self.running():
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not Path(f"/proc/{pid}").exists(), 300, f"process {pid} gone")
        if self.process:
            self.process.kill()
            self.process.communicate()

    def running(self) -> int | None:
        """Process id of the cluster's first process, as seen from outside; None if it is not running."""
        try:
            pid = int((self.state / "cluster.pid").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return pid if os.fsencode(self.state) in command else None

    def pid(self) -> int:
        """The same; raises ClusterError if it is not running."""
        if pid := self.running():
            return pid
        raise ClusterError(f"no cluster is up in {self.folder}")

    # ---- commands on a host

    def host_command(self, host: int | str | None, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on a host (None: in the cluster's namespaces, where the switch is)."""
        pids = [self.pid()]
        if host is not None:
            # A process id in the cluster's PID namespace: the host's namespaces can be entered only from there.
            pids.append(int(self.pid_file(host).read_text()))
        line: list[str] = []
        for pid in pids:
            line += ["nsenter", f"--target={pid}", *NAMESPACES, "--", *DIE_WITH_PARENT]
        return [*line, *command]

    def inside_command(self, part: str) -> list[str]:
        """The command line of inside.py."""
        return [sys.executable, "-I", "-S", str(INSIDE), str(self.state), part]

    def at_switch(self, *command: str) -> None:
        """Run a command in the cluster's namespaces, where the switch is. Raises ClusterError if it fails."""
        done = subprocess.run(self.host_command(None, command), env={"PATH": PATH}, capture_output=True, text=True)
        if done.returncode:
            raise ClusterError(f"{shlex.join(command)}: exit code {done.returncode} {done.stderr.strip()}")

    def pid_file(self, host: int | str, on: bool = True) -> Path:
        """The file with the pid of a host's first process, which exists while the host is on.

        Raises ClusterError if the host is off, or with on=False if it is on.
        """
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
        """Start a command on a host; bash runs a string. `options`: as in subprocess.Popen.

        Its environment is that of this process without SLURM's variables, and `env`. A signal to the returned process
        ends the command with SIGKILL; send other signals on the host: `run(host, ["pkill", ...])`.
        """
        arguments = ["bash", "-c", command] if isinstance(command, str) else [str(argument) for argument in command]
        line = self.host_command(host, ["env", f"--chdir={cwd or self.folder}", *arguments])
        return subprocess.Popen(line, env=environment(env or {}), text=True, **options)

    def run(
        self, host: int | str, command: Command, *, check: bool = True, timeout: float = 240, stdin: str = "",
        **options: Any,
    ) -> "subprocess.CompletedProcess[str]":  # fmt: skip
        """Run a command on a host as `popen` does (cwd, env); returns exit code, stdout and stderr.

        stdin: its input. Raises ClusterError if it fails (unless check=False) or takes longer than `timeout` s.
        """
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with self.popen(host, command, start_new_session=True, **pipes, **options) as process:
            try:
                out, err = process.communicate(stdin, timeout)
                ended = f"exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # also its children, which hold the pipes open
                out, err = process.communicate()
                log = (self.state / "log" / "slurmctld").read_text(errors="replace").splitlines()
                check, ended = True, "\n".join([f"not done in {timeout} s; slurmctld's log ends:", *log[-10:]])
        if check and process.returncode:
            shown = command if isinstance(command, str) else shlex.join(map(str, command))
            raise ClusterError(f"{host}: {shown}: {ended}\n{out[-2000:]}{err[-2000:]}".rstrip())
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    # ---- hardware

    def power_off(self, host: int | str) -> None:
        """Cut the power of a node (its number) or any host: it stops responding, and its connections are not closed."""
        path = self.pid_file(host)
        self.unplug(host)
        pid = path.read_text()
        self.at_switch("sh", "-c", f"kill -KILL {pid} && while kill -0 {pid} 2>&-; do sleep 0.01; done")
        path.unlink()

    def boot(self, host: int | str) -> None:
        """Start a host after `power_off`, with its cable plugged in; returns when its daemons run (0.2 s).

        SLURM uses a node a moment later, and all nodes 5 s after a boot of ctl: see `wait_node`. /run, /dev/shm and
        private folders are empty. slurmctld saves its state every 5 s, so `power_off("ctl")` may lose the last changes.
        """
        self.at_switch(*self.inside_command("boot"), self.pid_file(host, on=False).stem)

    def unplug(self, host: int | str) -> None:
        """Pull the network cable of a node (its number) or any host; its processes continue."""
        self.at_switch("ip", "link", "set", f"to-{self.pid_file(host).stem}", "down")

    def plug(self, host: int | str) -> None:
        """Plug the cable in again.

        If a requeued job starts on this node while its previous processes still run there, SLURM drains the node.
        """
        self.at_switch("ip", "link", "set", f"to-{self.pid_file(host).stem}", "up")

    # ---- SLURM

    def node_states(self) -> list[str]:
        """States of node1, node2 ...: "idle", "mixed", "down" ...; with a star if the node does not respond."""
        done = self.run("ctl", ["sinfo", "-h", "-N", "-p", "debug", "-o", "%N %T"], check=False)
        states = dict(line.split() for line in done.stdout.splitlines())
        return [states.get(name, "unknown") for name in self.hosts[1:]]

    def sbatch(self, script: str, *options: str) -> int:
        """Submit a script, given as text; returns the job id."""
        return int(self.run("ctl", ["sbatch", "--parsable", *options], stdin=script).stdout)

    def job(self, job: int) -> dict[str, str]:
        """SLURM's record of a job: JobState, Restarts, NodeList, ExitCode and so on."""
        entries = self.run("ctl", ["scontrol", "show", "job", "-o", str(job)]).stdout.split()
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)

    def wait_job(self, job: int, state: str, seconds: float) -> float:
        """Wait until a job is PENDING, RUNNING, COMPLETED ...; returns the seconds that this took."""
        return wait_for(lambda: self.job(job)["JobState"], state, seconds, f"job {job}")

    def wait_node(self, k: int, state: str, seconds: float) -> float:
        """Wait until a node is "idle", "down" ... (see `node_states`); returns the seconds that this took."""
        return wait_for(lambda: self.node_states()[k - 1], state, seconds, f"node{k}")

    def end_in(self, job: int, seconds: int) -> None:
        """Set the time limit of a running job to `seconds` from now; the module's docstring has the effects."""
        self.run("ctl", ["scontrol", "update", f"JobId={job}", f"EndTime=now+{seconds}"])


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without SLURM's variables, with the daemons' folders on PATH, and with `more`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
    return {**kept, "PATH": f"{kept.get('PATH', '')}:{PATH}", **more}


def main() -> int | str:
    parser = argparse.ArgumentParser(description="A real SLURM cluster on this machine: ctl and node1 to nodeN.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="list what is missing on this machine")
    up = commands.add_parser("up", help="start N nodes, which run until `down`")
    up.add_argument("nodes", type=int, metavar="N")
    up.add_argument("--cpus", type=int, default=8, help="CPUs that each node reports (default: %(default)s)")
    up.add_argument("--gpus", type=int, default=0, help="GPUs that each node reports (default: %(default)s)")
    up.add_argument(
        "--slurmd-timeout", type=int, default=10, help="seconds until a node is DOWN (default: %(default)s)"
    )
    commands.add_parser("down", help="end all processes; logs are kept")
    commands.add_parser("status", help="show nodes and jobs")
    on = commands.add_parser("exec", help="run CMD on HOST (ctl, node1, ...), in this folder")
    on.add_argument("host")
    on.add_argument("arguments", nargs=argparse.REMAINDER, metavar="CMD")
    for name in ("power-off", "boot", "unplug", "plug"):
        commands.add_parser(name, help=f"{name} node K, or any host by name").add_argument("host", metavar="K")
    args = parser.parse_args()
    try:
        return command(args)
    except (ClusterError, ValueError, OSError) as error:
        return f"cluster.py: {error}"


def command(args: argparse.Namespace) -> int | str:
    """Run the command; returns the exit code, or a message for stderr (exit code 1)."""
    if args.command == "check" or os.geteuid() != 0:
        if missing_items := missing():
            return install_hint(missing_items)
        print("nothing is missing")
        return 0
    if args.command == "up":
        if args.folder == FOLDER:  # any user can create it, and it will contain keys of sshd and munge
            from mythos_dist.private import make_private_folder

            make_private_folder(FOLDER, "give another --folder")
        cluster = Cluster(args.nodes, args.folder, cpus=args.cpus, gpus=args.gpus, slurmd_timeout=args.slurmd_timeout)
        cluster.up(end_with_process=False)
        print(f"{' '.join(cluster.hosts)} are up in {cluster.folder}")
        return 0
    cluster = Cluster.attach(args.folder)
    if args.command == "down":
        cluster.down()
    elif args.command == "status":
        print(cluster.run("ctl", "sinfo -N -p debug -o '%8N %8T %5C %12G %E' && squeue").stdout, end="")
    elif args.command == "exec":
        line = cluster.host_command(args.host, ["env", f"--chdir={os.getcwd()}", *(args.arguments or ["bash"])])
        os.execvpe(line[0], line, environment({}))
    else:
        getattr(cluster, args.command.replace("-", "_"))(args.host)
    return 0


if __name__ == "__main__":
    sys.exit(main())
