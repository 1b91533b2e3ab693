"""The SLURM cluster isolates its hosts, simulates hardware faults and leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest
from cluster.cluster import Cluster, ClusterError, install_hint, missing, wait_until

pytestmark = [pytest.mark.launch, pytest.mark.skipif(bool(missing()), reason=install_hint(missing()))]

SCRIPT = Path(__file__).with_name("cluster.py")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Three nodes, shared by the tests, which restore their state."""
    with Cluster(nodes=3, folder=tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


def reachable(cluster: Cluster, host: str, seconds: int = 60) -> bool:
    """Whether ssh connects within `seconds`. On a busy machine it is slow; few suffice if no connection is expected."""
    return cluster.run("ctl", ["ssh", "-o", f"ConnectTimeout={seconds}", host, "true"], check=False).returncode == 0


def process_tree(pid: int) -> set[int]:
    """A process and its descendants, in this process's PID namespace."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # ended meanwhile
    tree = {pid}
    while children := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= children
    return tree


def mounts_of(folder: Path) -> list[str]:
    """This process's mounts that a cluster in `folder` could have leaked; other tests also mount file systems."""
    mount_points = "/run", "/dev/shm", "/proc", "/sys", "/etc/hosts", "/etc/shadow", "/etc/slurm", "/etc/ssh"
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if str(folder) in line or line.split()[4] in mount_points]


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


def test_srun_starts_ranks_on_the_nodes(cluster):
    """Two nodes, two tasks each."""
    command = ["srun", "-N2", "--ntasks-per-node=2", "sh", "-c", "echo $SLURM_PROCID $SLURM_LOCALID $(hostname)"]
    ranks = sorted(cluster.run("ctl", command).stdout.splitlines())
    assert ranks == ["0 0 node1", "1 1 node1", "2 0 node2", "3 1 node2"]


def test_ssh_and_pdsh_reach_every_node(cluster):
    """From the login host and from node to node; each host has its own address."""
    assert cluster.run("node1", ["ssh", "node3", "hostname"]).stdout == "node3\n"
    pdsh = cluster.run("ctl", ["pdsh", "-R", "ssh", "-w", "node[1-3]", "hostname -I"]).stdout
    assert sorted(pdsh.split()) == ["10.77.0.1", "10.77.0.2", "10.77.0.3", "node1:", "node2:", "node3:"]


def test_a_timeout_of_a_command_shows_slurmctlds_log(cluster):
    """The command is killed; the error has the end of slurmctld's log, then the command's output."""
    with pytest.raises(ClusterError, match="echo hello; sleep 1000: not done in 10 s") as caught:
        cluster.run(1, "echo hello; sleep 1000", timeout=10)
    log = (cluster.folder / ".slurm" / "log" / "slurmctld").read_text().splitlines()
    assert set(log[-3:]) & set(str(caught.value).splitlines())
    assert "hello" in str(caught.value).splitlines()
    wait_until(lambda: not cluster.run(1, ["pgrep", "-fx", "sleep 1000"], check=False).stdout, 300, "no sleep on node1")


def test_a_node_has_its_own_processes_and_shared_memory(cluster):
    """All hosts share the cluster's folder but not /dev/shm; `pkill` on one node does not affect the others."""
    cluster.run(1, "touch /dev/shm/mine ours")
    assert cluster.run(2, f"ls /dev/shm {cluster.folder}/ours").stdout.split() == [
        f"{cluster.folder}/ours",
        "/dev/shm:",
    ]
    sleepers = [cluster.popen(node, ["sleep", "77"]) for node in (1, 2)]
    wait_until(lambda: cluster.run(1, ["pgrep", "-fx", "sleep 77"], check=False).stdout, 300, "sleep on node1")
    cluster.run(1, ["pkill", "-fx", "sleep 77"])
    assert sleepers[0].wait(60) == -15
    assert sleepers[1].poll() is None
    sleepers[1].kill()
    sleepers[1].wait()
    wait_until(lambda: not cluster.run(2, ["pgrep", "-fx", "sleep 77"], check=False).stdout, 300, "no sleep on node2")


def test_a_node_without_power_can_be_booted_again(cluster):
    """Its processes end and it cannot be reached; after a boot SLURM starts tasks on it."""
    sleeper = cluster.popen(2, ["sleep", "1000"])
    cluster.power_off(2)
    assert sleeper.wait(60) != 0
    assert not reachable(cluster, "node2", 3)
    with pytest.raises(ClusterError, match="node2 is switched off"):
        cluster.run(2, ["true"])
    cluster.boot(2)
    assert reachable(cluster, "node2")
    cluster.wait_node(2, "idle", 120)
    assert cluster.run("ctl", ["srun", "-w", "node2", "hostname"]).stdout == "node2\n"


def test_an_unplugged_node_continues_without_a_network(cluster):
    """It cannot be reached, but its processes continue; after `plug` it can be reached again."""
    sleeper = cluster.popen(1, ["sleep", "1000"])
    cluster.unplug(1)
    assert not reachable(cluster, "node1", 3)
    assert sleeper.poll() is None
    assert cluster.run(1, ["ssh", "-o", "ConnectTimeout=1", "ctl", "true"], check=False).returncode != 0
    cluster.plug(1)
    assert reachable(cluster, "node1")
    sleeper.kill()
    sleeper.wait()
    cluster.wait_node(1, "idle", 120)


def test_a_requeued_job_starts_again_within_seconds(cluster):
    """SLURM_RESTART_COUNT is set in the second run."""
    job = cluster.sbatch("#!/bin/sh\necho run $SLURM_RESTART_COUNT >> runs\n[ $SLURM_RESTART_COUNT ] || sleep 100\n")
    wait_until((cluster.folder / "runs").exists, 300, "the first run")
    cluster.run("ctl", ["scontrol", "requeue", str(job)])
    cluster.wait_job(job, "COMPLETED", 240)
    assert (cluster.folder / "runs").read_text().splitlines() == ["run", "run 1"]
    assert cluster.job(job)["Restarts"] == "1"


def test_the_login_host_can_be_booted_again(tmp_path):
    """The nodes continue without it, and slurmctld reconnects to them."""
    with Cluster(nodes=2, folder=tmp_path) as cluster:
        cluster.power_off("ctl")
        assert cluster.run("node1", ["ssh", "node2", "hostname"]).stdout == "node2\n"
        cluster.boot("ctl")
        for node in (1, 2):
            cluster.wait_node(node, "idle", 120)
        assert cluster.run("ctl", ["srun", "-w", "node2", "hostname"]).stdout == "node2\n"


def test_partition_high_preempts_low(tmp_path):
    """The job of partition `low` gets SIGTERM, and is requeued."""
    script = "#!/bin/bash\ntrap 'echo TERM >> signals' TERM\ntouch signals\nwhile :; do sleep 0.1; done\n"
    with Cluster(nodes=1, folder=tmp_path, grace=0) as cluster:
        low = cluster.sbatch(script, "-p", "low", "--exclusive")
        wait_until((tmp_path / "signals").exists, 300, "the job in low")
        high = cluster.sbatch("#!/bin/sh\n", "-p", "high", "--exclusive")
        cluster.wait_job(high, "COMPLETED", 240)
        assert (tmp_path / "signals").read_text().startswith("TERM\n")
        assert cluster.job(low)["Restarts"] == "1"


def test_hosts_may_differ(tmp_path):
    """Interface names, private folders, bind mounts, simulated GPUs."""
    other = tmp_path / "other"
    shared = tmp_path / "shared"
    for folder in (other, shared, tmp_path / "target"):
        folder.mkdir()
        (folder / folder.name).touch()
    with Cluster(
        nodes=2,
        folder=tmp_path,
        gpus=2,
        interfaces={"node2": "ens7"},
        private={"*": ["/tmp"], "node2": [shared]},
        bind={"node2": [(other, tmp_path / "target")]},
    ) as cluster:
        command = f"ls /sys/class/net {tmp_path}/shared {tmp_path}/target"
        one, two = (cluster.run(k, command).stdout.replace(f"{tmp_path}/", "").split() for k in (1, 2))
        assert one == ["/sys/class/net:", "eth0", "lo", "shared:", "shared", "target:", "target"]
        assert two == ["/sys/class/net:", "ens7", "lo", "shared:", "target:", "other"]
        cluster.run(1, ["touch", "/tmp/mine"])
        assert "mine" not in cluster.run(2, ["ls", "/tmp"]).stdout
        gpus = cluster.run("ctl", ["srun", "-N2", "--gres=gpu:2", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES"])
        assert gpus.stdout == "0,1\n0,1\n"


def test_nothing_is_left_after_down(tmp_path):
    """No process, even an orphan in its own session; no mount, no interface."""
    route = Path("/proc/self/net/route")
    before = mounts_of(tmp_path), route.read_text()
    with Cluster(nodes=2, folder=tmp_path) as cluster:
        cluster.run(1, "setsid sleep 1000 > /dev/null 2>&1 &")
        sleeper = cluster.popen("ctl", ["srun", "-N2", "sleep", "1000"])
        wait_until(lambda: cluster.run("ctl", ["squeue", "-h", "-t", "R"]).stdout, 300, "srun")
        pids = process_tree(cluster.pid()) | process_tree(sleeper.pid)
        assert len(pids) > 20
    sleeper.wait(60)
    assert not alive(pids)
    assert before == (mounts_of(tmp_path), route.read_text())


def test_the_cluster_of_a_killed_test_ends(tmp_path):
    """After SIGKILL, which allows no cleanup."""
    code = f"from cluster import Cluster; Cluster(1, {str(tmp_path)!r}).up(); print('up', flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, cwd=SCRIPT.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "up\n"
        pids = process_tree(process.pid)
        assert len(pids) > 10
        process.kill()
    wait_until(lambda: not alive(pids), 300, "the cluster gone")


def test_two_clusters_are_isolated(cluster, tmp_path):
    """Although they use the same host names and addresses."""
    with Cluster(nodes=1, folder=tmp_path) as second:
        second.run(1, ["touch", "/dev/shm/second"])
        assert "second" not in cluster.run(1, ["ls", "/dev/shm"]).stdout
        second.power_off(1)
        assert reachable(cluster, "node1")
        assert len(cluster.node_states()) == 3
    assert reachable(cluster, "node1")


def test_the_command_line_starts_and_ends_a_cluster(tmp_path):
    """Every call is a separate process; errors are one line."""

    def call(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, str(SCRIPT), "--folder", str(tmp_path), *words], capture_output=True, text=True
        )

    assert call("up", "1").returncode == 0
    try:
        assert call("exec", "node1", "sh", "-c", "hostname; exit 7").stdout == "node1\n"
        assert call("exec", "node1", "sh", "-c", "exit 7").returncode == 7
        assert "node1    idle" in call("status").stdout
        again = call("up", "1")
        assert again.returncode == 1
        assert again.stderr == f"cluster.py: a cluster is up in {tmp_path} already\n"
    finally:
        down = call("down")
    assert (down.returncode, down.stderr) == (0, "")
    assert call("status").stderr == f"cluster.py: no cluster is up in {tmp_path}\n"
    assert call("up", "many").returncode == 2


def test_without_root_the_error_has_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(
        ClusterError, match="a SLURM cluster needs root on this machine; as root: apt-get install slurm-wlm"
    ):
        Cluster(nodes=1, folder=tmp_path).up()
