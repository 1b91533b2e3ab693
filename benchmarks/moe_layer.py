"""The routed experts alone, forward and backward: ours against other libraries, on equal weights, inputs and routing.

Each side gets tokens and router logits, chooses the top k itself, and returns the weighted sum over the chosen experts;
the router's matrix product and shared experts are left out everywhere. Before timing, outputs and gradients are
compared. Each side runs in its own process, rounds are interleaved, and each round has a new routing: in bf16 oneDNN
compiles kernels for new shapes, and one side must not profit from another's.

Sides: open-mythos' MoEFFN (a loop over slots and experts), transformers' DeepseekV3MoE (a loop over experts),
torchtitan's RoutedExperts (sort and grouped GEMM; it rounds to bf16, which is switched off in fp32). torchtitan
requires packages that are not needed here, so it is installed in a separate folder:
    python -m pip install --no-deps --target FOLDER torchtitan==0.3.0 spmd_types==0.2.3 tyro docstring_parser
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import DTYPES, open_mythos, reset_peak, resident, run_interleaved, serve
from torch import Tensor, nn

from mythos_dist.config.schema import MythosConfig
from mythos_dist.model.experts import Experts
from mythos_dist.parallel.mesh import SINGLE
from mythos_dist.parallel.process import keep_freed_memory

# N tokens, D model, E experts, k experts per token, F hidden width of an expert.

CASES = {"E64 k4": (64, 4), "E8 k2": (8, 2)}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative; sums in another order, and bf16 keeps 8 bits
TARGET = 2.4  # times the speed of the loop over slots and experts, at E64 k4
LOOP = "open-mythos"
Layer = Callable[[Tensor, Tensor], Tensor]  # x (N, D), router logits (N, E) -> y (N, D)
# config, gate (E, F, D), up (E, F, D), down (E, D, F) -> a layer and the module with its weights
Build = Callable[..., tuple[Layer, nn.Module]]


def choose(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Router logits (N, E) -> weights (N, k) fp32, index (N, k): softmax, the k largest, renormalized."""
    scores = logits.float().softmax(-1)
    index = logits.topk(k, dim=-1).indices
    weights = scores.gather(-1, index)
    return weights / weights.sum(-1, keepdim=True), index


def build_ours(config: MythosConfig, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Layer, nn.Module]:
    """`Experts` with the grouped backend, in a process that keeps freed memory, like our trainer."""
    keep_freed_memory()
    experts = Experts(config, "grouped", SINGLE)
    experts.load_state_dict({"w1": gate, "w3": up, "w2": down.transpose(1, 2)})
    return lambda x, logits: experts(x, *choose(logits, config.n_experts_per_tok))[0], experts


def build_open_mythos(config: MythosConfig, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Layer, nn.Module]:
    """The reference's MoEFFN without shared experts, its router replaced by the logits."""
    names = ("dim", "n_experts", "n_experts_per_tok", "expert_dim")
    ffn = open_mythos().MoEFFN(SimpleNamespace(n_shared_experts=0, **{name: getattr(config, name) for name in names}))
    for e, expert in enumerate(ffn.routed_experts):
        expert.load_state_dict({"gate.weight": gate[e], "up.weight": up[e], "down.weight": down[e]})

    def layer(x: Tensor, logits: Tensor) -> Tensor:
        ffn.router.forward = lambda _: logits
        return ffn(x.unsqueeze(0)).squeeze(0)

    return layer, ffn


def build_transformers(config: MythosConfig, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Layer, nn.Module]:
    """DeepseekV3MoE's `moe`, which takes weights and index."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    settings = theirs.DeepseekV3Config(
        hidden_size=config.dim,
        moe_intermediate_size=config.expert_dim,
        n_routed_experts=config.n_experts,
        num_experts_per_tok=config.n_experts_per_tok,
        n_shared_experts=1,
    )
    block = theirs.DeepseekV3MoE(settings)
    for e, expert in enumerate(block.experts):
        expert.load_state_dict({"gate_proj.weight": gate[e], "up_proj.weight": up[e], "down_proj.weight": down[e]})

    def layer(x: Tensor, logits: Tensor) -> Tensor:
        weights, index = choose(logits, config.n_experts_per_tok)
        return block.moe(x, index, weights)

    return layer, block.experts


def build_torchtitan(config: MythosConfig, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Layer, nn.Module]:
    """RoutedExperts, which takes weights, index and counts; we compute the counts, as torchtitan's router does."""
    theirs: Any = importlib.import_module("torchtitan.models.common.moe")
    dispatcher: Any = importlib.import_module("torchtitan.models.common.token_dispatcher").LocalTokenDispatcher
    E, k = config.n_experts, config.n_experts_per_tok
    experts = theirs.RoutedExperts.Config(
        inner_experts=theirs.GroupedExperts.Config(dim=config.dim, hidden_dim=config.expert_dim, num_experts=E),
        token_dispatcher=dispatcher.Config(num_experts=E, top_k=k),
    ).build()
    experts.inner_experts.load_state_dict({"w1_EFD": gate, "w3_EFD": up, "w2_EDF": down})

    def layer(x: Tensor, logits: Tensor) -> Tensor:
        weights, index = choose(logits, k)
        counts = index.flatten().bincount(minlength=E)
        return experts(x.unsqueeze(0), weights.unsqueeze(0), index.unsqueeze(0), counts).squeeze(0)

    if gate.dtype == torch.float32:  # its experts cast all inputs
        torch.Tensor.bfloat16 = lambda self: self  # type: ignore[method-assign]
    return layer, experts


SIDES: dict[str, Build] = {
    LOOP: build_open_mythos,
    "transformers": build_transformers,
    "torchtitan": build_torchtitan,
    "ours": build_ours,
}


def draw_logits(tokens: int, n_experts: int, k: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Normal logits, which spread tokens over all experts; the k-th largest differs from the next one, also in bf16, so
    that all sides choose the same experts."""
    logits = torch.randn(4 * tokens, n_experts, generator=torch.Generator().manual_seed(seed))
    logits = logits.to(torch.bfloat16)
    top = logits.topk(k + 1, dim=-1).values
    clear = logits[top[:, k - 1] > top[:, k]]
    assert len(clear) >= tokens
    return clear[:tokens].to(dtype).requires_grad_()


def worker(side: str, arguments: argparse.Namespace) -> None:
    """Write output and gradients to a file, send the memory of one pass, then the seconds of each round."""
    torch.set_num_threads(arguments.threads)
    sys.path.append(arguments.torchtitan)
    dtype, (E, k) = DTYPES[arguments.dtype], CASES[arguments.case]
    N, D, width = arguments.tokens, arguments.dim, arguments.width
    config = MythosConfig(dim=D, n_experts=E, n_experts_per_tok=k, expert_dim=width)
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (E, width, D), "up": (E, width, D), "down": (E, D, width)}
    weights = {name: (torch.randn(shape, generator=generator) * 0.02).to(dtype) for name, shape in shapes.items()}
    x, grad = (torch.randn(N, D, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    try:
        layer, module = SIDES[side](config, **weights)
    except ImportError as error:
        if side in (LOOP, "ours"):
            raise
        where = ", see --torchtitan" if side == "torchtitan" else ""
        serve({"problem": f"{side} skipped: it cannot be imported ({error}{where})"}, lambda _: {})
        return
    module.to(dtype)
    weights.clear()

    def run(seed: int) -> tuple[float, list[Tensor]]:
        logits = draw_logits(N, E, k, seed, dtype)
        x.grad = None
        module.zero_grad()
        begin = time.perf_counter()
        y = layer(x, logits)
        y.backward(grad)
        seconds = time.perf_counter() - begin
        assert x.grad is not None and logits.grad is not None
        return seconds, [y.detach(), x.grad, logits.grad]

    torch.save(run(0)[1], arguments.folder / f"{side}.pt")
    module.zero_grad()
    held = reset_peak()
    run(1)
    memory = resident("VmHWM") - held
    for seed in range(2, 2 + arguments.warm_up):
        run(seed)
    named = side if side == "ours" else f"{side} {version(side)}"
    serve({"named": named, "memory_bytes": memory}, lambda i: {"seconds": run(1000 + i)[0]})


def differences(folder: Path, dtype: str) -> dict[str, float]:
    """The largest relative difference of each side's output and gradients from the loop's; raises above TOLERANCE."""
    tensors = {side: torch.load(file) for side in SIDES if (file := folder / f"{side}.pt").exists()}
    errors = {}
    for side, mine in tensors.items():
        pairs = zip(mine, tensors[LOOP], strict=True)
        errors[side] = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
        if errors[side] > TOLERANCE[dtype]:
            raise RuntimeError(f"{side} differs from {LOOP} by {errors[side]:.1e}, more than {TOLERANCE[dtype]}")
    return errors


def compare(case: str, dtype: str, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All sides on one case: medians, ratios, differences; the problem of a side that cannot run."""
    a, b = (torch.randn(2048, 2048).to(DTYPES[dtype]) for _ in range(2))
    products, errors = [], {}

    def between() -> None:
        errors.update(errors or differences(Path(folder), dtype))
        torch.mm(a, b)
        begin = time.perf_counter()
        torch.mm(a, b)
        products.append(time.perf_counter() - begin)

    names = ("tokens", "dim", "width", "threads", "warm_up", "torchtitan")
    settings = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in names]
    command = [sys.executable, __file__, *settings, f"--case={case}", f"--dtype={dtype}"]
    with tempfile.TemporaryDirectory() as folder:
        commands = {side: [*command, f"--folder={folder}", f"--worker={side}"] for side in SIDES}
        messages = run_interleaved(commands, arguments.rounds, between)
    _, k = CASES[case]
    flops = 3 * 2 * 3 * arguments.tokens * k * arguments.dim * arguments.width  # forward, and twice that backward
    peak = 2 * 2048**3 / statistics.median(products)
    result: dict[str, dict[str, Any]] = {}
    for side, (first, *rounds) in messages.items():
        result[side] = first
        if "problem" not in first:
            seconds = statistics.median(one["seconds"] for one in rounds)
            first |= {"seconds": seconds, "matmul_share": flops / seconds / peak, "difference": errors[side]}
            first["x_loop"] = result[LOOP]["seconds"] / seconds
    return result


def report(case: str, dtype: str, result: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """A table, and the speedup of ours."""
    print(
        f"\n{case} {dtype}: {arguments.tokens} tokens, dim {arguments.dim}, experts of {arguments.width}, "
        f"{arguments.threads} threads, medians of {arguments.rounds} interleaved rounds"
    )
    print(f"{'':22}{'ms':>9}{'x the loop':>12}{'matmul peak':>13}{'memory':>11}{'difference':>12}")
    for r in result.values():
        if "problem" in r:
            print(r["problem"])
            continue
        print(
            f"{r['named']:22}{1000 * r['seconds']:9.1f}{r['x_loop']:12.2f}{r['matmul_share']:13.0%}"
            f"{r['memory_bytes'] / 1e6:8.0f} MB{r['difference']:12.1e}"
        )
    ours, others = result["ours"], [r["seconds"] for side, r in result.items() if side != "ours" and "seconds" in r]
    target = f" (target: {TARGET})" if case == "E64 k4" else ""
    print(f"ours: {ours['x_loop']:.2f} x the loop{target}, {min(others) / ours['seconds']:.2f} x the best other")


def main() -> None:
    """Compare and print tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="experts and experts per token; default: both")
    parser.add_argument("--dtype", choices=DTYPES, help="default: both")
    parser.add_argument("--tokens", type=int, default=2048, help="(%(default)s)")
    parser.add_argument("--dim", type=int, default=512, help="(%(default)s)")
    parser.add_argument("--width", type=int, default=512, help="hidden width of an expert (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--warm-up", type=int, default=3, help="passes of each side before the rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    folder = os.environ.get("TORCHTITAN", "")
    parser.add_argument("--torchtitan", default=folder, metavar="FOLDER", help="see above; default: $TORCHTITAN")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments)
        return
    torch.set_num_threads(arguments.threads)
    results = {}
    for case in [arguments.case] if arguments.case else CASES:
        for dtype in [arguments.dtype] if arguments.dtype else DTYPES:
            results[f"{case} {dtype}"] = result = compare(case, dtype, arguments)
            if not arguments.json:
                report(case, dtype, result, arguments)
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
