"""Check that a config fits on the requested nodes, print the sbatch command, and submit it.

Exit codes: 0 submitted, or printed with --dry-run; 2 configuration or input error; others: sbatch's.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from mythos_dist.config.arguments import add_config, parse_arguments
from mythos_dist.config.load import load_config
from mythos_dist.errors import UserError, run_command
from mythos_dist.ops.cluster.allocation import check_allocation, even_allocation
from mythos_dist.ops.cluster.hostfile import MAX_COUNT
from mythos_dist.packaged import LAUNCH

SCRIPT = LAUNCH.resolve() / "slurm.sbatch"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_config(parser, "a YAML file, such as configs/1b.yaml")
    add("--nodes", type=int, required=True)
    add("--ranks-per-node", type=int, help="default: --gpus-per-node, else 1")
    add("--gpus-per-node", type=int)
    add("--cpus-per-rank", type=int)
    add("--time", help="time limit of one job, such as 24:00:00")
    add("--partition")
    add("--account")
    add("--chain", type=int, metavar="K", help="submit K jobs that run one after the other and are not requeued")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="another option for sbatch, such as --sbatch=--qos=high; may be repeated",
    )
    add("--dry-run", action="store_true", help="print the command without submitting it")
    return parser


def check_counts(arguments: argparse.Namespace) -> None:
    """Raises UserError with all counts out of range. SLURM gives 0 and negative values other meanings."""
    counts = {name: getattr(arguments, name) for name in ("nodes", "ranks_per_node", "gpus_per_node", "cpus_per_rank")}
    problems = [
        f"--{name.replace('_', '-')} {number}: give an integer from 1 to {MAX_COUNT:,}"
        for name, number in {**counts, "chain": arguments.chain}.items()
        if number is not None and not 1 <= number <= MAX_COUNT
    ]
    if problems:
        raise UserError(problems)


def sbatch_command(arguments: argparse.Namespace, ranks_per_node: int, name: str) -> list[str]:
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
    return [*command, *arguments.sbatch, str(SCRIPT), arguments.config, *arguments.overrides]


def main() -> None:
    """Check, print, submit."""
    arguments = parse_arguments(build_parser())
    ranks_per_node = arguments.ranks_per_node or arguments.gpus_per_node or 1
    check_counts(arguments)
    config = load_config(arguments.config, arguments.overrides)
    allocation = even_allocation(arguments.nodes * ranks_per_node, arguments.nodes, arguments.gpus_per_node)
    for note in check_allocation(config, allocation, arguments.config):
        print(f"note: {note}", file=sys.stderr)
    command = sbatch_command(arguments, ranks_per_node, Path(config.run.dir).resolve().name)
    print(shlex.join(command), flush=True)
    if not arguments.dry_run and not shutil.which("sbatch"):
        raise UserError("sbatch is not installed here; run this script, or the command above, on a login node")
    if not arguments.dry_run:
        sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    run_command(main)
