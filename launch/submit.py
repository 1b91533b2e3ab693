"""Another name of `mythos submit`, for the slurm.sbatch beside this file."""

from functools import partial
from pathlib import Path

from mythos_dist.commands import submit
from mythos_dist.errors import run_command

main = partial(submit.main, Path(__file__).resolve().with_name("slurm.sbatch"))

if __name__ == "__main__":
    run_command(main)
