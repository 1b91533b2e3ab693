"""metrics.jsonl as columns, and columns as few points: a run of a million steps fits a page.

A file that is being written may end in half a line, and a damaged one has lines that are not JSON: they are counted.
Nothing here imports torch, so it runs on a login node.
"""

from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from mythos_dist.progress import Progress

COLUMNS = (
    "step",
    "tokens_total",
    "time",
    "loss",
    "objective",
    "grad_norm",
    "lr",
    "n_loops",
    "backprop",
    "mean_loops",
    "step_seconds",
    "data_wait_seconds",
    "tokens_per_second",
    "mfu",
    "expert_load_max",
    "experts_idle",
    "global_batch",
    "memory_gb",
)
POINTS = 1500  # of a curve, at most
MAX_EVENTS = 2000
MAX_PROBES = 400
_NAN = float("nan")
_NUMBERS = (int, float)
_BLOCK = 4096  # lines


class Event(NamedTuple):
    """What happened at a step: skipped, recomputed, rolled back, restart, phase, stage."""

    step: int
    kind: str
    text: str


class LoopTelemetry(NamedTuple):
    """Telemetry of the loops after a step: `depth` in metrics.jsonl."""

    step: int
    values: dict[str, Any]


@dataclass
class CorpusSeen:
    """What a run has read of a corpus, until its last step; repeated steps and rollbacks count once."""

    name: str
    tokens: int = 0
    epochs: float = 0.0  # sequences read over the corpus' sequences


@dataclass
class MetricsFile:
    """N lines of metrics.jsonl."""

    columns: dict[str, np.ndarray]  # (N,) float64 each; NaN: not in the line, or not finite
    events: list[Event] = field(default_factory=list)
    probes: list[LoopTelemetry] = field(default_factory=list)  # evenly spread, at most 2 * MAX_PROBES
    planned: dict[str, float | None] = field(default_factory=dict)  # the last comparison with the plan
    communication: dict[str, Any] = field(default_factory=dict)  # bytes of the last counted step, by axis and kind
    corpora: dict[str, CorpusSeen] = field(default_factory=dict)  # by fingerprint of the shards
    failures: dict[str, int] = field(default_factory=dict)  # of the loops: name -> the last step that shows it
    invalid: int = 0  # lines that are not a JSON object with a step
    events_left_out: int = 0

    def __len__(self) -> int:
        return len(self.columns["step"])


def read_metrics(file: Path, progress: Progress = lambda size: None) -> MetricsFile:
    """Read the file line by line; a missing one has no lines. progress: called with bytes read. Raises OSError."""
    reader, unreported = _Reader(), 0
    if file.exists():
        with file.open("rb") as stream:
            for line in stream:
                reader.read(line)
                unreported += len(line)
                if unreported > 1 << 20:
                    progress(unreported)
                    unreported = 0
    reader.end_block()
    columns = {name: np.frombuffer(values, dtype=np.float64) for name, values in reader.columns.items()}
    reader.result.columns = columns
    return reader.result


class _Reader:
    def __init__(self) -> None:
        self.columns = {name: array("d") for name in COLUMNS}
        self._rows: list[tuple[Any, ...]] = []  # that are not in `columns` yet
        self.result = MetricsFile({})
        self._every = 1  # of the probes, this many are skipped but one
        self._probes = 0
        self._phase: Any = None
        self._stage: Any = None
        self._read: list[tuple[CorpusSeen, int, int]] = []  # with the tokens of a sequence, and the sequences it has

    def read(self, raw: bytes) -> None:
        try:
            line = orjson.loads(raw)
            step = line["step"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            self.result.invalid += bool(raw.strip())
            return
        if type(step) is not int:
            self.result.invalid += 1
            return
        get = line.get
        self._rows.append(tuple(map(get, COLUMNS)))
        if len(self._rows) == _BLOCK:
            self.end_block()
        if get("phase") != self._phase or get("stage") != self._stage or get("skipped") or "decision" in line:
            self._read_events(step, line)
        self._read_data(line)
        if isinstance(depth := line.get("depth"), dict):
            self._read_probe(step, depth)
        for name in ("planned", "communication"):
            if isinstance(value := line.get(name), dict):
                setattr(self.result, name, value)

    def end_block(self) -> None:
        """Put the rows that were read into the columns: for a million lines that takes 2 s less than value by value."""
        rows, self._rows = self._rows, []
        try:
            block = np.array(rows, dtype=np.float64)  # None: NaN
        except (TypeError, ValueError, OverflowError):
            block = np.array([[value if type(value) in _NUMBERS else _NAN for value in row] for row in rows])
        for values, column in zip(self.columns.values(), block.reshape(-1, len(COLUMNS)).T, strict=True):
            values.frombytes(column.tobytes())

    def _read_events(self, step: int, line: dict[str, Any]) -> None:
        phase, stage = line.get("phase"), line.get("stage")
        if self._phase and phase != self._phase:
            self._add(step, "phase", f"learning rate: {self._phase} → {phase}")
        if stage and stage != self._stage:
            self._add(step, "stage", f"stage {stage} begins")
        self._phase, self._stage = phase, stage
        if "decision" in line:
            self._add(step, "decision", str(line["decision"]))
        elif line.get("skipped"):
            self._add(step, "skipped", "the optimizer did not step")

    def _read_data(self, line: dict[str, Any]) -> None:
        """`by_corpus` counts the sequences of the corpora that the latest `data` lists."""
        if isinstance(data := line.get("data"), dict):
            try:
                self._read = [self._corpus(data["seq_len"], **corpus) for corpus in data["corpora"]]
            except (LookupError, TypeError, ValueError):
                self._read = []
        counts = line.get("by_corpus")
        if type(counts) is list and len(counts) == len(self._read):
            for (corpus, seq_len, sequences), n in zip(self._read, counts, strict=True):
                if type(n) is int:
                    corpus.tokens += n * seq_len
                    corpus.epochs += n / sequences

    def _corpus(self, seq_len: int, *, name: str, fingerprint: str, sequences: int) -> tuple[CorpusSeen, int, int]:
        if type(seq_len) is not int or type(sequences) is not int or sequences < 1 or len(self.result.corpora) > 1000:
            raise ValueError
        seen = self.result.corpora.setdefault(str(fingerprint), CorpusSeen(str(name)))
        seen.name = str(name)  # folders may move
        return seen, seq_len, sequences

    def _add(self, step: int, kind: str, text: str) -> None:
        if len(self.result.events) < MAX_EVENTS:
            self.result.events.append(Event(step, kind, text))
        else:
            self.result.events_left_out += 1

    def _read_probe(self, step: int, depth: dict[str, Any]) -> None:
        if isinstance(failures := depth.get("failures"), list):
            self.result.failures |= {str(name): step for name in failures}
        if self._probes % self._every == 0:
            self.result.probes.append(LoopTelemetry(step, depth))
            if len(self.result.probes) == 2 * MAX_PROBES:
                del self.result.probes[1::2]
                self._every *= 2
        self._probes += 1


class Envelope(NamedTuple):
    """A curve of P points, each of which stands for the values of one range of steps; NaN: none of them is finite."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def ranges(length: int, points: int = POINTS) -> np.ndarray:
    """The first indices of at most `points` ranges of nearly equal size, which cover 0 to length."""
    return np.unique(np.linspace(0, length, min(length, points), endpoint=False).astype(np.int64))


def envelope(values: np.ndarray, begins: np.ndarray) -> Envelope:
    """Mean, minimum and maximum over each range, so no spike gets lost; infinite values count as missing."""
    if not len(values):
        return Envelope(values, values, values)
    values = np.where(np.isfinite(values), values, np.nan)
    number = np.add.reduceat(~np.isnan(values), begins, dtype=np.int64)
    with np.errstate(invalid="ignore"):
        mean = np.add.reduceat(np.nan_to_num(values), begins) / np.where(number, number, np.nan)
    return Envelope(mean, np.fmin.reduceat(values, begins), np.fmax.reduceat(values, begins))


def quantiles(values: np.ndarray, begins: np.ndarray, q: tuple[float, ...]) -> list[np.ndarray]:
    """For each of `q` the quantile of each range; NaN where a range has no finite value."""
    quantiles = np.full((len(q), len(begins)), np.nan)
    for i, part in enumerate(np.split(values, begins[1:])):
        finite = part[np.isfinite(part)]
        if len(finite):
            quantiles[:, i] = np.quantile(finite, q)
    return list(quantiles)
