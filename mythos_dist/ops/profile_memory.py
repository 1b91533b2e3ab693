"""What holds a rank's memory during one real step, by the plan's categories: a plot and its values.

Measured as in a dry run (`ops/plan/meter.py`): bytes of live tensors, from each operation. Tensors that existed before
the step count if they are weights, gradients or the optimizer's, or once an operation uses them.
The trap: the plan is for the mean number of loops, and a step may have drawn more or fewer.
"""

import json
from pathlib import Path
from typing import Any

from mythos_dist.files import write_atomically
from mythos_dist.ops.plan.memory import PARTS, Memory
from mythos_dist.ops.plan.meter import Meter
from mythos_dist.train.plots import save_plot
from mythos_dist.units import short_bytes

_SAMPLES = 1000  # at least, of a step with that many operations; at most twice as many
_COLORS = dict(zip(PARTS, ("#2a6fdb", "#e07b00", "#1a9c5b", "#c2418f", "#7a52cc", "#0c9bb3"), strict=True))


class MemoryTimeline(Meter):
    """A `Meter` that also keeps the live bytes by part after every few operations."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: list[tuple[int, dict[str, int]]] = []  # operations so far, bytes by part
        self._every = 1  # operations

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.operations % self._every == 0:
            self.samples.append((self.operations, dict(self.live)))
            if len(self.samples) == 2 * _SAMPLES:
                del self.samples[1::2]
                self._every *= 2
        return out


def write_memory(prefix: Path, timeline: MemoryTimeline, planned: Memory, title: str) -> None:
    """Write prefix.memory.json and prefix.memory.png. Raises OSError."""
    measured = {part: timeline.at_peak.get(part, 0) for part in PARTS}
    content = {
        "peak_bytes": timeline.peak,
        "measured_bytes": measured,
        "planned_bytes": {part: round(planned.get(part, 0.0)) for part in PARTS},
        "operations": [at for at, _ in timeline.samples],
        "live_bytes": {part: [live.get(part, 0) for _, live in timeline.samples] for part in PARTS},
    }
    write_atomically(prefix.with_name(f"{prefix.name}.memory.json"), json.dumps(content) + "\n")
    size, unit = _unit(max(timeline.peak, sum(planned.values())))
    with save_plot(prefix.with_name(f"{prefix.name}.memory.png"), 2, (12, 4.5)) as (over_time, compared):
        curves = [[value / size for value in content["live_bytes"][part]] for part in PARTS]
        over_time.stackplot(content["operations"], *curves, labels=PARTS, colors=[_COLORS[part] for part in PARTS])
        over_time.axhline(timeline.peak / size, color="black", linewidth=0.8, linestyle="--")
        over_time.set_xlabel("operations of the step")
        over_time.set_ylabel(f"live tensors ({unit})")
        over_time.set_title(f"{title}: peak {timeline.peak / size:.3g} {unit}", fontsize=11)
        over_time.margins(x=0)
        y = range(len(PARTS))
        for offset, values, label, alpha in ((0.2, planned, "planned", 0.45), (-0.2, measured, "measured", 1.0)):
            widths = [values.get(part, 0) / size for part in PARTS]
            colors = [_COLORS[part] for part in PARTS]
            bars = compared.barh([i + offset for i in y], widths, height=0.38, color=colors, alpha=alpha)
            labels = [f"{label} {short_bytes(values.get(part, 0))}" for part in PARTS]
            compared.bar_label(bars, labels, padding=3, fontsize=8)
        compared.set_yticks(list(y), PARTS)
        compared.margins(x=0.3)
        compared.set_xlabel(f"at the peak ({unit})")
        compared.set_title("by category of the plan", fontsize=11)


def _unit(size: float) -> tuple[float, str]:
    return (1e9, "GB") if size >= 1e9 else (1e6, "MB")
