"""Delete an earlier run of the same settings, so that a run can start from scratch; never anything else."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError, exit_with


def make_room(run_dir: Path, config: str, layouts: Sequence[Sequence[str]]) -> None:
    """Delete the folder of an earlier run of `config` with the overrides of one of `layouts`.

    Ends the process with exit code 2 and a message if the folder holds anything else.
    """
    try:
        remove_earlier_run(run_dir, [load_config(config, overrides) for overrides in layouts])
    except UserError as error:
        exit_with(error)


def remove_earlier_run(run_dir: Path, configs: Sequence[Config]) -> None:
    """Delete the folder of a run of one of `configs` (apart from run.dir), or an empty folder.

    Raises UserError if the folder holds anything else (another run, files of a user) or cannot be deleted.
    """
    if not run_dir.exists() and not run_dir.is_symlink():
        return
    remedy = "move it away, or delete it"
    if run_dir.is_symlink() or not run_dir.is_dir():
        raise UserError(f"is not a folder; {remedy}", str(run_dir))
    try:
        if any(run_dir.iterdir()):
            earlier = load_config(run_dir / "config.yaml")
            expected = [replace(config, run=replace(config.run, dir=earlier.run.dir)) for config in configs]
            if earlier not in expected:
                raise UserError(f"holds a run with other settings, which would be lost; {remedy}", str(run_dir))
        shutil.rmtree(run_dir)
    except OSError as error:
        raise UserError(f"cannot be deleted ({error.strerror}); {remedy}", str(run_dir)) from None
    except UserError as error:
        if error.source == str(run_dir):
            raise
        raise UserError(f"holds something other than an earlier run; {remedy}", str(run_dir)) from None
