"""Clusters as the planner models them: the files in `configs/clusters` give each figure with its source."""

import contextlib
import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from mythos_dist.config.fields import Kind, Range, show
from mythos_dist.config.tree import Node, read_yaml, show_node
from mythos_dist.errors import UserError
from mythos_dist.packaged import CONFIGS, packaged_file

_HOST_SHARE = 0.75  # of a node's memory, for saved hidden states
_RENAMED = {"product_efficiency": "matmul_efficiency"}  # keys of earlier versions


@dataclass(frozen=True)
class Cluster:
    """GB are 1e9 bytes; rates are per GPU and direction. A laptop's "GPUs" are its processes."""

    name: str
    gpus_per_node: int
    nvlink_domain: int  # GPUs that the fast fabric joins
    memory_gb: float  # of one GPU
    reserved_gb: float  # of that, for CUDA, NCCL and fragmentation
    bf16_tflops: float  # dense peaks
    fp32_tflops: float
    matmul_efficiency: float  # share of the peak that large matrix multiplications reach
    memory_gb_per_s: float
    fast_gb_per_s: float  # inside the domain
    slow_gb_per_s: float  # between domains
    fast_latency_us: float  # of one collective
    slow_latency_us: float
    link_efficiency: float  # share of a wire's rate that large collectives reach
    dollars_per_gpu_hour: float
    host_memory_gb: float = 0.0  # of one node; 0: unknown, and not checked
    host_gb_per_s: float = 50.0  # between a GPU and host memory, per direction

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a run may use."""
        return (self.memory_gb - self.reserved_gb) * 1e9

    @property
    def usable_on_host(self) -> float:
        """Bytes of host memory per GPU for saved hidden states: the rest is for the system, loaders and copies of
        checkpoints. Infinite if unknown."""
        return self.host_memory_gb * 1e9 * _HOST_SHARE / self.gpus_per_node or math.inf

    def host_seconds(self, size: float) -> float:
        """Time to copy `size` bytes between a GPU and host memory."""
        return size / (self.host_gb_per_s * self.link_efficiency * 1e9)

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s of one GPU in `train.dtype`."""
        return 1e12 * (self.fp32_tflops if dtype == "fp32" else self.bf16_tflops)

    def seconds(self, kind: str, size: float, ranks: int, stride: int, messages: float) -> float:
        """Time of `messages` collectives with `size` bytes together (by `parallel.traffic`'s convention).

        ranks, stride: size of the group, and the distance between its ranks. Traffic between domains uses the ports of
        all members in a domain, as NCCL's rings do; all_to_all sends to each rank separately.
        """
        if ranks == 1 or not size:
            return 0.0
        in_domain = min(ranks, max(1, self.nvlink_domain // stride))  # members in one domain
        share = {"all_reduce": 2 * (ranks - 1) / ranks, "send": 1.0, "broadcast": 1.0}.get(kind, (ranks - 1) / ranks)
        fast, slow = (1e9 * rate * self.link_efficiency for rate in (self.fast_gb_per_s, self.slow_gb_per_s))
        if kind == "all_to_all":
            outside = (ranks - in_domain) / ranks
            seconds = max(size * outside / slow, size * (in_domain - 1) / ranks / fast)
        else:
            seconds = size * share / (fast if in_domain == ranks else min(fast, slow * in_domain))
        latency = self.fast_latency_us if in_domain == ranks else self.slow_latency_us
        return seconds + messages * latency * 1e-6


def _is_cluster(file: Path) -> bool:
    with contextlib.suppress(OSError):
        return b"nvlink_domain" in file.read_bytes()[:4096]
    return False


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster's file, or the one of that name that comes with the package: h100_80gb.

    Raises UserError with all problems.

    >>> from mythos_dist import load_cluster
    >>> load_cluster("configs/clusters/h100_80gb.yaml").gpus_per_node
    8
    """
    path = packaged_file(path, CONFIGS / "clusters")
    if not path.exists() and (moved := path.parent / "clusters" / path.name).is_file():
        path = moved  # runs of version 0.1 name configs/NAME.yaml
    try:
        tree = read_yaml(path)
    except FileNotFoundError:
        folders = (path.parent, path.parent / "clusters")
        others = sorted(str(file) for folder in folders for file in folder.glob("*.yaml") if _is_cluster(file))
        known = [file.stem for file in sorted((CONFIGS / "clusters").glob("*.yaml"))]
        raise UserError(
            f"there is no cluster file {path}; cluster files nearby: {', '.join(others) or 'none'}; "
            f"the package contains {', '.join(known)}"
        ) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", source=str(path)) from None
    if not isinstance(tree, dict):
        raise UserError("is not a mapping; expected lines such as `gpus_per_node: 8`", source=str(path))
    values, problems = _read_values(tree)
    if not problems and values["reserved_gb"] >= values["memory_gb"]:
        problems.append(f"reserved_gb={values['reserved_gb']} must be less than memory_gb={values['memory_gb']}")
    if problems:
        raise UserError(sorted(problems), source=str(path))
    return Cluster(**values)


def _read_values(tree: dict[str, Node]) -> tuple[dict[str, Any], list[str]]:
    """The fields of a `Cluster` that a file's tree sets, and what is wrong with it."""
    values: dict[str, Any] = {}
    kinds, problems = get_type_hints(Cluster), []
    for old, key in _RENAMED.items():
        if old in tree and key in tree:
            problems.append(f"{old} is the former name of {key}; leave it out")
    tree = {_RENAMED.get(key, key): value for key, value in tree.items()}
    for key in tree.keys() - kinds.keys():
        close = difflib.get_close_matches(str(key), kinds, n=1, cutoff=0.5)
        meant = f"did you mean {close[0]}?" if close else f"known: {', '.join(kinds)}"
        problems.append(f"{key[:80]}: unknown key; {meant}")
    for key, kind in kinds.items():
        if key not in tree:
            if not hasattr(Cluster, key):  # it has no default
                problems.append(f"{key} is missing")
            continue
        try:
            values[key] = Kind(kind).read(tree[key])
        except ValueError as error:
            problems.append(f"{key}={show_node(tree[key], 80)}: expected {error}")
            continue
        if problem := _value_problem(key, kind, values[key]):
            problems.append(problem)
    return values, problems


def _value_problem(key: str, kind: type, value: Any) -> str:
    """What is wrong with the value of a field of `Cluster`; empty: nothing."""
    if problem := Kind(kind, range=None if kind is str else Range(-math.inf, 1e15)).problem(value):
        return f"{key}={show(value)}{problem}"
    if kind is str:
        return ""
    if value < 0 or (value == 0 and key not in ("reserved_gb", "dollars_per_gpu_hour", "host_memory_gb")):
        return f"{key}={value} must be above 0"
    if key.endswith("efficiency") and value > 1:
        return f"{key}={value} is a share of the peak: at most 1"
    return ""
