"""The rank of this process, read from the environment that torchrun, deepspeed, srun, Open MPI or MPICH sets.

RANK and WORLD_SIZE have priority over the variables of srun and MPI: with torchrun under srun, torchrun decides.
The trap: a batch script also has SLURM_PROCID and SLURM_NTASKS but is not a rank. Only srun sets SLURM_STEP_NUM_TASKS.
"""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from mythos_dist.errors import UserError

# Each launcher's variables for (rank, world size, local rank, local world size); the last two may be missing.
_VARIABLES = {
    "torchrun or deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    "Open MPI": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


@dataclass(frozen=True)
class RankInfo:
    """The rank of a process, its node, and the address of rank 0."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: str = "localhost"
    launcher: str = ""  # empty: started without a launcher
    job_id: str = ""  # the same in all restarts of a job; empty: unknown
    master_addr: str = ""  # MASTER_ADDR: the node of rank 0
    master_port: int = 0  # MASTER_PORT

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}"


def read_rank_info(environment: Mapping[str, str] | None = None) -> RankInfo:
    """Read the environment. Raises UserError if variables are missing, contradict each other or are not numbers."""
    env = os.environ if environment is None else environment
    node = re.sub(r"[^\w.-]", "_", socket.gethostname(), flags=re.ASCII)  # used in file names and command lines
    for launcher, names in _VARIABLES.items():
        if names[0] in env and names[1] in env:
            return _read_launcher(env, node, launcher, names)
    if env.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"WORLD_SIZE={env['WORLD_SIZE']} on {node}, but RANK is not set; unset WORLD_SIZE, or use a launcher"
        )
    return RankInfo(node=node, job_id=read_job_id(env))


def _read_launcher(env: Mapping[str, str], node: str, launcher: str, names: tuple[str, ...]) -> RankInfo:
    rank_name, world_name, local_rank_name, local_world_name = names
    values = {name: env[name] for name in names if name in env}
    if invalid := [f"{name}={value}" for name, value in values.items() if not value.isdecimal()]:
        raise UserError(
            f"{', '.join(invalid)} on {node}: not a number; unset it, or use one of the launchers {list(_VARIABLES)}"
        )
    rank, world_size = int(env[rank_name]), int(env[world_name])
    if world_size == 1:
        env = {**env, "MASTER_PORT": ""}  # not used: an invalid value that was left over does no harm
    rank_info = RankInfo(
        rank=rank,
        world_size=world_size,
        local_rank=read_number(env, local_rank_name) or 0,
        local_world_size=(
            read_number(env, local_world_name) or read_number(env, "LOCAL_SIZE") or _tasks_here(env) or world_size
        ),
        node=node,
        launcher=launcher,
        job_id=read_job_id(env),
        master_addr=env.get("MASTER_ADDR") or _first_node(env),
        master_port=_port(env, node),
    )
    if rank >= world_size:
        raise UserError(
            f"{rank_name}={rank} on {node}, but {world_name}={world_size}: ranks are counted from 0; correct both"
        )
    _check_outer_launcher(env, rank_info, rank_name)
    if world_size > 1 and not (rank_info.master_addr and rank_info.master_port):
        raise UserError(
            f"{rank_info} of {world_size} has no address of rank 0; set MASTER_ADDR to its node and MASTER_PORT "
            "to a free port there, or start with launch/slurm.sbatch or launch/deepspeed.sh"
        )
    return rank_info


def _check_outer_launcher(env: Mapping[str, str], rank_info: RankInfo, rank_name: str) -> None:
    """Raises UserError for RANK and WORLD_SIZE that were not set for this srun or mpirun but left over.

    Every task would have the same rank. A launcher inside another one starts at least one rank per task.
    """
    if rank_name != "RANK" or "TORCHELASTIC_RUN_ID" in env or "CROSS_SIZE" in env:  # set by torchrun and DeepSpeed
        return
    for launcher, (rank, world, *_) in _VARIABLES.items():
        outer_rank, outer_world = read_number(env, rank), read_number(env, world)
        if rank == "RANK" or outer_world is None or outer_rank is None:
            continue
        if rank_info.world_size < outer_world or (rank_info.world_size == outer_world and rank_info.rank != outer_rank):
            raise UserError(
                f"RANK={rank_info.rank} and WORLD_SIZE={rank_info.world_size} on {rank_info.node}, but "
                f"{rank}={outer_rank} and {world}={outer_world}: they were not set for this {launcher}; unset RANK and "
                "WORLD_SIZE"
            )


def read_number(env: Mapping[str, str], name: str) -> int | None:
    value = env.get(name, "")
    return int(value) if value.isdecimal() else None


def read_job_id(environment: Mapping[str, str] | None = None) -> str:
    """The ID of a job, the same in all its restarts; empty: unknown. launch/deepspeed.sh sets MYTHOS_LAUNCH."""
    env = os.environ if environment is None else environment
    return env.get("SLURM_JOB_ID") or env.get("MYTHOS_LAUNCH", "")


def export_rank_info(rank_info: RankInfo, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that torch and DeepSpeed read, whatever the launcher was."""
    environment.update(
        RANK=str(rank_info.rank),
        WORLD_SIZE=str(rank_info.world_size),
        LOCAL_RANK=str(rank_info.local_rank),
        LOCAL_WORLD_SIZE=str(rank_info.local_world_size),
    )
    if rank_info.master_addr:
        environment.update(MASTER_ADDR=rank_info.master_addr, MASTER_PORT=str(rank_info.master_port))


def expand_nodes(nodelist: str) -> list[str]:
    """Expand SLURM's node list, such as "gpu[01-03,7],login": gpu01 gpu02 gpu03 gpu7 login."""
    nodes = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        expanded = [""]
        for text, ranges in re.findall(r"([^\[]*)(?:\[([^\]]*)\])?", part):
            numbers = _expand_ranges(ranges)
            expanded = [name + text + number for name in expanded for number in numbers]
        nodes += expanded
    return nodes


def _expand_ranges(ranges: str) -> list[str]:
    """ "01-03,7": 01 02 03 7; leading zeros are kept."""
    numbers = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        if last:
            numbers += [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
        else:
            numbers.append(first)
    return numbers


def nodes_of_ranks(environment: Mapping[str, str] | None = None) -> dict[int, str]:
    """The node of each rank under srun's block distribution; empty if it cannot be known."""
    env = os.environ if environment is None else environment
    tasks = env.get("SLURM_STEP_NUM_TASKS")
    if tasks is None or env.get("SLURM_DISTRIBUTION", "block").startswith(("cyclic", "plane", "arb")):
        return {}
    if env.get("WORLD_SIZE", tasks) != tasks:
        return {}  # each task has started several ranks
    nodes = expand_nodes(env.get("SLURM_STEP_NODELIST", ""))
    tasks_per_node = _expand_tasks(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node_of_rank = [node for node, count in zip(nodes, tasks_per_node, strict=False) for _ in range(count)]
    return dict(enumerate(node_of_rank)) if len(node_of_rank) == int(tasks) else {}


def _expand_tasks(text: str) -> list[int]:
    """SLURM's "2(x3),1": [2, 2, 2, 1]."""
    tasks = []
    for number, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        tasks += [int(number)] * int(repeats or 1)
    return tasks


def _tasks_here(env: Mapping[str, str]) -> int:
    """The tasks of this job step on this node; 0: unknown."""
    tasks, node = _expand_tasks(env.get("SLURM_STEP_TASKS_PER_NODE", "")), read_number(env, "SLURM_NODEID")
    return tasks[node] if node is not None and node < len(tasks) else 0


def _first_node(env: Mapping[str, str]) -> str:
    nodes = expand_nodes(env.get("SLURM_STEP_NODELIST", ""))
    return nodes[0] if nodes else ""


def _port(env: Mapping[str, str], node: str) -> int:
    """MASTER_PORT, or a port that every task of a SLURM job step computes from its job; 0: none."""
    text = env.get("MASTER_PORT", "")
    if text:
        if not text.isdecimal() or not 0 < int(text) < 1 << 16:
            raise UserError(f"MASTER_PORT={text} on {node} is not a port; set it to a free one from 1024 to 65535")
        return int(text)
    if "SLURM_STEP_NUM_TASKS" not in env:
        return 0
    job, step, restart = (env.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    return 20000 + (int(job) * 64 + int(step) * 8 + int(restart) % 8) % 10000
