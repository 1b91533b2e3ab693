"""What the planner has to know of a cluster: the files in `configs/clusters`, each figure with its source."""

import contextlib
import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from mythos_dist.config.fields import Kind, Range, show
from mythos_dist.config.tree import read_yaml, show_node
from mythos_dist.errors import UserError


@dataclass(frozen=True)
class Cluster:
    """GB are 1e9 bytes; rates are per GPU and direction. A laptop's "GPUs" are its processes."""

    name: str
    gpus_per_node: int
    nvlink_domain: int  # GPUs that the fast fabric joins
    memory_gb: float  # of one GPU
    reserved_gb: float  # of that, what CUDA, NCCL and holes between allocations take
    bf16_tflops: float  # dense peaks
    fp32_tflops: float
    product_efficiency: float  # share of the peak that large products reach
    memory_gb_per_s: float
    fast_gb_per_s: float  # inside the domain
    slow_gb_per_s: float  # between domains
    fast_latency_us: float  # of one collective
    slow_latency_us: float
    link_efficiency: float  # share of a wire's rate that large collectives reach
    dollars_per_gpu_hour: float

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a run may hold."""
        return (self.memory_gb - self.reserved_gb) * 1e9

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s of one GPU in `train.dtype`."""
        return 1e12 * (self.fp32_tflops if dtype == "fp32" else self.bf16_tflops)

    def seconds(self, kind: str, size: float, ranks: int, stride: int, messages: float) -> float:
        """What `messages` collectives that together have `size` bytes (in `parallel.traffic`'s sense) take.

        ranks, stride: the axis joins so many ranks, each `stride` behind the one before. What crosses domains goes
        over the ports of all members that lie in one, as NCCL's rings do; all_to_all sends to each rank by itself.
        """
        if ranks == 1 or not size:
            return 0.0
        inside = min(ranks, max(1, self.nvlink_domain // stride))  # members in one domain
        share = {"all_reduce": 2 * (ranks - 1) / ranks, "send": 1.0, "broadcast": 1.0}.get(kind, (ranks - 1) / ranks)
        fast, slow = (1e9 * rate * self.link_efficiency for rate in (self.fast_gb_per_s, self.slow_gb_per_s))
        if kind == "all_to_all":
            outside = (ranks - inside) / ranks
            seconds = max(size * outside / slow, size * (inside - 1) / ranks / fast)
        else:
            seconds = size * share / (fast if inside == ranks else min(fast, slow * inside))
        latency = self.fast_latency_us if inside == ranks else self.slow_latency_us
        return seconds + messages * latency * 1e-6


def _is_cluster(file: Path) -> bool:
    with contextlib.suppress(OSError):
        return b"nvlink_domain" in file.read_bytes()[:4096]
    return False


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster's file. Raises UserError with all that is wrong with it."""
    path = Path(path).expanduser() if str(path).startswith("~/") else Path(path)
    if not path.exists() and (moved := path.parent / "clusters" / path.name).is_file():
        path = moved  # where version 0.1's configs/NAME.yaml is now; runs of that version name it
    try:
        tree = read_yaml(path)
    except FileNotFoundError:
        folders = (path.parent, path.parent / "clusters")
        others = sorted(str(file) for folder in folders for file in folder.glob("*.yaml") if _is_cluster(file))
        raise UserError(f"there is no cluster file {path}; there are {', '.join(others) or 'none beside it'}") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", source=str(path)) from None
    if not isinstance(tree, dict):
        raise UserError("holds no lines such as `gpus_per_node: 8`", source=str(path))
    values: dict[str, Any] = {}
    kinds = get_type_hints(Cluster)
    found = []
    for key in tree.keys() - kinds.keys():
        close = difflib.get_close_matches(str(key), kinds, n=1, cutoff=0.5)
        meant = f"did you mean {close[0]}?" if close else f"known: {', '.join(kinds)}"
        found.append(f"{key[:80]}: unknown key; {meant}")
    for key, kind in kinds.items():
        if key not in tree:
            found.append(f"{key} is missing")
            continue
        try:
            values[key] = value = Kind(kind).read(tree[key])
        except ValueError as error:
            found.append(f"{key}={show_node(tree[key], 80)}: expected {error}")
            continue
        if problem := Kind(kind, range=None if kind is str else Range(-math.inf, 1e15)).problem(value):
            found.append(f"{key}={show(value)}{problem}")
        elif kind is str:
            continue
        elif value < 0 or (value == 0 and key not in ("reserved_gb", "dollars_per_gpu_hour")):
            found.append(f"{key}={value} must be above 0")
        elif key.endswith("efficiency") and value > 1:
            found.append(f"{key}={value} is a share of the peak: at most 1")
    if not found and values["reserved_gb"] >= values["memory_gb"]:
        found.append(f"reserved_gb={values['reserved_gb']} leaves nothing of memory_gb={values['memory_gb']}")
    if found:
        raise UserError(sorted(found), source=str(path))
    return Cluster(**values)
