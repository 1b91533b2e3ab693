"""Code that runs inside the cluster of cluster.py: the first process of the cluster and of every host.

python inside.py STATE cluster HOST...    create the switch, boot the hosts, keep running
python inside.py STATE boot HOST...       boot hosts; returns when their daemons run
python inside.py STATE host HOST          (started by boot) the first process of a host

A first process runs until it is killed; the kernel then kills everything in its PID namespace. STATE is the folder that
cluster.py has written. Only the standard library is imported, without site-packages, so that it starts in about 0.02 s.
"""

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMESPACES = ["--mount", "--net", "--uts", "--ipc", "--pid"]
MS_BIND, MS_MOVE, MS_REC = 0x1000, 0x2000, 0x4000
ETC = {"hosts": "/etc/hosts", "shadow": "/etc/shadow", "slurm": "/etc/slurm", "ssh": "/etc/ssh"}
MUNGED = "munged --force --key-file={state}/munge.key --log-file={state}/log/munged-{host} --seed-file=/run/munge/seed"

SLURM_CONF = """\
ClusterName=drill
SlurmctldHost=ctl(10.77.0.254)
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until the credentials of its old run have expired: 120 s by default.
AuthInfo=cred_expire={cred_expire}
# No cgroups, no accounting, no MPI, and the hardware as configured in this file.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU={memory_per_cpu}
GresTypes=gpu
# Short intervals and timeouts.
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
SlurmdTimeout={slurmd_timeout}
KillWait={kill_wait}
OverTimeLimit=0
MinJobAge=3600
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=60
UnkillableStepTimeout=120
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={state}/slurmctld
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={state}/log/slurmctld
SlurmdLogFile={state}/log/slurmd-%n
NodeName={names} CPUs={cpus} RealMemory={memory_mib} {gres} State=UNKNOWN
PartitionName=debug Nodes={names} MaxTime=INFINITE PriorityTier=5 PreemptMode=OFF Default=YES
PartitionName=low Nodes={names} MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes={names} MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF
"""
SSHD_CONFIG = """\
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/key.pub
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
MaxSessions 100
"""
SSH_CONFIG = """\
IdentityFile /etc/ssh/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
BatchMode yes
ConnectTimeout 20
LogLevel ERROR
"""


def mount(source: Path | str, target: Path, kind: str = "", flags: int = 0) -> None:
    """mount(2). Raises OSError, which names the target."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(os.fsencode(source), os.fsencode(target), kind.encode(), flags, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def create_mount_point(source: Path, target: Path) -> None:
    """Create a mount point for `source`: a folder for a folder, a file for a file."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()


def keep_mounted(source: Path, name: str) -> Path:
    """Keep a file or folder reachable when something is mounted over its path; returns its second path."""
    held = Path("/run/held", name)
    create_mount_point(source, held)
    mount(source, held, flags=MS_BIND | MS_REC)
    return held


def move_mount(held: Path, target: Path) -> None:
    """Move the mount at the path that `keep_mounted` returned to `target`."""
    create_mount_point(held, target)
    mount(held, target, flags=MS_MOVE)


def cover(path: Path, kind: str = "tmpfs", keep: Path | None = None) -> None:
    """Mount a new file system of this host over `path`; `keep`, a folder in it, stays visible."""
    held = keep_mounted(keep, "keep") if keep and keep.exists() else None
    path.mkdir(parents=True, exist_ok=True)
    mount(kind, path, kind)
    if held and keep:
        move_mount(held, keep)


def announce(line: str) -> None:
    """Send a line to the process that started this one; after "up", redirect stdout to /dev/null."""
    print(line, flush=True)
    if line == "up":
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def stay() -> None:
    """Run as the first process: reap orphaned processes."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.1)


def configure(state: Path, hosts: list[str]) -> None:
    """Write the hosts' files for /etc, and keys."""
    mine = settings(state)
    for name in ("etc/slurm", "etc/ssh", "slurmctld"):
        (state / name).mkdir(parents=True)
    names = f"node[1-{len(hosts) - 1}]"
    more = {"state": state, "names": names, "memory_per_cpu": mine["memory_mib"] // mine["cpus"]}
    more["gres"] = f"Gres=gpu:{mine['gpus']}" if mine["gpus"] else ""
    devices = [f"Name=gpu File=/run/gpu{index}\n" for index in range(mine["gpus"])]
    files = {
        "hosts": "\n".join(["127.0.0.1 localhost", *(f"{address(host)} {host}" for host in hosts), ""]),
        # sshd refuses a user whose password is locked ("!"), as root's is on many machines.
        "shadow": "root:*:19000:0:99999:7:::\n",
        "slurm/slurm.conf": "\n".join([SLURM_CONF.format_map({**mine, **more}), *mine["conf"], ""]),
        "slurm/gres.conf": "AutoDetect=off\n" + "".join(devices),
        "slurm/cgroup.conf": "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/run/no-cgroup\n",  # "disabled" came with 24.05
        "ssh/sshd_config": SSHD_CONFIG,
        "ssh/ssh_config": SSH_CONFIG,
    }
    for name, text in files.items():
        (state / "etc" / name).write_text(text)
    (state / "munge.key").write_bytes(os.urandom(128))
    for path in (state / "munge.key", state / "etc" / "shadow"):
        path.chmod(0o600)
    for name in ("host_key", "key"):
        key = str(state / "etc" / "ssh" / name)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)


def address(host: str) -> str:
    return f"10.77.0.{254 if host == 'ctl' else host.removeprefix('node')}"


def cluster(state: Path, hosts: list[str]) -> None:
    """The cluster's first process: the switch, and the hosts' files in /etc."""
    (state / "cluster.pid").write_text(
        os.readlink("/proc/self")
    )  # in the outer PID namespace, whose /proc is still mounted
    mount("proc", Path("/proc"), "proc")
    configure(state, hosts)
    for name, target in ETC.items():
        mount(state / "etc" / name, Path(target), flags=MS_BIND)
    cover(Path("/run"))
    ip("link set lo up", "link add switch type bridge", "link set switch up")
    boot(state, hosts)
    announce("up")
    stay()


def ip(*commands: str) -> None:
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)


def boot(state: Path, hosts: list[str]) -> None:
    """Start the first process of each host and plug in its cable; returns when its daemons run."""
    started: dict[str, subprocess.Popen[str]] = {}
    for name in hosts:
        command = ["unshare", *NAMESPACES, "--fork", "--kill-child=KILL", *this_script(), str(state), "host", name]
        with (state / "log" / name).open("a") as log:
            started[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
    pids = {name: plug_in(name, process, interface(settings(state), name)) for name, process in started.items()}
    for name, process in started.items():
        assert process.stdout
        if process.stdout.readline() != "up\n":
            sys.exit(f"{name} did not start; see {state / 'log' / name}")
        (state / f"{name}.pid").write_text(pids[name])


def plug_in(name: str, process: "subprocess.Popen[str]", interface: str) -> str:
    """Connect a new host to the switch and let it continue; returns its process id."""
    assert process.stdin and process.stdout
    pid = process.stdout.readline().strip()
    # The kernel may not have removed the cable of a killed host yet.
    subprocess.run(["ip", "link", "delete", f"to-{name}"], stderr=subprocess.DEVNULL)
    ip(
        f"link add to-{name} type veth peer name {interface} netns {pid}",
        f"link set to-{name} master switch up",
    )
    process.stdin.write("plugged in\n")
    process.stdin.flush()
    return pid


def this_script() -> list[str]:
    return [sys.executable, "-I", "-S", str(Path(__file__).resolve())]


def settings(state: Path) -> dict[str, Any]:
    return json.loads((state / "cluster.json").read_text())


def interface(settings: dict[str, Any], host: str) -> str:
    return settings["interfaces"].get(host, "eth0")


def host(state: Path, name: str) -> None:
    """A host's first process: its own view of files and network, then its daemons."""
    announce(os.readlink("/proc/self"))  # in the cluster's PID namespace, whose /proc is still mounted
    sys.stdin.readline()
    mine = settings(state)
    socket.sethostname(name)
    mount("proc", Path("/proc"), "proc")
    cover(Path("/run"))
    cover(Path("/dev/shm"))
    cover(Path("/sys"), "sysfs", keep=Path("/sys/fs/cgroup"))  # /sys/class/net lists the interfaces of the mounter
    if (keys := Path("~root/.ssh").expanduser()).exists():
        cover(keys)  # hide the machine's own keys and settings
    cable = interface(mine, name)
    ip("link set lo up", f"addr add {address(name)}/24 dev {cable}", f"link set {cable} up")
    own_folders(mine, name, Path(mine["folder"]), state)
    for index in range(mine["gpus"]):  # SLURM only counts device files: copies of /dev/null
        os.mknod(f"/run/gpu{index}", 0o20666, os.makedev(1, 3))
    for folder in ("munge", "sshd", "slurmd"):
        Path("/run", folder).mkdir(mode=0o755)
    with (state / "log" / name).open("a") as log:
        sshd = f"/usr/sbin/sshd -E {state}/log/sshd-{name}"
        for daemon in (MUNGED.format(state=state, host=name), sshd, "slurmctld" if name == "ctl" else "slurmd"):
            subprocess.run(daemon.split(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)
    announce("up")
    stay()


def own_folders(mine: dict[str, Any], name: str, folder: Path, state: Path) -> None:
    """Mount this host's private folders and its bind mounts; the cluster's own files stay visible."""
    pairs = [(Path(source), Path(target)) for who in ("*", name) for source, target in mine["bind"].get(who, ())]
    held = [(keep_mounted(source, str(index)), target) for index, (source, target) in enumerate(pairs)]
    for path in sorted(Path(path) for who in ("*", name) for path in mine["private"].get(who, ())):
        cover(path, keep=state if path == folder else folder if path in folder.parents else None)
    for source, target in held:
        move_mount(source, target)


if __name__ == "__main__":
    state, part, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if part == "cluster":
        cluster(state, names)
    elif part == "boot":
        boot(state, names)
    else:
        host(state, names[0])
