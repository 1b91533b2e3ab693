"""The rank of a process, read from the variables that each launcher sets (recorded from SLURM 22.05, DeepSpeed 0.19.8,
Open MPI 4.1 and MPICH 4.0)."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_dist.errors import UserError
from mythos_dist.parallel.launcher import expand_nodes, export_rank_info, nodes_of_ranks, read_rank_info

HOST = socket.gethostname()
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_sruns_variables_are_enough():
    rank_info = read_rank_info(SRUN)
    assert (rank_info.rank, rank_info.world_size, rank_info.local_rank, rank_info.local_world_size) == (2, 4, 0, 2)
    assert rank_info.master_addr == "node1" and rank_info.job_id == "7" and rank_info.launcher == "srun"
    assert str(rank_info) == f"rank 2 on {HOST}"
    assert read_rank_info(SRUN | {"SLURM_PROCID": "3"}).master_port == rank_info.master_port
    assert read_rank_info(SRUN | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "999"}).master_addr == "10.0.0.9"


@given(st.integers(0, 2**26), st.integers(1, 100))
def test_the_port_of_a_job_step_is_its_own(job, restart):
    """Eight steps of a job and of the next one, each at eight restarts in a row: 128 ports from 20000 to 29999."""
    ports = {
        read_rank_info(
            SRUN | {"SLURM_JOB_ID": f"{job + i}", "SLURM_STEP_ID": f"{step}", "SLURM_RESTART_COUNT": f"{restart + j}"}
        ).master_port
        for i in range(2)
        for step in range(8)
        for j in range(8)
    }
    assert len(ports) == 128 and min(ports) >= 20000 and max(ports) < 30000


def test_a_batch_script_is_not_a_rank():
    """It has SLURM_PROCID=0 and SLURM_NTASKS=4, and a training started in it must not wait for three others. A launcher
    that it starts counts."""
    batch = {name: value for name, value in SRUN.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    alone = dict(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="", master_addr="", master_port=0)
    assert vars(read_rank_info(batch)) == alone | dict(node=HOST, job_id="7")
    started = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "65535"}
    rank_info = read_rank_info(batch | started)
    assert (rank_info.rank, rank_info.world_size, rank_info.master_port) == (1, 2, 65535)


def test_the_tasks_of_a_node_are_its_local_world_size():
    """Two nodes with two tasks and one with three; a node that the list does not have."""
    uneven = SRUN | {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x2),3"}
    sizes = [read_rank_info(uneven | {"SLURM_NODEID": str(node)}).local_world_size for node in range(4)]
    assert sizes == [2, 2, 3, 7]


@pytest.mark.parametrize(
    ("names", "launcher"),
    [
        ("RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE", "torchrun or deepspeed"),
        ("OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE", "Open MPI"),
        ("PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS", "MPICH"),
    ],
)
def test_variables_of_other_launchers_are_read(names, launcher):
    """A launcher inside srun has priority; the variables that DeepSpeed reads are set for every launcher."""
    variables = dict(zip(names.split(), "5 8 1 4".split(), strict=True)) | {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    outside = SRUN if launcher == "torchrun or deepspeed" else {}
    rank_info = read_rank_info(outside | variables)
    assert (rank_info.rank, rank_info.world_size, rank_info.local_rank, rank_info.local_world_size) == (5, 8, 1, 4)
    assert rank_info.launcher == launcher
    env: dict[str, str] = {}
    export_rank_info(rank_info, env)
    assert [env[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")] == [
        *("5", "8", "1", "a", "29500")
    ]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "ranks are counted from 0"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "0"}, "MASTER_PORT=0"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "65536"}, "MASTER_PORT=65536"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
    ],
)
def test_incomplete_variables_are_an_error_that_names_the_node(environment, words):
    with pytest.raises(UserError, match=words) as refused:
        read_rank_info(environment)
    assert HOST in str(refused.value)


@pytest.mark.parametrize("stale", [("0", "1"), ("0", "4"), ("3", "4")])
def test_leftover_variables_do_not_give_every_task_the_same_rank(stale):
    """RANK and WORLD_SIZE of a shell's profile, or of an earlier launch, under srun. A launcher within srun counts."""
    address = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    rank, world_size = stale
    stale = {"RANK": rank, "WORLD_SIZE": world_size}
    with pytest.raises(UserError, match=r"SLURM_PROCID=2 and SLURM_STEP_NUM_TASKS=4: .* unset RANK and WORLD_SIZE"):
        read_rank_info(SRUN | stale | address)
    for launcher in ({"TORCHELASTIC_RUN_ID": "x"}, {"CROSS_SIZE": "4"}):
        assert read_rank_info(SRUN | stale | address | launcher).rank == int(rank)
    assert read_rank_info(SRUN | address | {"RANK": "2", "WORLD_SIZE": "4"}).rank == 2


def test_one_rank_needs_no_address():
    """Leftover MASTER_ADDR and MASTER_PORT are ignored."""
    rank_info = read_rank_info({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nowhere", "MASTER_PORT": "x"})
    assert (rank_info.world_size, rank_info.local_world_size, rank_info.master_port) == (1, 1, 0)


def test_deepspeeds_local_size_is_the_local_world_size():
    variables = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    assert read_rank_info(variables).local_world_size == 2


def test_ranks_that_srun_did_not_start_have_no_known_node():
    """torchrun under srun starts two ranks per task: rank 1 is not on the second task's node."""
    assert nodes_of_ranks(SRUN | {"WORLD_SIZE": "8"}) == {} and nodes_of_ranks(SRUN | {"WORLD_SIZE": "4"})[2] == "node2"


def test_slurms_node_lists_are_expanded():
    """As `scontrol show hostnames` prints them."""
    assert expand_nodes("node[1-3]") == ["node1", "node2", "node3"]
    assert expand_nodes("gpu[008-010,12],login,r1n[1-2]-ib") == [
        *("gpu008", "gpu009", "gpu010", "gpu12", "login", "r1n1-ib", "r1n2-ib")
    ]
    assert expand_nodes("") == []
    assert nodes_of_ranks(SRUN) == {0: "node1", 1: "node1", 2: "node2", 3: "node2"}
    assert nodes_of_ranks(SRUN | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"}) == {
        0: "node1",
        1: "node1",
        2: "node2",
    }
    for unknown in ({"SLURM_DISTRIBUTION": "cyclic"}, {"SLURM_STEP_NODELIST": "node1"}, {"SLURM_STEP_NUM_TASKS": "3"}):
        assert nodes_of_ranks(SRUN | unknown) == {}
    assert nodes_of_ranks({}) == {}
