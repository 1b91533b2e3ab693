"""Check the GPU packages: import each and, on a GPU, compare one small forward and backward with plain torch.

grouped_gemm is checked by MegaBlocks. stk is only imported: MegaBlocks' sparse products, which use its kernels, are
refused with Triton 3.2 and newer.
Exit code 1 if a package is missing or wrong. `--missing` only lists what has to be built, and why.
"""

import argparse
import sys
from collections.abc import Callable
from importlib import metadata

from gpu_sources import pins

from mythos_dist.gpu_packages import import_error

TOLERANCE = 2e-2  # relative to the norm: a few roundings of bf16, 2^-9


def missing(name: str) -> str | None:
    """None if the pinned version is installed and can be imported, else the reason."""
    try:
        version = metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "is not installed"
    if version != pins()[name].version:
        return f"{version} is installed"
    return import_error(name)


def relative_error(device: str, function: Callable, reference: Callable, *shapes: tuple[int, ...]) -> float:
    """The largest error of `function` in bf16, of its output and all gradients, relative to the norm.

    `reference` gets the same inputs, random tensors of variance 1 / last dim, in fp32.
    """
    import torch

    generator, results = torch.Generator().manual_seed(0), []
    inputs = [(torch.randn(shape, generator=generator) / shape[-1] ** 0.5).bfloat16() for shape in shapes]
    for compute, dtype in ((function, torch.bfloat16), (reference, torch.float32)):
        leaves = [one.to(device, dtype).requires_grad_() for one in inputs]
        y = compute(*leaves)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
        results.append([one.detach().float() for one in (y, *torch.autograd.grad(y, leaves, direction))])
    return max(float((ours - exact).norm() / exact.norm()) for ours, exact in zip(*results, strict=True))


def megablocks(device: str) -> float:
    """experts.backend=megablocks, whose products are grouped_gemm's: five experts of which one gets no token, against
    one expert after the other."""
    import torch

    from mythos_dist.model.experts import megablocks, reference

    index = torch.tensor([[0, 1], [3, 0], [4, 3], [1, 4], [0, 3], [1, 0]], device=device)
    stack = (5, 48, 64)
    return relative_error(
        device,
        lambda x, weights, gate, up, down: megablocks(x, weights, index, gate, up, down),
        lambda x, weights, gate, up, down: reference(x, weights, index, gate, up, down),
        *((6, 64), (6, 2), stack, stack, stack),
    )


def flash_attn(device: str) -> float:
    """Causal attention of four heads over two key heads, as train.attention=flash_attn runs it, against torch's."""
    from mythos_dist.model.attend import attend

    keys = (1, 40, 2, 64)
    return relative_error(
        device,
        lambda q, k, v: attend(8 * q, k, v, "flash_attn"),
        lambda q, k, v: attend(8 * q, k, v, "sdpa"),
        *((1, 40, 4, 64), keys, keys),
    )


CHECKS: dict[str, Callable[[str], float]] = {"megablocks": megablocks, "flash-attn": flash_attn}


def check_package(name: str, gpu: str) -> tuple[bool, str]:
    """Whether the package is good, and a line about it. `gpu`: a name; empty without one."""
    title = f"{name} {pins()[name].version}"
    if reason := missing(name):
        return False, f"{title}: {reason}"
    if not gpu or name not in CHECKS:
        return True, f"{title}: can be imported"
    try:
        error = CHECKS[name]("cuda")
    except Exception as problem:
        return False, f"{title}: can be imported, but fails on {gpu}: {problem}"
    verdict = "equals" if error < TOLERANCE else "DIFFERS from"
    return error < TOLERANCE, f"{title}: {verdict} plain torch on {gpu}, relative error {error:.1e} (limit {TOLERANCE})"


def main() -> None:
    """Check the named packages, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"any of {', '.join(pins())} (default: all)")
    parser.add_argument("--missing", action="store_true", help="only list what has to be built, and why")
    arguments = parser.parse_args()
    names = arguments.packages or list(pins())
    if unknown := sorted(set(names) - set(pins())):
        parser.error(f"unknown package: {', '.join(unknown)}; choose from {', '.join(pins())}")
    if arguments.missing:
        for name in names:
            if reason := missing(name):
                print(name, reason)
        return

    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    results = [check_package(name, gpu) for name in names]
    for _, line in results:
        print(line)
    if not gpu:
        print("no GPU here: run launch/check_gpu.py again on a machine that has one")
    sys.exit(0 if all(good for good, _ in results) else 1)


if __name__ == "__main__":
    main()
