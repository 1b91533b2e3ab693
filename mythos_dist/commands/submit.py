"""Check that a config fits on the requested nodes, print the sbatch command, and submit it.

Exit codes: 0 submitted, or printed with --dry-run; 2 configuration or input error; others: sbatch's.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from mythos_dist.config.arguments import add_config, parse_arguments
from mythos_dist.config.load import load_stages
from mythos_dist.errors import UserError, run_command
from mythos_dist.files import real_path
from mythos_dist.ops.cluster.allocation import check_allocation, even_allocation
from mythos_dist.ops.cluster.sbatch import SCRIPT, check_counts, job_variables, sbatch_command


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


def main(script: Path = SCRIPT) -> None:
    """Check, print, submit. script: slurm.sbatch, which sites edit."""
    arguments = parse_arguments(build_parser())
    ranks_per_node = arguments.ranks_per_node or arguments.gpus_per_node or 1
    check_counts(arguments)
    stages = load_stages(arguments.config, arguments.overrides)
    allocation = even_allocation(arguments.nodes * ranks_per_node, arguments.nodes, arguments.gpus_per_node)
    for note in check_allocation(stages, allocation, arguments.config):
        print(f"note: {note}", file=sys.stderr)
    command = sbatch_command(arguments, ranks_per_node, real_path(Path(stages[0].run.dir)).name, script)
    variables = job_variables(script)
    print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(command)]))
    sys.stdout.flush()
    if not arguments.dry_run and not shutil.which("sbatch"):
        raise UserError("sbatch is not installed here; run this script, or the command above, on a login node")
    if not arguments.dry_run:
        sys.exit(subprocess.run(command, env={**os.environ, **variables}).returncode)


if __name__ == "__main__":
    run_command(main)
