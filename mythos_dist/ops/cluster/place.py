"""Which rank this process is: what torchrun, deepspeed, srun, Open MPI or MPICH have put into its environment.

RANK and its like count first, so a launcher inside another (torchrun under srun) is the one that is heard.
The trap: a batch script has SLURM_PROCID and SLURM_NTASKS too, and is no rank. Only srun sets SLURM_STEP_NUM_TASKS.
"""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from mythos_dist.errors import UserError

# What each launcher calls (rank, number of ranks, rank on this node, ranks on this node); the last two may be missing.
_NAMES = {
    "torchrun or deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    "Open MPI": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


@dataclass(frozen=True)
class Place:
    """One process among the ranks."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1  # ranks on this node
    node: str = "localhost"
    launcher: str = ""  # empty: this process is alone
    launch: str = ""  # names one submission over all its restarts; empty: nobody has named it
    master: str = ""  # MASTER_ADDR: the node of rank 0
    port: int = 0  # MASTER_PORT

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}"


def find_place(environment: Mapping[str, str] | None = None) -> Place:
    """Read the environment. Raises UserError if it is half set, or set to what is no number."""
    env = os.environ if environment is None else environment
    node = re.sub(r"[^\w.-]", "_", socket.gethostname(), flags=re.ASCII)  # it goes into files and command lines
    launch = launch_of(env)
    for launcher, (rank, world, local, local_world) in _NAMES.items():
        if rank not in env or world not in env:
            continue
        numbers = {name: env[name] for name in (rank, world, local, local_world) if name in env}
        if bad := [f"{name}={value}" for name, value in numbers.items() if not value.isdecimal()]:
            raise UserError(f"{', '.join(bad)} on {node}: not a number; unset it, or start with one of {list(_NAMES)}")
        found = {name: int(value) for name, value in numbers.items()}
        on_node = found.get(local_world) or _number(env, "LOCAL_SIZE") or _tasks_here(env) or int(found[world] == 1)
        if found[world] == 1:
            env = {**env, "MASTER_PORT": ""}  # nobody to meet: a left-over one does no harm
        place = Place(
            rank=found[rank],
            world=found[world],
            local_rank=found.get(local, 0),
            local_world=on_node or found[world],
            node=node,
            launcher=launcher,
            launch=launch,
            master=env.get("MASTER_ADDR") or _first_node(env),
            port=_port(env, node),
        )
        if place.rank >= place.world:
            raise UserError(f"{rank}={place.rank} on {node}, but {world}={place.world}: ranks count from 0; mend both")
        _check_outer_launcher(env, place, (rank, world))
        if place.world > 1 and not (place.master and place.port):
            raise UserError(
                f"{place} of {place.world} does not know where rank 0 is; set MASTER_ADDR to its node and MASTER_PORT "
                "to a free port there, or start with launch/slurm.sbatch or launch/deepspeed.sh"
            )
        return place
    if "WORLD_SIZE" in env and env["WORLD_SIZE"] != "1":
        raise UserError(
            f"WORLD_SIZE={env['WORLD_SIZE']} on {node}, but RANK is not set; unset WORLD_SIZE, or use a launcher"
        )
    return Place(node=node, launch=launch)


def _check_outer_launcher(env: Mapping[str, str], place: Place, names: tuple[str, str]) -> None:
    """Raises UserError for RANK and WORLD_SIZE that are left over from something else than this srun or mpirun.

    Every task would take itself for the same rank. A launcher inside another one starts at least one rank per task.
    """
    if names[0] != "RANK" or "TORCHELASTIC_RUN_ID" in env or "CROSS_SIZE" in env:  # torchrun's and DeepSpeed's own
        return
    for launcher, (rank, world, *_) in list(_NAMES.items())[1:]:
        outer_rank, outer_world = _number(env, rank), _number(env, world)
        if outer_world is None or outer_rank is None:
            continue
        if place.world < outer_world or (place.world == outer_world and place.rank != outer_rank):
            raise UserError(
                f"RANK={place.rank} and WORLD_SIZE={place.world} on {place.node}, but {rank}={outer_rank} and "
                f"{world}={outer_world}: they were not set for this {launcher}; unset RANK and WORLD_SIZE"
            )


def _number(env: Mapping[str, str], name: str) -> int | None:
    value = env.get(name, "")
    return int(value) if value.isdecimal() else None


def launch_of(environment: Mapping[str, str] | None = None) -> str:
    """What names this submission over all its restarts; empty: nobody has named it."""
    env = os.environ if environment is None else environment
    return env.get("SLURM_JOB_ID") or env.get("MYTHOS_LAUNCH", "")


def tell_libraries(place: Place, environment: MutableMapping[str, str] = os.environ) -> None:
    """Put it under the names that torch and DeepSpeed read, whoever the launcher was."""
    environment.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.local_world),
    )
    if place.master:
        environment.update(MASTER_ADDR=place.master, MASTER_PORT=str(place.port))


def expand_nodes(nodelist: str) -> list[str]:
    """SLURM's short form, such as "gpu[01-03,7],login": gpu01 gpu02 gpu03 gpu7 login."""
    names = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        expanded = [""]
        for text, ranges in re.findall(r"([^\[]*)(?:\[([^\]]*)\])?", part):
            numbers = []
            for piece in ranges.split(",") if ranges else [""]:
                first, _, last = piece.partition("-")
                numbers += [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)] if last else [first]
            expanded = [name + text + number for name in expanded for number in numbers]
        names += expanded
    return names


def nodes_of_ranks(environment: Mapping[str, str] | None = None) -> dict[int, str]:
    """The node of each rank as srun has placed them (block by block); empty where that cannot be known."""
    env = os.environ if environment is None else environment
    if "SLURM_STEP_NUM_TASKS" not in env or env.get("SLURM_DISTRIBUTION", "block").startswith(
        ("cyclic", "plane", "arb")
    ):
        return {}
    if env.get("WORLD_SIZE", env["SLURM_STEP_NUM_TASKS"]) != env["SLURM_STEP_NUM_TASKS"]:
        return {}  # each task has started several ranks
    nodes, tasks = expand_nodes(env.get("SLURM_STEP_NODELIST", "")), _tasks(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    placed = [node for node, number in zip(nodes, tasks, strict=False) for _ in range(number)]
    return dict(enumerate(placed)) if len(placed) == int(env["SLURM_STEP_NUM_TASKS"]) else {}


def _tasks(text: str) -> list[int]:
    """SLURM's "2(x3),1": [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(number) for number, times in found for _ in range(int(times or 1))]


def _tasks_here(env: Mapping[str, str]) -> int:
    tasks, node = _tasks(env.get("SLURM_STEP_TASKS_PER_NODE", "")), env.get("SLURM_NODEID", "")
    return tasks[int(node)] if node.isdecimal() and int(node) < len(tasks) else 0


def _first_node(env: Mapping[str, str]) -> str:
    nodes = expand_nodes(env.get("SLURM_STEP_NODELIST", ""))
    return nodes[0] if nodes else ""


def _port(env: Mapping[str, str], node: str) -> int:
    """MASTER_PORT, or one that every task of a SLURM job step comes to by itself."""
    text = env.get("MASTER_PORT", "")
    if text:
        if not text.isdecimal() or not 0 < int(text) < 1 << 16:
            raise UserError(f"MASTER_PORT={text} on {node} is no port; set it to a free one from 1024 to 65535")
        return int(text)
    job, step, restart = (env.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    if "SLURM_STEP_NUM_TASKS" not in env:
        return 0
    return 20000 + (int(job) * 64 + int(step) * 8 + int(restart) % 8) % 10000
