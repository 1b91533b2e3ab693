"""Who starts ranks here: SLURM, torchrun, deepspeed; and whether what a launcher has told this process is whole."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mythos_dist.ops.doctor.lines import Line, note, ok, problem
from mythos_dist.units import count

PROGRAMS = ("torchrun", "deepspeed", "srun", "sbatch", "pdsh", "ssh")
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
RANK_VARIABLES = (*NUMBERS, "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launcher:
    environment: Mapping[str, str]
    programs: dict[str, str | None]  # path of each; None: not here
    gpus: int


def find(environment: Mapping[str, str], gpus: int) -> Launcher:
    """Programs on PATH, or else beside this Python, where an environment that is not activated has them."""
    beside = os.fspath(Path(sys.executable).parent)
    return Launcher(
        environment, {name: shutil.which(name) or shutil.which(name, path=beside) for name in PROGRAMS}, gpus
    )


def machines(environment: Mapping[str, str]) -> int:
    """How many machines a launcher speaks of; 1 without one."""
    world, local = (_number(environment, name) or 1 for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if "LOCAL_WORLD_SIZE" in environment:
        return -(-world // local)
    return _number(environment, "SLURM_JOB_NUM_NODES") or _number(environment, "SLURM_NNODES") or 1


def lines(found: Launcher) -> Iterator[Line]:
    """The job and the rank that this process is, then the programs."""
    env = found.environment
    if "SLURM_JOB_ID" in env:
        yield from _slurm(env)
    if any(name in env for name in ("RANK", "WORLD_SIZE")):
        yield from _rank(found)
    elif "SLURM_JOB_ID" not in env:
        yield ok("launcher", "none: this process would train alone; several ranks start with torchrun or a scheduler")
    here = [name for name, path in found.programs.items() if path]
    absent = [name for name, path in found.programs.items() if not path]
    yield ok("programs", f"{', '.join(here) or 'none'}" + (f"; not here: {', '.join(absent)}" if absent else ""))
    if not found.programs["srun"] and not (found.programs["pdsh"] and found.programs["ssh"]):
        yield note(
            "programs",
            "nothing here starts ranks on other machines",
            "nothing for one machine; for several use a SLURM login node, or install pdsh and ssh for deepspeed",
        )


def _slurm(env: Mapping[str, str]) -> Iterator[Line]:
    nodes, tasks = machines(env), env.get("SLURM_NTASKS")
    names = env.get("SLURM_JOB_NODELIST", "names unknown")
    text = f"SLURM job {env['SLURM_JOB_ID']}: {nodes} {'node' if nodes == 1 else 'nodes'} ({names})"
    yield ok("launcher", text + (f", {tasks} tasks" if tasks else ""))
    if nodes > 1 and "SLURM_NTASKS_PER_NODE" not in env:
        yield note(
            "launcher",
            f"the job has {count(int(nodes), 'node')} and no --ntasks-per-node: SLURM may place ranks unevenly, such "
            "as 3 + 1",
            "give sbatch --ntasks-per-node",
        )


def _rank(found: Launcher) -> Iterator[Line]:
    env = found.environment
    missing = [name for name in RANK_VARIABLES if name not in env]
    wrong = [f"{name}={env[name]}" for name in NUMBERS if name in env and _number(env, name) is None]
    set_here = ", ".join(f"{name}={env[name]}" for name in RANK_VARIABLES if name in env)
    alone = env.get("WORLD_SIZE", "1") == "1"  # one process finds the rest by itself
    if wrong:
        yield problem("launcher", f"{', '.join(wrong)}: not a number", f"unset {', '.join(NUMBERS)}, or use a launcher")
        return
    if missing and not alone:
        yield problem(
            "launcher",
            f"{set_here}, but {', '.join(missing)} not set: ranks would not find each other",
            "start with torchrun, srun or deepspeed, which set all of them; or unset them",
        )
        return
    yield ok("launcher", set_here)
    local = _number(env, "LOCAL_RANK") or 0
    if found.gpus and local >= found.gpus:
        yield problem(
            "launcher",
            f"LOCAL_RANK={local}, but this process sees {found.gpus} GPU{'s' if found.gpus > 1 else ''}: a rank takes "
            "the GPU of its local number",
            "show all of a machine's GPUs to every rank (SLURM: --gpus-per-node, not --gpus-per-task), or start fewer",
        )


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else None
