"""DeepSpeed's universal checkpoints, the form that its ZeRO stages 1 to 3 load at any number of ranks: the export.

    OUT/latest_universal         the name of the folder FOLDER, global_step7_universal
    FOLDER/zero/NAME/fp32.pt     a parameter, fp32 and unsharded; its moments: exp_avg.pt, exp_avg_sq.pt
    FOLDER/zero/NAME/step.pt     Adam's count of steps
    FOLDER/zero/optimizer_state.pt        for all parameters: learning rate, count of steps
    FOLDER/mp_rank_00_model_states.pt     counts, buffers, and what the program gets as client state
    FOLDER/zero_pp_rank_0_mp_rank_00_model_states.pt   the same for ZeRO-3, which looks for this name

The traps: DeepSpeed 0.19.8 loads no buffers. It copies every key of the saved `param_groups[i]` into group i of the
program's optimizer (ZeRO-3: those of group 0 into all groups), and the program's groups are unknown here. So more
entries than a program has groups are saved, each with the learning rate only: a weight decay could end up in the wrong
group.

Decisions: CHECKPOINT-18.
"""

import importlib.metadata
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mythos_dist.checkpoint.canonical import new_output
from mythos_dist.checkpoint.export import find_or_report, output_folder
from mythos_dist.checkpoint.manifest import AVERAGE, BUFFER, PARAMETER
from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.checkpoint.restore import config_of
from mythos_dist.config.schema import Config
from mythos_dist.data.tokenizer_files import write_tokenizer
from mythos_dist.files import fsync_file, fsync_folder, write_and_fsync
from mythos_dist.progress import Progress
from mythos_dist.units import count

LATEST_UNIVERSAL = "latest_universal"
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")  # ZeRO-1 and 2; ZeRO-3
OPTIMIZER_STATE = "optimizer_state.pt"
ADAM = ("exp_avg", "exp_avg_sq")
UNIVERSAL_VERSION = 0.4  # deepspeed.checkpoint.constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE
CLIENT_STATE = "mythos_dist"
_SPARE_GROUPS = 64  # a program may have groups without parameters of its own
_SECTIONS = ("model", "act", "loops", "experts", "optim")  # of the config in the client state: no paths


def export_universal(
    source: Checkpoint,
    out: Path,
    *,
    learning_rate: float | None = None,
    prefix: str = "",
    tokenizer: Path | None = None,
    workers: int = 2,
    verify: bool = True,
    progress: Progress = lambda size: None,
    report: Callable[[str], object] = lambda note: None,
) -> Path:
    """Write a universal checkpoint, config.json and the tokenizer into the new folder `out`; returns the folder that
    DeepSpeed reads. One tensor per worker is in memory at a time.

    learning_rate: of the next step; None: the program's own. prefix: of parameter names, such as `model.` if the
    program's module holds ours under that name. `report` is called with a line for everything that is not carried over.
    The others are as in `export`. Raises UserError as `export` does.
    """
    out = new_output(source, out, verify)
    config, manifest = config_of(source), source.manifest
    model_tokenizer = find_or_report(source, config, tokenizer, report)
    parameters = [name for name, tensor in manifest.tensors.items() if PARAMETER in tensor.kinds]
    name = f"global_step{manifest.step}_universal"
    with output_folder(out, 12 * manifest.num_parameters) as folder:
        step_folder = folder / name
        zero = step_folder / "zero"
        zero.mkdir(parents=True)
        with ThreadPoolExecutor(max(1, workers)) as pool:
            list(pool.map(partial(_write_parameter, source, zero, prefix, progress), parameters))
        _save(universal_optimizer_state(source, learning_rate), zero / OPTIMIZER_STATE)
        states = model_states(source, config, prefix)
        for file in MODEL_STATES:
            _save(states, step_folder / file)
        for each in (zero, step_folder):
            fsync_folder(each)
        write_and_fsync(folder / LATEST_UNIVERSAL, name)
        write_and_fsync(folder / "config.json", json.dumps(asdict(config.model), indent=2) + "\n")
        if model_tokenizer is not None and (note := write_tokenizer(folder, model_tokenizer, config.model.max_seq_len)):
            report(note)
    for line in not_carried(source, config, learning_rate, prefix):
        report(line)
    return out / name


def has_adam_moments(source: Checkpoint) -> bool:
    """Whether every parameter has both of Adam's moments."""
    tensors = source.manifest.tensors.values()
    return all(set(ADAM) <= set(tensor.kinds) for tensor in tensors if PARAMETER in tensor.kinds)


def _adam_steps(source: Checkpoint) -> int:
    return source.manifest.optimizer["steps"] if has_adam_moments(source) else 0


def _write_parameter(source: Checkpoint, zero: Path, prefix: str, progress: Progress, name: str) -> None:
    """Its folder: the values, the moments (zeros if the checkpoint does not have all), the count of steps."""
    folder, shape = zero / f"{prefix}{name}", source.manifest.tensors[name].shape
    folder.mkdir()
    carried = has_adam_moments(source)
    for file, kind in (("fp32", PARAMETER), *((kind, kind) for kind in ADAM)):
        has_values = carried or kind == PARAMETER
        value = torch.from_numpy(source.full_tensor(kind, name)) if has_values else torch.zeros(shape)
        _save({"param": value}, folder / f"{file}.pt")
        progress(value.nbytes)
    # A tensor, as torch's AdamW needs it.
    _save(torch.tensor(float(_adam_steps(source))), folder / "step.pt")
    fsync_folder(folder)


def _save(value: Any, file: Path) -> None:
    with open(file, "wb") as stream:
        torch.save(value, stream)
        fsync_file(stream)


def universal_optimizer_state(source: Checkpoint, learning_rate: float | None) -> dict[str, Any]:
    """The content of optimizer_state.pt: ZeRO-1 and 2 read `param_groups`, ZeRO-3 `optimizer_state_dict`."""
    group = {} if learning_rate is None else {"lr": learning_rate}
    groups = [dict(group) for _ in range(len(source.manifest.tensors) + _SPARE_GROUPS)]
    steps = torch.tensor(float(_adam_steps(source)))
    return {
        "ds_version": importlib.metadata.version("deepspeed"),
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": steps}}, "param_groups": groups[:1]},
    }


def model_states(source: Checkpoint, config: Config, prefix: str) -> dict[str, Any]:
    """The content of the files MODEL_STATES. DeepSpeed returns keys that it does not use itself as client state."""
    manifest = source.manifest
    buffers = {
        name: torch.from_numpy(source.full_tensor(BUFFER, name))
        for name, tensor in manifest.tensors.items()
        if tensor.weights == BUFFER
    }
    shapes = {
        f"{prefix}{name}": torch.Size(tensor.shape)
        for name, tensor in manifest.tensors.items()
        if PARAMETER in tensor.kinds
    }
    buffers = {f"{prefix}{name}": value for name, value in buffers.items()}
    step = manifest.step
    return {
        "module": buffers,
        "buffer_names": list(buffers),
        "optimizer": None,
        "param_shapes": OrderedDict(shapes),
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        # After `step` steps: of DeepSpeed's schedules, then of torch's.
        "lr_scheduler": {
            "last_batch_iteration": step - 1,
            "last_epoch": step,
            "_step_count": step + 1,
            "lr_lambdas": [],
        },
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": manifest.optimizer["skipped_steps"],
        "global_steps": step,
        "global_samples": _samples(source, config),
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": importlib.metadata.version("deepspeed"),
        "universal_checkpoint_info": {"universal_checkpoint_version": UNIVERSAL_VERSION},
        CLIENT_STATE: {
            "buffers": buffers,
            "step": step,
            "tokens": manifest.lineage.tokens,
            "config": {name: manifest.config[name] for name in _SECTIONS if name in manifest.config},
        },
    }


def _samples(source: Checkpoint, config: Config) -> int:
    """Sequences that were trained on."""
    return source.manifest.tokens // config.train.seq_len


def not_carried(source: Checkpoint, config: Config, learning_rate: float | None, prefix: str) -> Iterator[str]:
    """A line for each kind of state that DeepSpeed does not get, or does not load by itself."""
    manifest, optim = source.manifest, config.optim
    kinds = {kind for tensor in manifest.tensors.values() for kind in tensor.kinds}
    if "momentum_buffer" in kinds:
        yield "Muon's momentum is lost: the format has Adam's moments only, so the optimizer of DeepSpeed starts over"
    elif not has_adam_moments(source):
        yield "there are no moments in these weights: the optimizer of DeepSpeed starts over"
    if any(tensor.weights == BUFFER for tensor in manifest.tensors.values()):
        yield (
            "DeepSpeed loads no buffers, so set the router's bias: _, state = engine.load_checkpoint(OUT); "
            f'engine.module.load_state_dict(state["{CLIENT_STATE}"]["buffers"], strict=False)'
        )
    if "optim" in manifest.config:
        rate = "" if learning_rate is None else f" (the next step has {learning_rate:.6g})"
        yield (
            f"settings of the optimizer are your program's: the run had betas {optim.beta1:g} and {optim.beta2:g}, eps "
            f"{optim.eps:g}, weight decay {optim.weight_decay:g} for matrices of blocks only, gradient clipping "
            f"{optim.grad_clip:g}, and the schedule {optim.schedule} of the learning rate{rate}"
        )
    yield (
        "the order of the data, the loops of each step and random numbers are your program's: the run has read "
        f"{count(_samples(source, config), 'sample')} in {count(manifest.step, 'step')}"
    )
    if AVERAGE in kinds:
        snapshots = count(manifest.optimizer.get("average_samples", 0), "snapshot")
        yield f"the average of {snapshots} of the weights is lost; --average exports it instead of them"
    scale = manifest.optimizer["loss_scale"].get("cur_scale", 1)
    if config.train.dtype == "fp16" and scale > 0:
        yield f"the loss scale {scale:g} is lost: set fp16.initial_scale_power={round(math.log2(scale))}"
    if manifest.lineage.parents or manifest.lineage.first_step:
        yield "the lineage of the run is lost: its stages, and the runs and weights that it began with"
