"""Every launcher at world sizes 1, 2, 3 and 5: all ranks join the process group.

One rank, and more than two, take the same code path as two; those tests are marked long.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.cluster import Cluster, install_hint, missing
from helpers.ports import reserved_port

from mythos_dist.ops.demo import LAUNCH, TORCHRUN

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PROGRAM = ["helpers.join", str(REPOSITORY / "configs" / "tiny_cpu.yaml"), "faults.join_within=100"]
STALE = {
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if name not in STALE and not name.startswith(("SLURM", "MYTHOS", "TORCHELASTIC", "LOCAL_"))
}
CLEAN |= {
    "PYTHONPATH": str(REPOSITORY / "tests"), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    "PATH": f"{BIN}:{os.environ['PATH']}",
}  # fmt: skip

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1600)]
long = pytest.mark.long


def torchrun(ranks: int, *options: str) -> list[str]:
    return [str(BIN / "torchrun"), *options, f"--nproc_per_node={ranks}", "-m", *PROGRAM]


def joined_lines(command: list[str], folder: Path, **variables: str) -> list[str]:
    """The line that each rank prints when it has joined."""
    done = subprocess.run(
        command, env=CLEAN | variables, cwd=folder, capture_output=True, text=True, timeout=1400, start_new_session=True
    )
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return sorted(line for line in done.stdout.splitlines() if line.startswith("joined"))


def all_joined(world: int) -> list[str]:
    return [f"joined {rank} of {world}" for rank in range(world)]


@pytest.mark.parametrize(
    "variables",
    [pytest.param({}, id="nothing set", marks=long), pytest.param(STALE, id="variables of an earlier torchrun")],
)
def test_python_alone(variables, tmp_path):
    assert joined_lines([sys.executable, "-m", *PROGRAM], tmp_path, **variables) == all_joined(1)


@pytest.mark.parametrize("world", [1, pytest.param(3, marks=long)])
def test_torchrun_standalone(world, tmp_path):
    """The agent hosts the store, also for a single rank."""
    assert joined_lines(torchrun(world, "--standalone", "--max-restarts=2"), tmp_path) == all_joined(world)


@pytest.mark.parametrize("world", [pytest.param(1, marks=long), 2, pytest.param(5, marks=long)])
def test_torchrun_with_a_port(world, tmp_path):
    with reserved_port() as port:
        assert joined_lines(torchrun(world, f"--master_port={port}"), tmp_path) == all_joined(world)


@pytest.mark.skipif(subprocess.run(["unshare", "--uts", "true"]).returncode != 0, reason="needs a namespace of its own")
def test_the_demo_starts_where_the_name_of_the_machine_has_no_address(tmp_path):
    """torchrun alone would wait 5 minutes for that name."""
    renamed = ["unshare", "--uts", "sh", "-c", 'hostname no-address.invalid; exec "$@"', "sh"]
    assert joined_lines([*renamed, *TORCHRUN, "--nproc_per_node=2", "-m", *PROGRAM], tmp_path) == all_joined(2)
    assert LAUNCH[: len(TORCHRUN)] == TORCHRUN


def test_torchrun_restarts_with_the_store_of_the_first_attempt(tmp_path):
    """Entries of the first attempt are ignored."""
    assert joined_lines(torchrun(2, "--standalone", "--max-restarts=2"), tmp_path, FAIL_FIRST="1") == all_joined(2)


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=long) for world in (1, 3, 5))])
def test_deepspeed(world, tmp_path):
    """With two ranks, also with variables of an earlier launch in the environment."""
    stale = STALE if world == 2 else {}
    with reserved_port() as port:
        command = [str(BIN / "deepspeed"), f"--num_gpus={world}", f"--master_port={port}"]
        assert joined_lines([*command, "--no_local_rank", "--module", *PROGRAM], tmp_path, **stale) == all_joined(world)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with Cluster(nodes=2, folder=tmp_path_factory.mktemp("launchers")) as cluster:
        yield cluster


@pytest.mark.skipif(bool(missing()), reason=install_hint(missing()))
@pytest.mark.parametrize(("world", "nodes"), [(2, 2), *(pytest.param(world, 1, marks=long) for world in (1, 3, 5))])
def test_srun(world, nodes, cluster):
    command = ["srun", f"--nodes={nodes}", f"--ntasks={world}", sys.executable, "-m", *PROGRAM]
    done = cluster.run(
        "ctl", command, env={name: CLEAN[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS")}, timeout=1200
    )
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("joined")) == all_joined(world)


@pytest.mark.skipif(bool(missing()), reason=install_hint(missing()))
def test_torchrun_within_srun(cluster):
    """Ranks and store come from torchrun, not from SLURM; two agents share one store."""
    agents = ["--rdzv_backend=c10d", "--rdzv_endpoint=node1:29400", "--nnodes=2"]
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", *torchrun(1, *agents)]
    done = cluster.run(
        "ctl", command, env={name: CLEAN[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS")}, timeout=1200
    )
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("joined")) == all_joined(2)
