"""Find the newest checkpoint of a run and load it at the layout that wrote it; or the model alone."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from mythos_dist.checkpoint.save import META_FILE
from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.model.mythos import Mythos
from mythos_dist.parallel.process import choose_accelerator


def read_meta(checkpoints: Path) -> dict[str, Any] | None:
    """What `save_checkpoint` noted in the newest checkpoint, plus its `path`; None when the run has none yet.

    Raises UserError when `latest` names a checkpoint that is not there or not complete.
    """
    pointer = checkpoints / "latest"
    if pointer.exists():
        path = checkpoints / pointer.read_text().strip()
    elif whole := sorted(checkpoints.glob(f"step-????????/{META_FILE}")):
        path = whole[-1].parent  # killed between the first checkpoint's rename and the pointer to it
    else:
        return None
    try:
        return {**json.loads((path / META_FILE).read_text()), "path": str(path)}
    except (OSError, json.JSONDecodeError) as error:
        others = sorted(p.name for p in checkpoints.glob("step-????????") if p != path)
        raise UserError(
            f"{pointer} names {path.name}, which cannot be read ({error}); "
            f"write the name of another one into it ({', '.join(others) or 'there is none'}), or give another run.dir"
        ) from None


def layout_problems(meta: dict[str, Any], layout: dict[str, Any]) -> list[str]:
    """Why ranks of `layout` cannot load the checkpoint, a line per difference."""
    return [
        f"the checkpoint {meta['path']} was written at {key}={meta['layout'].get(key)}, this run has {key}={value}; "
        f"resume at {key}={meta['layout'].get(key)}, or start in another run.dir"
        for key, value in layout.items()
        if meta["layout"].get(key) != value
    ]


def load_checkpoint(engine: Any, meta: dict[str, Any]) -> None:
    """Load model, router bias and optimizer into DeepSpeed's engine. Every rank calls this."""
    path = Path(meta["path"])
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:  # DeepSpeed's way to say that it found nothing
        raise UserError(f"DeepSpeed found no checkpoint in {path}; start in another run.dir")


def load_model(run_dir: Path) -> tuple[Mythos, Config, int]:
    """The model of a run's newest checkpoint on this process in fp32, the run's config and the step.

    Raises UserError when the folder is not a run, has no checkpoint, or one of ranks that each held a part.
    """
    choose_accelerator()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if not (run_dir / "config.yaml").exists():
        raise UserError(f"{run_dir} is not the folder of a run: it has no config.yaml; give the run.dir of a training")
    config = load_config(run_dir / "config.yaml")
    meta = read_meta(run_dir / "checkpoints")
    if meta is None:
        raise UserError(
            f"{run_dir} has no checkpoint yet; train to step checkpoint.every={config.checkpoint.every} first"
        )
    path = Path(meta["path"])
    divided = [axis for axis in ("tensor", "pipe", "expert") if meta["layout"][f"parallel.{axis}"] > 1]
    if divided:
        raise UserError(
            f"the checkpoint {path} was written at "
            + ", ".join(f"parallel.{axis}={meta['layout'][f'parallel.{axis}']}" for axis in divided)
            + "; a model can be put together from data-parallel checkpoints only, so far"
        )
    chatter = io.StringIO()  # DeepSpeed prints what it reads
    with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
        state = get_fp32_state_dict_from_zero_checkpoint(str(path.parent), tag=path.name)
    assert state is not None
    model = Mythos(config.model, experts=config.experts)
    model.load_state_dict(state)
    return model.eval(), config, meta["step"]
