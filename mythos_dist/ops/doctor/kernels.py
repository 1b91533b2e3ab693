"""Which kernels this machine has, and which of them a config would use: experts, attention, dtype.

The trap: `F.grouped_mm` gives the right numbers everywhere, but it is one kernel per product only for bf16 on compute
capability 9.x and 10.x (torch, aten/src/ATen/native/cuda/GroupedBlas.cpp). Elsewhere it copies the experts' row
counts to the CPU, waits for them, and runs one product per expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from mythos_dist.config.schema import Config
from mythos_dist.ops.doctor.gpu import Gpus
from mythos_dist.ops.doctor.lines import Line, note, ok, problem

INSTALL = "bash launch/install_gpu.sh"
DISTRIBUTIONS = {"megablocks": ("megablocks", "grouped_gemm", "stanford-stk"), "flash_attn": ("flash-attn",)}
HALF = (8, 0)  # compute capability that bf16, flash-attn and grouped_gemm want
ONE_KERNEL = (9, 10)  # major compute capabilities with a grouped kernel for bf16


@dataclass(frozen=True)
class Kernels:
    missing: dict[str, str | None]  # package -> why it cannot be used here; None: it can
    versions: dict[str, str]  # of the installed distributions
    dtype_refused: str = ""  # by DeepSpeed, for the config's train.dtype


def find(config: Config | None) -> Kernels:
    """Import what is there; with a config also ask DeepSpeed about its dtype, as training does."""
    from mythos_dist.errors import UserError
    from mythos_dist.model.kernels import why_not
    from mythos_dist.parallel.process import check_dtype, choose_accelerator

    versions, refused = {}, ""
    for name in sum(DISTRIBUTIONS.values(), ()):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if config:
        choose_accelerator()
        try:
            check_dtype(config.train.dtype)
        except UserError as error:
            refused = str(error)
    return Kernels({"megablocks": why_not("megablocks"), "flash_attn": why_not("flash_attn")}, versions, refused)


def lines(found: Kernels, gpus: Gpus) -> Iterator[Line]:
    """What is there, whatever a config asks for."""
    if not gpus.usable:
        yield ok("grouped_mm", "on CPUs a loop over experts inside of torch")
    elif gpus.capability and gpus.capability[0] in ONE_KERNEL:
        yield ok("grouped_mm", f"for bf16 one kernel per product (compute capability {_dotted(gpus)})")
    else:
        text = f"on compute capability {_dotted(gpus)} a loop over experts that waits for the GPU, not one kernel"
        yield note("grouped_mm", text, _instead_of_grouped(found, gpus))
    for package, title in (("megablocks", "MegaBlocks"), ("flash_attn", "flash-attn")):
        versions = ", ".join(
            f"{name} {found.versions[name]}" for name in DISTRIBUTIONS[package] if name in found.versions
        )
        why = found.missing[package]
        if why is None:
            yield ok(package, versions or "can be imported")
        elif versions or gpus.usable:
            yield note(package, f"{title} cannot be used: {why}" + (f"; {versions}" if versions else ""), INSTALL)
        else:
            yield ok(package, "not installed; only GPUs use it")


def choices(config: Config, found: Kernels, gpus: Gpus) -> Iterator[Line]:
    """What this config would use, and what of it cannot be."""
    yield _dtype(config, found, gpus)
    yield _experts(config, found, gpus)
    yield _attention(config, found, gpus)


def _dtype(config: Config, found: Kernels, gpus: Gpus) -> Line:
    dtype, topic = config.train.dtype, "train.dtype"
    if found.dtype_refused:
        text, _, remedy = found.dtype_refused.partition("; ")
        return problem(topic, text, remedy)
    if dtype == "bf16" and gpus.capability and gpus.capability < HALF:
        text = f"train.dtype=bf16: compute capability {_dotted(gpus)} has no bf16 units, torch would emulate them"
        return problem(topic, text, "set train.dtype=fp16 or fp32")
    if dtype == "fp32" and gpus.capability and gpus.capability >= HALF:
        text = "train.dtype=fp32 leaves the tensor cores of these GPUs idle, and flash-attn and MegaBlocks out"
        return note(topic, text, "set train.dtype=bf16, unless you compare numbers")
    return ok(topic, f"train.dtype={dtype}: runs on {'these GPUs' if gpus.usable else 'CPUs'}")


def _experts(config: Config, found: Kernels, gpus: Gpus) -> Line:
    backend, dtype, topic = config.experts.backend, config.train.dtype, "experts.backend"
    asked = f"experts.backend={backend}"
    if backend == "reference":
        return note(topic, f"{asked} -> one expert after the other, for tests", "set experts.backend=grouped")
    if backend == "megablocks":
        reasons = _those(
            (found.missing["megablocks"], True),
            ("torch sees no GPU", not gpus.usable),
            (f"it computes in bf16 only, and train.dtype={dtype}", dtype != "bf16"),
            (f"it needs compute capability 8.0, not {_dotted(gpus)}", _older(gpus)),
        )
        remedy = "set experts.backend=grouped"
        if gpus.usable and found.missing["megablocks"]:
            remedy = f"{INSTALL}, or {remedy}"
        if reasons:
            return problem(topic, f"{asked} cannot run: {'; '.join(reasons)}", remedy)
        return ok(topic, f"{asked} -> MegaBlocks' kernels, products by grouped_gemm")
    if not gpus.usable:
        return ok(topic, f"{asked} -> F.grouped_mm, on a CPU a loop over experts")
    if gpus.capability and gpus.capability[0] not in ONE_KERNEL:
        text = f"{asked} -> F.grouped_mm, on compute capability {_dotted(gpus)} a loop over experts"
        return note(topic, text, _instead_of_grouped(found, gpus))
    if dtype != "bf16":
        text = f"{asked} -> F.grouped_mm, in {dtype} a loop over experts: its kernel is for bf16"
        return note(topic, text, "set train.dtype=bf16")
    return ok(topic, f"{asked} -> F.grouped_mm, one kernel per product")


def _attention(config: Config, found: Kernels, gpus: Gpus) -> Line:
    from mythos_dist.model.attend import WIDEST_HEAD

    asked, topic = f"train.attention={config.train.attention}", "train.attention"
    if config.train.attention == "sdpa":
        return ok(topic, f"{asked} -> sdpa, PyTorch's own fused kernel")
    head_dim = config.model.widest_head
    missing = found.missing["flash_attn"]
    reasons = _those(
        ("no GPU", not gpus.usable),
        ("train.dtype=fp32 is not half precision", config.train.dtype == "fp32"),
        (f"compute capability {_dotted(gpus)} is below 8.0", _older(gpus)),
        (f"heads of {head_dim} channels are wider than {WIDEST_HEAD}", head_dim > WIDEST_HEAD),
    )
    if config.train.attention == "flash_attn":
        if not (reasons or missing):
            return ok(topic, f"{asked} -> flash-attn")
        remedy = "set train.attention=auto" if reasons else f"{INSTALL}, or set train.attention=auto"
        return problem(topic, f"{asked} cannot run: {'; '.join(_those((missing, True)) + reasons)}", remedy)
    if reasons:
        return ok(topic, f"{asked} -> sdpa ({'; '.join(reasons)})")
    if missing:
        return note(topic, f"{asked} -> sdpa: {missing}", f"{INSTALL}; sdpa gives the same numbers, slower")
    return ok(topic, f"{asked} -> flash-attn")


def _instead_of_grouped(found: Kernels, gpus: Gpus) -> str:
    """What to do on a GPU where `F.grouped_mm` is a loop. grouped_gemm is one too, unless it was built with CUTLASS."""
    if _older(gpus):
        return "nothing on these GPUs; those with compute capability 9.x or 10.x have the kernel"
    if gpus.capability and gpus.capability[0] != HALF[0]:
        return f"compare with experts.backend=megablocks (bf16) after GROUPED_GEMM_CUTLASS=1 {INSTALL}; untried here"
    install = f"{INSTALL}, then " if found.missing["megablocks"] else ""
    return f"{install}compare with experts.backend=megablocks, whose grouped_gemm has a kernel for these GPUs (bf16)"


def _those(*reasons: tuple[str | None, bool]) -> list[str]:
    """The reasons that hold."""
    return [text for text, holds in reasons if text and holds]


def _older(gpus: Gpus) -> bool:
    return gpus.capability is not None and gpus.capability < HALF


def _dotted(gpus: Gpus) -> str:
    major, minor = gpus.capability or (0, 0)
    return f"{major}.{minor}"
