"""Import a universal checkpoint of DeepSpeed (`universal.py`) as the checkpoint that a run resumes from.

Parameters, Adam's moments and its count of steps, fp16's loss scale, the router's bias and the number of steps are
carried over. Files are read by name, for the tensors of the config's model, and nothing in them is run
(`torch_file.py`). Values are mapped from the files, one tensor at a time.

ds_to_universal writes tensors of ZeRO-1 and 2 in their shape, in a dict, and the count of steps into each folder; those
of ZeRO-3 flat, and the count into optimizer_state.pt. A parameter that never had a gradient has no moments.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mythos_dist.checkpoint.canonical import write_full_tensors
from mythos_dist.checkpoint.manifest import (
    BUFFER,
    PARAMETER,
    CheckpointManifest,
    Lineage,
    TensorEntry,
    library_versions,
)
from mythos_dist.checkpoint.open_mythos import list_tensors
from mythos_dist.checkpoint.signature import signing_key
from mythos_dist.checkpoint.strict_json import read_regular_file, shorten
from mythos_dist.checkpoint.torch_file import read_torch_file
from mythos_dist.checkpoint.universal import ADAM, LATEST_UNIVERSAL, MODEL_STATES, OPTIMIZER_STATE
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.files import reason
from mythos_dist.model.mythos import Mythos
from mythos_dist.progress import Progress
from mythos_dist.units import count

_FILES = {PARAMETER: "fp32.pt", **{kind: f"{kind}.pt" for kind in ADAM}}
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's DynamicLossScaler
_MAX_STEPS = 10**15
_CONVERT = (
    "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder FOLDER --output_folder NEW"
)


@dataclass(frozen=True)
class _Source:
    """A universal checkpoint that fits a model."""

    folder: Path
    prefix: str  # of its parameter names
    shapes: dict[str, tuple[int, ...]]  # of parameters, by our names
    kinds: tuple[str, ...]  # parameter, and moments if there are any
    without_moments: list[str]  # of our names, if others have them
    buffers: dict[str, Tensor]
    steps: int
    skipped_steps: int
    samples: int | None  # that DeepSpeed counted
    adam_steps: int
    learning_rate: float | None
    loss_scale: dict[str, float]

    def blocks(self, kind: str, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, fp32."""
        if kind == BUFFER:
            value = self.buffers[name]
        elif kind != PARAMETER and name in self.without_moments:
            value = torch.zeros(self.shapes[name])
        else:
            value = _read_tensor(self.folder / "zero" / f"{self.prefix}{name}" / _FILES[kind], self.shapes[name])
        yield value.float().contiguous().flatten().numpy().data


def import_universal(
    path: Path,
    config: Config,
    progress: Progress = lambda size: None,
    report: Callable[[str], object] = lambda note: None,
) -> Path:
    """Write the checkpoint to `config.run.dir`; returns its folder.

    path: the folder of the universal checkpoint, or the one with latest_universal. `report` is called with a line for
    what is not carried over. Raises UserError if the checkpoint does not fit `config` (all mismatches at once), if it
    cannot be read, or if the run has checkpoints already.
    """
    signing_key()  # an error in it is raised before gigabytes are read
    folder = find_universal(path)
    with torch.device("meta"):
        model = Mythos(config.model, act=config.act, experts=config.experts)
    parameters = {name: tuple(value.shape) for name, value in model.named_parameters()}
    buffers = {name: tuple(value.shape) for name, value in model.named_buffers()}
    source = _open(folder, parameters, buffers, report)
    if problems := list(_contradictions(source, config)):
        raise UserError(problems, str(folder))
    samples = config.train.samples_until(source.steps)
    tokens = samples * config.train.seq_len
    tensors = {name: TensorEntry(shape, source.kinds) for name, shape in parameters.items()}
    tensors |= {name: TensorEntry(shape, (BUFFER,)) for name, shape in buffers.items()}
    manifest = CheckpointManifest(
        step=source.steps,
        tokens=tokens,
        start=0,
        layout={},
        config=asdict(config),
        data="",
        versions=library_versions(),
        optimizer={
            "steps": source.adam_steps,
            "skipped_steps": source.skipped_steps,
            "loss_scale": source.loss_scale if config.train.dtype == "fp16" else {},
        },
        tensors=tensors,
        files={},
        lineage=Lineage(next_sample=samples, tokens=tokens),
    )

    def blocks(kind: str, name: str) -> Iterator[memoryview]:
        for block in source.blocks(kind, name):
            yield block
            progress(block.nbytes)

    written = write_full_tensors(Path(config.run.dir), manifest, blocks, workers=1)
    for line in _not_carried(source, config, samples):
        report(line)
    return written


def find_universal(path: Path) -> Path:
    """The folder of a universal checkpoint: `path`, or the one that latest_universal in it names. Raises UserError."""
    try:
        path = path.expanduser()
        if (path / "zero").is_dir():
            return path
        if (path / LATEST_UNIVERSAL).exists():
            name = read_regular_file(path / LATEST_UNIVERSAL, 4096).strip()
            if name in ("", ".", "..") or "/" in name or not (path / name / "zero").is_dir():
                raise UserError(
                    f"names {shorten(name)}, which is not a universal checkpoint here", str(path / LATEST_UNIVERSAL)
                )
            return path / name
        if not path.is_dir():
            problem = "no such folder; give a universal checkpoint of DeepSpeed, or the folder with latest_universal"
        elif any(path.glob("*_optim_states.pt")) or (path / "latest").exists():
            problem = f"is a checkpoint of ZeRO for one number of ranks; convert it first: {_CONVERT}"
        else:
            problem = f"is not a universal checkpoint of DeepSpeed: it has neither zero/ nor {LATEST_UNIVERSAL}"
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        problem = f"cannot be read ({reason(error)})"
    raise UserError(problem, str(path))


def _open(
    folder: Path,
    parameters: dict[str, tuple[int, ...]],
    buffers: dict[str, tuple[int, ...]],
    report: Callable[[str], object],
) -> _Source:
    """Check names, files and shapes. Raises UserError with all mismatches."""
    prefix, problems = _match_names(folder / "zero", set(parameters), set(buffers))
    if problems:
        raise UserError(problems, str(folder))
    paths = {name: folder / "zero" / f"{prefix}{name}" for name in parameters}
    has = {kind: {name for name in parameters if (paths[name] / _FILES[kind]).exists()} for kind in _FILES}
    with_moments = set.intersection(*(has[kind] for kind in ADAM))
    kinds = (PARAMETER, *ADAM) if with_moments else (PARAMETER,)
    without = sorted(parameters.keys() - with_moments) if with_moments else []
    for name, shape in parameters.items():
        for kind in kinds:
            if kind == PARAMETER or name in with_moments:
                try:
                    _read_tensor(paths[name] / _FILES[kind], shape)
                except UserError as error:
                    problems.append(str(error))
    if problems:
        raise UserError([*problems[:8], "is `model.*` the config that these weights were trained with?"])
    states = _read_model_states(folder)
    optimizer = _read(folder / "zero" / OPTIMIZER_STATE, placeholders=True)
    steps = _number(states.get("global_steps"))
    if steps is None:
        raise UserError("has no number of steps (global_steps)", str(folder / MODEL_STATES[0]))
    samples = _number(states.get("global_samples"))
    return _Source(
        folder,
        prefix,
        parameters,
        kinds,
        without,
        {name: _find_buffer(folder, states, f"{prefix}{name}", shape, report) for name, shape in buffers.items()},
        steps,
        _number(states.get("skipped_steps")) or 0,
        samples,
        _adam_steps(optimizer, [paths[name] for name in with_moments], folder) if with_moments else 0,
        _learning_rate(optimizer),
        _loss_scale(optimizer),
    )


def _match_names(zero: Path, parameters: set[str], buffers: set[str]) -> tuple[str, list[str]]:
    """The prefix that the folders of our names have in common, and the names that are missing or unknown."""
    try:
        with os.scandir(zero) as entries:
            folders = {entry.name for entry in entries if entry.is_dir()}
    except OSError as error:
        raise UserError(f"cannot be read ({reason(error)})", str(zero)) from None
    last = max(parameters)  # any of them
    prefixes = [name.removesuffix(last) for name in folders if name == last or name.endswith(f".{last}")]
    prefix = min(prefixes, key=lambda one: len({f"{one}{name}" for name in parameters} - folders), default="")
    expected = {f"{prefix}{name}" for name in parameters}
    problems = []
    if missing := expected - folders:
        problems.append(f"missing {list_tensors(missing)}")
    # Buffers are there if ds_to_universal was given a checkpoint of ZeRO-1 or 2.
    if unknown := folders - expected - {f"{prefix}{name}" for name in buffers}:
        problems.append(f"unknown {list_tensors([shorten(name)[1:-1] for name in unknown])}")
    if problems:
        problems.append("is `model.*` the config that these weights were trained with?")
    return prefix, problems


def _read_tensor(file: Path, shape: tuple[int, ...]) -> Tensor:
    """The tensor in a file of a parameter's folder. Raises UserError unless it has this shape, or is flat."""
    value = _read(file)
    value = value.get("param") if isinstance(value, dict) else value
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.dtype not in _DTYPES:
        raise UserError("holds no dense floating-point tensor", str(file))
    if tuple(value.shape) not in (shape, (math.prod(shape),)):
        raise UserError(f"has shape {list(value.shape)} instead of {list(shape)}", str(file))
    return value.detach().reshape(shape)  # DeepSpeed saves some as parameters


def _read(file: Path, placeholders: bool = False) -> Any:
    try:
        return read_torch_file(file, placeholders=placeholders)
    except FileNotFoundError:
        raise UserError("is missing; was the conversion interrupted? convert again", str(file)) from None


def _read_model_states(folder: Path) -> dict[str, Any]:
    file = next((folder / name for name in MODEL_STATES if (folder / name).exists()), folder / MODEL_STATES[0])
    states = _read(file, placeholders=True)
    if not isinstance(states, dict):
        raise UserError("is not what DeepSpeed saves", str(file))
    return states


def _find_buffer(
    folder: Path, states: Mapping[str, Any], name: str, shape: tuple[int, ...], report: Callable[[str], object]
) -> Tensor:
    """From the module's state, or from where ds_to_universal puts it. Zeros, which is reported, if there is none."""
    module = states.get("module")
    value = module.get(name) if isinstance(module, dict) else None
    if isinstance(value, Tensor) and tuple(value.shape) == shape and value.dtype in _DTYPES:
        return value.detach().float()
    if (file := folder / "zero" / name / _FILES[PARAMETER]).exists():
        return _read_tensor(file, shape).float()
    report(f"{name} is not in the checkpoint: it begins with zeros")
    return torch.zeros(shape)


def _adam_steps(optimizer: Any, folders: list[Path], folder: Path) -> int:
    """Adam's count of steps. Raises UserError if parameters have different ones, or there is none."""
    counts = {_number(_read(each / "step.pt")) for each in folders if (each / "step.pt").exists()}
    if not counts:
        counts = {_number(_member(optimizer, "optimizer_state_dict", "state", 0, "step"))}
    if len(counts) > 1:
        raise UserError(
            f"parameters have different counts of Adam's steps ({shorten(sorted(counts, key=str))})", str(folder)
        )
    (steps,) = counts
    if steps is None:
        raise UserError("has no count of Adam's steps", str(folder / "zero" / OPTIMIZER_STATE))
    return steps


def _learning_rate(optimizer: Any) -> float | None:
    """The learning rate of the first parameter group; None: there is none."""
    value = _member(optimizer, "param_groups", 0, "lr")
    return float(value) if isinstance(value, int | float) else None


def _loss_scale(optimizer: Any) -> dict[str, float]:
    """The state of a dynamic loss scale; empty: there is none."""
    scaler = _member(optimizer, "loss_scaler")
    state = {name: getattr(scaler, name, None) for name in _LOSS_SCALE}
    values = {name: float(value) for name, value in state.items() if isinstance(value, int | float)}
    return values if len(values) == len(_LOSS_SCALE) and all(map(math.isfinite, values.values())) else {}


def _member(value: Any, *path: str | int) -> Any:
    """A member of nested dicts and lists; None if there is none."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _number(value: Any) -> int | None:
    """A whole number from 0 on, also as a tensor; None if it is none."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    is_count = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MAX_STEPS
    return int(value) if is_count and value == int(value) else None


def _contradictions(source: _Source, config: Config) -> Iterator[str]:
    """Settings that do not go with the checkpoint."""
    if config.optim.name != "adamw" and len(source.kinds) > 1:
        yield (
            f"optim.name={config.optim.name}, but these are the moments of AdamW; import with optim.name=adamw, and "
            f"begin the run with start_from=THAT_RUN start_from_state=weights optim.name={config.optim.name}"
        )
    if source.steps >= config.train.steps:
        yield f"train.steps={config.train.steps}, but the checkpoint is of step {source.steps}; raise train.steps"


def _not_carried(source: _Source, config: Config, samples: int) -> Iterator[str]:
    """A line for each kind of state that the run does not get."""
    if len(source.kinds) == 1:
        yield "there are no moments of Adam: the optimizer starts over"
    elif source.without_moments:
        yield f"without moments, which begin with zeros: {list_tensors(source.without_moments)}"
    rate = "" if source.learning_rate is None else f" (DeepSpeed's was {source.learning_rate:.6g})"
    yield f"optim.* decides about the learning rate{rate}, weight decay and clipping; DeepSpeed's scheduler is not read"
    if source.samples is not None and source.samples != samples:
        yield (
            f"DeepSpeed had read {count(source.samples, 'sample')}; the run continues after sample {samples:,} of its "
            f"own order, by train.global_batch={config.train.global_batch}"
        )
    if config.train.dtype == "fp16" and not source.loss_scale:
        yield "there is no dynamic loss scale: it starts over"
    yield "the client state of the program and its random numbers are not read"
