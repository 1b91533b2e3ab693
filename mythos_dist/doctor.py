"""`python -m mythos_dist.doctor`: checks this machine (ops/doctor)."""

from mythos_dist.errors import run_command
from mythos_dist.ops.doctor.__main__ import main

if __name__ == "__main__":
    run_command(main)
