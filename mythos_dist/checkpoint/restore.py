"""Find the newest checkpoint that is whole and load it at any layout; or the model alone, on one process.

Every rank reads just the parts of the files that it needs, whoever wrote them: the layout that wrote a checkpoint is
one of many that can load it, and no faster way exists for it.
"""

from pathlib import Path

import torch
import torch.distributed as dist

from mythos_dist.checkpoint.manifest import (
    BUFFER,
    MOMENTS,
    PARAMETER,
    Checkpoint,
    checkpoints_of,
    damage,
)
from mythos_dist.checkpoint.progress import Progress
from mythos_dist.checkpoint.state import State
from mythos_dist.config.load import config_from
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.model.mythos import Mythos


def find_checkpoint(checkpoints: Path, verify: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that `latest` names, or if it is damaged the newest one that is not; None if there is none at all.
    And what is damaged in those that were passed over, a line each.

    Every rank calls this; with `verify` each reads its share of the bytes. Raises UserError if there are checkpoints
    and none is whole.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    found: list[str] = []
    for folder in checkpoints_of(checkpoints):
        checkpoint = None
        try:
            checkpoint = Checkpoint(folder)
            files = sorted(checkpoint.manifest.files)[rank::world]
            mine = damage(folder, checkpoint.manifest, files, hashes=verify)
        except UserError as error:
            mine = [str(error)]
        everybodys: list[list[str]] = [[]] * world
        dist.all_gather_object(everybodys, mine)
        problems = list(dict.fromkeys(line for lines in everybodys for line in lines))
        if checkpoint and not problems:
            return checkpoint, found
        found += problems
    if found:
        remedy = "no checkpoint is whole: put these files back from a copy, or give another run.dir"
        raise UserError([*found, remedy])
    return None, []


def load_state(checkpoint: Checkpoint, state: State, progress: Progress = lambda size: None) -> None:
    """Fill a rank's `state` from a checkpoint; moments that it lacks are zero (imported weights have none).

    `progress` is called with the bytes read since the last call. Raises UserError if the checkpoint is of another
    model.
    """
    for name, held in state.items():
        for kind, value in held.values.items():
            tensor = checkpoint.manifest.tensors.get(name)
            if kind in MOMENTS and tensor is not None and kind not in tensor.kinds:
                value.zero_()
                continue
            on_host = value.detach() if value.device.type == "cpu" else torch.zeros(value.shape, dtype=value.dtype)
            checkpoint.read(kind, name, held.piece, on_host.numpy())
            if on_host.device != value.device:
                value.copy_(on_host)
            progress(4 * value.numel())


def load_model(path: Path) -> tuple[Mythos, Config, int]:
    """The model of a run's newest checkpoint, or of a checkpoint, on this process in fp32; its config and the step.

    Raises UserError when there is none, or none that is whole.
    """
    checkpoint = open_checkpoint(path)
    checkpoint.must_be_whole()
    config = config_from(checkpoint.manifest.config)
    with torch.device("meta"):
        model = Mythos(config.model, act=config.act, experts=config.experts)
    kinds = {name: PARAMETER for name, _ in model.named_parameters()} | {
        name: BUFFER for name, _ in model.named_buffers()
    }
    values = {name: torch.from_numpy(checkpoint.whole(kind, name)) for name, kind in kinds.items()}
    model.load_state_dict(values, assign=True)
    return model.eval(), config, checkpoint.manifest.step


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the one that the run (or its folder of checkpoints) at `path` would resume from.

    Its files are not looked at. Raises UserError if there is none.
    """
    if (path / "checkpoint.json").exists() or path.name.startswith("step-"):
        return Checkpoint(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = checkpoints_of(folder)
    if not found:
        what = "this run has no checkpoint yet" if (path / "config.yaml").exists() else "no run and no checkpoint"
        raise UserError(
            f"{what}; give the run.dir of a training that has saved one, or a checkpoint's folder", str(path)
        )
    return Checkpoint(found[0])
