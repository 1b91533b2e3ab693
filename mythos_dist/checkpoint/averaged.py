"""Averages as weights to read: the one that a checkpoint holds, or the mean of several checkpoints and exports.

Both are read piece by piece like a checkpoint that has weights only, so `export.py` writes them as any other.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mythos_dist.checkpoint.canonical import output_path
from mythos_dist.checkpoint.manifest import AVERAGE, CheckpointManifest, TensorEntry
from mythos_dist.checkpoint.open_mythos import list_tensors
from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.checkpoint.reader import Checkpoint, Wanted
from mythos_dist.checkpoint.restore import open_weights_at
from mythos_dist.config.compare import WIDTHS, training_changes
from mythos_dist.config.fields import number_of, show
from mythos_dist.errors import UserError
from mythos_dist.progress import Progress
from mythos_dist.units import count
from mythos_dist.urls import AnyPath

_BLOCK_ELEMENTS = 1 << 21  # summed in float64 at once


class AverageOf(Checkpoint):
    """The average that training kept in a checkpoint (`average.kind`), as its weights."""

    def __init__(self, source: Checkpoint):
        """Raises UserError if the checkpoint has no average."""
        manifest = source.manifest
        if not manifest.optimizer.get("average_samples"):
            raise UserError(
                "has no average of the weights: its run had average.kind=off, or had not taken a snapshot yet; export "
                "without --average, or average several checkpoints with `mythos average`",
                str(source.folder),
            )
        super().__init__(source.folder, _weights_only(manifest))
        self._source = source

    def _copy(self, wanted: Iterable[Wanted], progress: Progress) -> None:
        self._source.read_all([one._replace(kind=AVERAGE) for one in wanted], progress)

    def find_damage(
        self, files: Sequence[str] | None = None, hashes: bool = True, progress: Progress = lambda size: None
    ) -> list[str]:
        """As `Checkpoint.find_damage`."""
        return self._source.find_damage(files, hashes, progress)


class MeanOf(Checkpoint):
    """The weighted mean of the weights of several checkpoints or exports, with the settings of the newest one.

    An element is sum(weight_i * element_i) / sum(weight_i) in float64, in the order of the sources, rounded to fp32.
    The router's bias is averaged, too.
    """

    def __init__(self, sources: Sequence[Checkpoint], weights: Sequence[float] | None = None):
        """`weights`: one per source, above 0; None: all equal. Raises UserError if the sources are not of one model."""
        if len(sources) < 2:
            raise UserError("one checkpoint is its own average; give two or more")
        self._sources = list(sources)
        self._weights = [1.0] * len(sources) if weights is None else list(weights)
        if len(self._weights) != len(sources):
            given = count(len(self._weights), "weight")
            raise UserError(f"{given} for {count(len(sources), 'checkpoint')}; give one for each")
        if problems := [line for other in sources[1:] for line in _misfits(sources[0], other)]:
            raise UserError([*problems, "only weights of one model can be averaged"])
        newest = max(sources, key=lambda source: source.manifest.step)
        super().__init__(newest.folder, _weights_only(newest.manifest))

    def _copy(self, wanted: Iterable[Wanted], progress: Progress) -> None:
        for kind, name, piece, out, _ in wanted:
            self._mean(kind, name, piece, out)
            progress(out.nbytes)

    def _mean(self, kind: str, name: str, piece: Piece, out: np.ndarray) -> None:
        for begin in range(0, len(out), _BLOCK_ELEMENTS):
            block = out[begin : begin + _BLOCK_ELEMENTS]
            first = piece.first + begin
            values, total = np.zeros_like(block), np.zeros(len(block))
            for source, weight in zip(self._sources, self._weights, strict=True):
                source.read(kind, name, replace(piece, first=first, last=first + len(block)), values)
                total += np.multiply(values, weight, dtype=np.float64)
            block[:] = total / sum(self._weights)

    def notes(self) -> Iterator[str]:
        """Sources with other settings of the model than the newest one."""
        for source in self._sources:
            changes = training_changes(source.manifest.config, self.manifest.config)
            if different := [name for name, _, _ in changes if name.startswith("model.")]:
                yield f"{source.folder} has other values of {', '.join(different)} than {self.folder}"

    def describe(self) -> str:
        """A line for the console: the sources and the size."""
        steps = ", ".join(str(source.manifest.step) for source in self._sources)
        parameters = f"{self.manifest.num_parameters:,} parameters"
        return f"mean of {count(len(self._sources), 'checkpoint')} (steps {steps}): {parameters}"

    def find_damage(
        self, files: Sequence[str] | None = None, hashes: bool = True, progress: Progress = lambda size: None
    ) -> list[str]:
        """As `Checkpoint.find_damage`, of all files of all sources."""
        return [problem for source in self._sources for problem in source.find_damage(None, hashes, progress)]


def open_mean(paths: Sequence[AnyPath], out: Path, weights: Sequence[str] | None = None) -> MeanOf:
    """The mean of the checkpoints, newest checkpoints of runs, or exports at `paths`, to be written to `out`.

    `weights`: numbers as text. Raises UserError if one is invalid, if a path cannot be read, or if `out` is inside one.
    """
    numbers = None if weights is None else _parse_weights(weights)
    sources = [open_weights_at(path) for path in paths]
    for source in sources:
        output_path(source, out)
    return MeanOf(sources, numbers)


def _parse_weights(texts: Sequence[str]) -> list[float]:
    """Raises UserError with all problems."""
    weights = {text: number_of(text) for text in texts}
    problems = [
        f"--weights {text}: expected a number above 0 and at most 1e100"
        for text, weight in weights.items()
        if weight is None or not 0 < weight <= 1e100
    ]
    if problems:
        raise UserError(problems)
    return [float(weights[text] or 0) for text in texts]


def _weights_only(manifest: CheckpointManifest) -> CheckpointManifest:
    tensors = {name: TensorEntry(tensor.shape, (tensor.weights,)) for name, tensor in manifest.tensors.items()}
    return replace(manifest, tensors=tensors, files={})


def _misfits(first: Checkpoint, other: Checkpoint) -> list[str]:
    """Why these two cannot be averaged: a line per setting that shapes depend on, else one with the tensors."""
    shapes, others = (
        {name: (tensor.weights, tensor.shape) for name, tensor in one.manifest.tensors.items()}
        for one in (first, other)
    )
    if shapes == others:
        return []
    model, other_model = (one.manifest.config.get("model", {}) for one in (first, other))
    changed = [key for key in WIDTHS if key in model and key in other_model and model[key] != other_model[key]]
    if changed:
        return [
            f"model.{key}={show(model[key])} in {first.folder}, but {show(other_model[key])} in {other.folder}"
            for key in changed
        ]
    names = [name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name)]
    return [f"{other.folder} does not fit {first.folder}: other or missing {list_tensors(sorted(names))}"]
