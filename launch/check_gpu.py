"""Do the GPU packages work? Imports each and, on a GPU, holds one small forward and backward against plain torch.

stk is only imported: what uses its kernels, MegaBlocks' sparse products, is refused beside Triton 3.2 and newer.
Exit code 1 if something is missing or wrong. `--missing` only lists what would have to be built, and why.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib import metadata

from gpu_sources import pins

MODULES = {
    "stanford-stk": ["stk"],
    "grouped_gemm": ["grouped_gemm"],
    "megablocks": ["megablocks_ops", "megablocks.layers.dmoe"],
    "flash-attn": ["flash_attn", "flash_attn_2_cuda"],
}
TOLERANCE = 2e-2  # of the norm: a few roundings of bf16, 2^-9


def why_missing(name: str) -> str | None:
    """None if the pinned version is there and can be imported, else the reason why not."""
    try:
        version = metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "is not installed"
    if version != pins()[name].version:
        return f"{version} is installed"
    try:
        for module in MODULES[name]:
            importlib.import_module(module)
    except Exception as error:  # built for another torch it fails with OSError, AttributeError, RuntimeError, ...
        return f"cannot be imported: {(str(error) or type(error).__name__).splitlines()[0]}"
    return None


def error_of(function: Callable, plain: Callable, inputs: Sequence, seed: int = 1) -> float:
    """The largest distance, relative to the norm, of the output and of all gradients from `plain` in fp32."""
    import torch

    leaves = [leaf.clone().requires_grad_() for leaf in inputs]
    exact = [leaf.float().requires_grad_() for leaf in inputs]
    y, expected = function(*leaves), plain(*exact)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)
    found = [y, *torch.autograd.grad(y, leaves, direction)]
    right = [expected, *torch.autograd.grad(expected, exact, direction.float())]
    with torch.no_grad():
        return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, right, strict=True))


def random_bf16(device: str, *shapes: tuple[int, ...]) -> list:
    """A tensor for each shape, the same numbers every time, of variance 1 / last dimension."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(s, generator=generator) / s[-1] ** 0.5).to(device, torch.bfloat16) for s in shapes]


def grouped_gemm(device: str) -> float:
    """Three experts of 5, 0 and 11 rows, against a product for each."""
    import torch
    from grouped_gemm import ops  # pyright: ignore[reportMissingImports]

    sizes = [5, 0, 11]
    return error_of(
        lambda rows, stack: ops.gmm(rows, stack, torch.tensor(sizes), trans_b=True),
        lambda rows, stack: torch.cat([part @ w.T for part, w in zip(rows.split(sizes), stack, strict=True)]),
        random_bf16(device, (16, 64), (3, 32, 64)),
    )


def megablocks(device: str) -> float:
    """experts.backend=megablocks, five experts of which one gets no token, against one after the other."""
    import torch
    import torch.nn.functional as F

    from mythos_dist.model.megablocks import megablocks

    index = torch.tensor([[0, 1], [3, 0], [4, 3], [1, 4], [0, 3], [1, 0]], device=device)

    def plain(x, weights, gate, up, down):
        chosen = F.one_hot(index, len(gate)).to(x) * weights.unsqueeze(-1)  # (N, k, E)
        every = [(F.silu(x @ g.T) * (x @ u.T)) @ d for g, u, d in zip(gate, up, down, strict=True)]
        return torch.einsum("nke,end->nd", chosen, torch.stack(every))

    stack = (5, 48, 64)
    return error_of(
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
    return error_of(lambda q, k, v: flash_attn_func(q, k, v, causal=True), plain, [8 * q, k, v])


CHECKS: dict[str, Callable[[str], float]] = {
    "grouped_gemm": grouped_gemm,
    "megablocks": megablocks,
    "flash-attn": flash_attn,
}


def line_of(name: str, gpu: str) -> tuple[bool, str]:
    """Whether the package is good, and what was found, for a person; `gpu` is empty where there is none."""
    missing = why_missing(name)
    title = f"{name} {pins()[name].version}"
    if missing:
        return False, f"{title}: {missing}"
    if not gpu or name not in CHECKS:
        return True, f"{title}: imports"
    try:
        error = CHECKS[name]("cuda")
    except Exception as problem:
        return False, f"{title}: imports, but fails on {gpu}: {problem}"
    verdict = "equals" if error < TOLERANCE else "DIFFERS from"
    return error < TOLERANCE, f"{title}: {verdict} plain torch on {gpu}, error {error:.1e} (up to {TOLERANCE} is bf16)"


def main() -> None:
    """Check the named packages, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(pins())} (all)")
    parser.add_argument("--missing", action="store_true", help="list those that are not there, and why")
    arguments = parser.parse_args()
    names = arguments.packages or list(pins())
    if unknown := sorted(set(names) - set(pins())):
        parser.error(f"no such package: {', '.join(unknown)}; there are {', '.join(pins())}")
    if arguments.missing:
        reasons = {name: why_missing(name) for name in names}
        print(*(f"{name} {reason}" for name, reason in reasons.items() if reason), sep="\n")
        return

    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    found = [line_of(name, gpu) for name in names]
    print(*(line for _, line in found), sep="\n")
    if not gpu:
        print("no GPU here: run launch/check_gpu.py again on a machine that has one")
    sys.exit(0 if all(good for good, _ in found) else 1)


if __name__ == "__main__":
    main()
