"""Check the GPU packages: import each and, on a GPU, compare one small forward and backward with plain torch.

stk is only imported: MegaBlocks' sparse products, which use its kernels, are refused with Triton 3.2 and newer.
Exit code 1 if a package is missing or wrong. `--missing` only lists what has to be built, and why.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
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


def relative_error(function: Callable, reference: Callable, inputs: Sequence) -> float:
    """The largest error, relative to the norm, of the output and of all gradients; `reference` computes in fp32."""
    import torch

    leaves = [leaf.clone().requires_grad_() for leaf in inputs]
    exact = [leaf.float().requires_grad_() for leaf in inputs]
    y, expected = function(*leaves), reference(*exact)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    ours = [y, *torch.autograd.grad(y, leaves, direction)]
    theirs = [expected, *torch.autograd.grad(expected, exact, direction.float())]
    with torch.no_grad():
        return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def random_bf16(device: str, *shapes: tuple[int, ...]) -> list:
    """A tensor per shape, the same values in every run, of variance 1 / last dim."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(s, generator=generator) / s[-1] ** 0.5).to(device, torch.bfloat16) for s in shapes]


def grouped_gemm(device: str) -> float:
    """Three experts with 5, 0 and 11 rows, against one product each."""
    import torch
    from grouped_gemm import ops  # pyright: ignore[reportMissingImports]

    sizes = [5, 0, 11]
    return relative_error(
        lambda rows, stack: ops.gmm(rows, stack, torch.tensor(sizes), trans_b=True),
        lambda rows, stack: torch.cat([part @ w.T for part, w in zip(rows.split(sizes), stack, strict=True)]),
        random_bf16(device, (16, 64), (3, 32, 64)),
    )


def megablocks(device: str) -> float:
    """experts.backend=megablocks, five experts of which one gets no token, against a loop over experts."""
    import torch
    import torch.nn.functional as F

    from mythos_dist.model.megablocks import megablocks

    index = torch.tensor([[0, 1], [3, 0], [4, 3], [1, 4], [0, 3], [1, 0]], device=device)

    def plain(x, weights, gate, up, down):
        chosen = F.one_hot(index, len(gate)).to(x) * weights.unsqueeze(-1)  # (N, k, E)
        outputs = [(F.silu(x @ g.T) * (x @ u.T)) @ d for g, u, d in zip(gate, up, down, strict=True)]
        return torch.einsum("nke,end->nd", chosen, torch.stack(outputs))

    stack = (5, 48, 64)
    return relative_error(
        lambda x, weights, gate, up, down: megablocks(x, weights, index, gate, up, down),
        plain,
        random_bf16(device, (6, 64), (6, 2), stack, stack, stack),
    )


def flash_attn(device: str) -> float:
    """Causal attention of four heads over two key heads, against the softmax written out."""
    import torch
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    S, heads, groups, width = 40, 4, 2, 64

    def plain(q, k, v):
        k, v = (tensor.repeat_interleave(heads // groups, dim=2) for tensor in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / width**0.5
        future = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
        return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(future, float("-inf")).softmax(-1), v)

    q, k, v = random_bf16(device, (1, S, heads, width), (1, S, groups, width), (1, S, groups, width))
    return relative_error(lambda q, k, v: flash_attn_func(q, k, v, causal=True), plain, [8 * q, k, v])


CHECKS: dict[str, Callable[[str], float]] = {
    "grouped_gemm": grouped_gemm,
    "megablocks": megablocks,
    "flash-attn": flash_attn,
}


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
