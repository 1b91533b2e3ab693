"""The sbatch command of a run, and the environment of its job."""

import os
import sys
from pathlib import Path
from typing import Any

from mythos_dist.errors import UserError
from mythos_dist.ops.cluster.hostfile import MAX_COUNT
from mythos_dist.packaged import LAUNCH

SCRIPT = LAUNCH.resolve() / "slurm.sbatch"  # of the package


def check_counts(arguments: Any) -> None:
    """Raises UserError with all counts out of range. SLURM gives 0 and negative values other meanings."""
    counts = {name: getattr(arguments, name) for name in ("nodes", "ranks_per_node", "gpus_per_node", "cpus_per_rank")}
    problems = [
        f"--{name.replace('_', '-')} {number}: give an integer from 1 to {MAX_COUNT:,}"
        for name, number in {**counts, "chain": arguments.chain}.items()
        if number is not None and not 1 <= number <= MAX_COUNT
    ]
    if problems:
        raise UserError(problems)


def sbatch_command(arguments: Any, ranks_per_node: int, name: str, script: Path) -> list[str]:
    """The sbatch command. The job has the run's name, so chains by --dependency=singleton work too."""
    options = {
        "job-name": name,
        "nodes": arguments.nodes,
        "ntasks-per-node": ranks_per_node,
        "gpus-per-node": arguments.gpus_per_node,
        "cpus-per-task": arguments.cpus_per_rank,
        "time": arguments.time,
        "partition": arguments.partition,
        "account": arguments.account,
        "array": f"1-{arguments.chain}%1" if arguments.chain else None,
    }
    command = ["sbatch", *(f"--{option}={value}" for option, value in options.items() if value is not None)]
    if arguments.chain:
        command.append("--no-requeue")
    return [*command, *arguments.sbatch, str(script), arguments.config, *arguments.overrides]


def job_variables(script: Path) -> dict[str, str]:
    """Environment variables that the job needs besides those of the shell.

    A checkout has its .venv; jobs of an installed package use the interpreter that submits them.
    """
    is_checkout = script.parent.parent != LAUNCH.parent
    return {} if is_checkout or "PYTHON" in os.environ else {"PYTHON": sys.executable}
