"""Which rank a process is, by what each launcher leaves in the environment (taken down from the launchers themselves:
SLURM 22.05, DeepSpeed 0.19.8, Open MPI 4.1, MPICH 4.0)."""

import socket

import pytest

from mythos_dist.errors import UserError
from mythos_dist.ops.cluster.place import Place, expand_nodes, find_place, nodes_of_ranks, tell_libraries

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


def test_srun_alone_is_enough():
    place = find_place(SRUN)
    assert (place.rank, place.world, place.local_rank, place.local_world) == (2, 4, 0, 2)
    assert place.master == "node1" and place.launch == "7" and place.launcher == "srun"
    assert str(place) == f"rank 2 on {HOST}"
    assert find_place(SRUN | {"SLURM_PROCID": "3"}).port == place.port >= 1024
    assert find_place(SRUN | {"SLURM_RESTART_COUNT": "1"}).port != place.port
    assert find_place(SRUN | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "999"}).master == "10.0.0.9"


def test_a_batch_script_is_no_rank():
    """It has SLURM_PROCID=0 and SLURM_NTASKS=4, and a training started in it must not wait for three others."""
    batch = {name: value for name, value in SRUN.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    assert find_place(batch) == Place(node=HOST, launch="7")


@pytest.mark.parametrize(
    ("names", "launcher"),
    [
        ("RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE", "torchrun or deepspeed"),
        ("OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE", "Open MPI"),
        ("PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS", "MPICH"),
    ],
)
def test_other_launchers(names, launcher):
    """A launcher inside srun is the one that is heard, and DeepSpeed's names are set for whoever it was."""
    told = dict(zip(names.split(), "5 8 1 4".split(), strict=True)) | {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    outside = SRUN if launcher == "torchrun or deepspeed" else {}
    place = find_place(outside | told)
    assert (place.rank, place.world, place.local_rank, place.local_world) == (5, 8, 1, 4)
    assert place.launcher == launcher
    env: dict[str, str] = {}
    tell_libraries(place, env)
    assert [env[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")] == [
        *("5", "8", "1", "a", "29500")
    ]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "ranks count from 0"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
    ],
)
def test_what_is_half_set_is_refused_with_the_node(environment, words):
    with pytest.raises(UserError, match=words) as refused:
        find_place(environment)
    assert HOST in str(refused.value)


@pytest.mark.parametrize("stale", [{"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "4"}])
def test_variables_that_are_left_over_do_not_make_every_task_the_same_rank(stale):
    """RANK and WORLD_SIZE of a shell's profile, or of an earlier launch, under srun. A launcher within srun counts."""
    address = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    with pytest.raises(UserError, match=r"SLURM_PROCID=2 and SLURM_STEP_NUM_TASKS=4: .* unset RANK and WORLD_SIZE"):
        find_place(SRUN | stale | address)
    for launcher in ({"TORCHELASTIC_RUN_ID": "x"}, {"CROSS_SIZE": "4"}):
        assert find_place(SRUN | stale | address | launcher).rank == 0
    assert find_place(SRUN | address | {"RANK": "2", "WORLD_SIZE": "4"}).rank == 2


def test_one_rank_needs_no_address():
    """What is left of another launch's is not looked at."""
    place = find_place({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nowhere", "MASTER_PORT": "x"})
    assert (place.world, place.local_world, place.port) == (1, 1, 0)


def test_the_ranks_of_a_node_are_counted_as_deepspeed_tells_them():
    told = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    assert find_place(told).local_world == 2


def test_no_node_is_named_for_ranks_that_srun_has_not_placed():
    """torchrun under srun starts two ranks per task: rank 1 is not on the second task's node."""
    assert nodes_of_ranks(SRUN | {"WORLD_SIZE": "8"}) == {} and nodes_of_ranks(SRUN | {"WORLD_SIZE": "4"})[2] == "node2"


def test_slurms_short_names_are_read():
    """As `scontrol show hostnames` prints them."""
    assert expand_nodes("node[1-3]") == ["node1", "node2", "node3"]
    assert expand_nodes("gpu[008-010,12],login,r1n[1-2]-ib") == [
        *("gpu008", "gpu009", "gpu010", "gpu12", "login", "r1n1-ib", "r1n2-ib")
    ]
    assert expand_nodes("") == []
    assert nodes_of_ranks(SRUN) == {0: "node1", 1: "node1", 2: "node2", 3: "node2"}
    assert nodes_of_ranks(SRUN | {"SLURM_DISTRIBUTION": "cyclic"}) == {}
    assert nodes_of_ranks({}) == {}
