"""Make room for a run that begins anew: an earlier run of the same settings is removed, anything else never."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError, exit_with


def make_room(run_dir: Path, config: str, layouts: Sequence[Sequence[str]]) -> None:
    """Remove the folder of an earlier run of `config` with the overrides of one of `layouts`.

    Ends the process with exit code 2 and a message if something else is there.
    """
    try:
        remove_earlier_run(run_dir, [load_config(config, overrides) for overrides in layouts])
    except UserError as error:
        exit_with(error)


def remove_earlier_run(run_dir: Path, configs: Sequence[Config]) -> None:
    """Remove the folder of a run that had one of `configs` (its folder may be named in another way), or an empty one.

    Raises UserError if something else is there: another run, files of a user, or what cannot be removed.
    """
    if not run_dir.exists() and not run_dir.is_symlink():
        return
    remedy = "move it away, or delete it"
    if run_dir.is_symlink() or not run_dir.is_dir():
        raise UserError(f"is no folder of its own; {remedy}", str(run_dir))
    try:
        if any(run_dir.iterdir()):
            before = load_config(run_dir / "config.yaml")
            wanted = [replace(one, run=replace(one.run, dir=before.run.dir)) for one in configs]
            if before not in wanted:
                raise UserError(f"holds a run with other settings, which would be lost; {remedy}", str(run_dir))
        shutil.rmtree(run_dir)
    except OSError as error:
        raise UserError(f"cannot be removed ({error.strerror}); {remedy}", str(run_dir)) from None
    except UserError as error:
        if error.source == str(run_dir):
            raise
        raise UserError(f"holds something else than an earlier run of this; {remedy}", str(run_dir)) from None
