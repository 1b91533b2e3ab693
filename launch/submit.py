"""Check that a config fits on the nodes that are asked for, print the sbatch line for it, and submit it.

Exit code 0: submitted, or printed with --dry-run. 2: something has to be mended, and what. Else sbatch's own.
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
from mythos_dist.ops.cluster.allocation import MAX_COUNT, check_allocation, even_allocation

SCRIPT = Path(__file__).with_name("slurm.sbatch")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_config(parser, "a YAML file, such as configs/1b.yaml")
    add("--nodes", type=int, required=True)
    add("--ranks-per-node", type=int, help="--gpus-per-node where that is given, else 1")
    add("--gpus-per-node", type=int)
    add("--cpus-per-rank", type=int)
    add("--time", help="limit of one job, such as 24:00:00")
    add("--partition")
    add("--account")
    add("--chain", type=int, metavar="K", help="K jobs, one after the other, none of which is requeued")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="one more, such as --sbatch=--qos=high")
    add("--dry-run", action="store_true", help="print the line, submit nothing")
    return parse_arguments(parser)


def check_counts(arguments: argparse.Namespace) -> None:
    """Raises UserError with every count that is none. SLURM would take 0 and less for something else."""
    counts = {name: getattr(arguments, name) for name in ("nodes", "ranks_per_node", "gpus_per_node", "cpus_per_rank")}
    problems = [
        f"--{name.replace('_', '-')} {number}: give a whole number from 1 to {MAX_COUNT:,}"
        for name, number in {**counts, "chain": arguments.chain}.items()
        if number is not None and not 1 <= number <= MAX_COUNT
    ]
    if problems:
        raise UserError(problems)


def sbatch_line(arguments: argparse.Namespace, ranks_per_node: int, name: str) -> list[str]:
    """What to type for it. The job is called as the run is: so chains by --dependency=singleton work too."""
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
    line = ["sbatch", *(f"--{option}={value}" for option, value in options.items() if value is not None)]
    line += ["--no-requeue"] if arguments.chain else []
    return [*line, *arguments.sbatch, str(SCRIPT), arguments.config, *arguments.overrides]


def main() -> None:
    """Check, print, submit."""
    arguments = parse()
    ranks_per_node = arguments.ranks_per_node or arguments.gpus_per_node or 1
    check_counts(arguments)
    config = load_config(arguments.config, arguments.overrides)
    allocation = even_allocation(arguments.nodes * ranks_per_node, arguments.nodes, arguments.gpus_per_node)
    for line in check_allocation(config, allocation, arguments.config):
        print(f"note: {line}", file=sys.stderr)
    line = sbatch_line(arguments, ranks_per_node, Path(config.run.dir).resolve().name)
    print(shlex.join(line), flush=True)
    if not arguments.dry_run and not shutil.which("sbatch"):
        raise UserError("there is no sbatch here; give this command, or the line above, on a login node")
    if not arguments.dry_run:
        sys.exit(subprocess.run(line).returncode)


if __name__ == "__main__":
    run_command(main)
