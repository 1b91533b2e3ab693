"""Programs of test_megablocks.py that need a new process: `python megablocks_worker.py PROGRAM < arguments.json`.

Triton decides at import whether to interpret kernels. Prints one line of JSON.
"""

import importlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import megablocks_cpu


@dataclass(frozen=True)
class Case:
    """A routing and a set of experts."""

    k: int = 2
    tokens: int = 10
    dim: int = 16
    experts: int = 5
    width: int = 24
    to: tuple[int, ...] = ()  # experts that tokens are routed to; empty: all
    empty: int = 0  # every N-th slot is empty, and `pairs` is passed; 0: none
    dtype: str = "float32"
    impl: str = "grouped"
    recompute: bool = False
    half_weights: bool = False  # router weights in the dtype of x, as received from another rank
    strided: bool = False  # x is not contiguous

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


STACKS = ("gate", "up", "down")


def stacks_of(case: Case) -> list[Tensor]:
    """gate, up, down (E, F, D), scaled to keep the variance."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.experts, case.width, case.dim)
    scales = (case.dim**-0.5, case.dim**-0.5, case.width**-0.5)
    return [(scale * torch.randn(shape, generator=generator)).to(case.torch_dtype) for scale in scales]


def inputs_of(case: Case, replica: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, D), router weights (N, k) in fp32, index (N, k), and the output's gradient (N, D)."""
    generator = torch.Generator().manual_seed(1000 * replica + case.k)
    N = case.tokens
    x, direction = (torch.randn(N, case.dim, generator=generator).to(case.torch_dtype) for _ in range(2))
    if case.strided:
        x = x.T.contiguous().T
    weights = torch.rand(N, case.k, generator=generator).to(case.torch_dtype if case.half_weights else torch.float32)
    to = torch.tensor(case.to or range(case.experts))
    chosen = [to[torch.randperm(len(to), generator=generator)[: case.k]] for _ in range(N)]
    index = torch.stack(chosen) if chosen else torch.empty(0, case.k, dtype=torch.int64)
    if case.empty:
        hole = torch.arange(index.numel()).view_as(index) % case.empty == 0
        index, weights = index.masked_fill(hole, case.experts), weights.masked_fill(hole, 0.0)
    return x, weights, index, direction


def exact(case: Case, replicas: range) -> dict[str, Any]:
    """In float64, token by token: outputs and input gradients per replica, and the sum of the stacks' gradients."""
    gate, up, down = stacks = [stack.double().requires_grad_() for stack in stacks_of(case)]
    results: dict[str, Any] = {}
    for replica in replicas:
        x, weights, index, direction = inputs_of(case, replica)
        x, weights = (leaf.double().requires_grad_() for leaf in (x, weights))
        y = 0.0 * x  # not zeros: it has a gradient even if no token has an expert
        for n in range(case.tokens):
            for j, e in enumerate(index[n].tolist()):
                if e < case.experts:
                    g = gate[e] @ x[n]
                    hidden = g / (1 + (-g).exp()) * (up[e] @ x[n])
                    y = y.index_add(0, torch.tensor([n]), (weights[n, j] * (hidden @ down[e])).unsqueeze(0))
        inputs = torch.autograd.grad(y, [x, weights, *stacks], direction.double(), materialize_grads=True)
        results[str(replica)] = {"y": y.detach(), "x": inputs[0], "weights": inputs[1]}
        for name, gradient in zip(STACKS, inputs[2:], strict=True):
            results[name] = results.get(name, 0) + gradient
    return results


def error(ours: Tensor, theirs: Tensor) -> float:
    """Error relative to the norm, or to 1 if that is larger."""
    return float((ours.double() - theirs).norm() / theirs.norm().clamp(min=1.0))


def one_process(cases: list[dict]) -> dict:
    """Each case through `megablocks`: errors of the output and all gradients, and other properties."""
    from megablocks.layers import moe  # pyright: ignore[reportMissingImports]

    from mythos_dist.model.megablocks import _layer

    results = [one_case(Case(**settings)) for settings in cases]
    shell = _layer(4, 12, 16, 2, torch.float32, "grouped")
    return {
        "cases": results,
        "launches": megablocks_cpu.LAUNCHES,
        "auxiliary_losses": len(moe.get_load_balancing_loss()),
        "shell_devices": sorted({parameter.device.type for parameter in shell.parameters()}),
    }


def one_case(case: Case) -> dict:
    from mythos_dist.model.megablocks import megablocks
    from mythos_dist.model.recompute import checkpoint_if

    x, weights, index, direction = inputs_of(case)
    leaves = [leaf.requires_grad_() for leaf in (x, weights, *stacks_of(case))]
    pairs = int((index < case.experts).sum()) if case.empty else None
    megablocks_cpu.STACKS_SEEN.clear()
    before = torch.get_rng_state()
    with megablocks_cpu.sparse_allowed():
        y = checkpoint_if(case.recompute, megablocks, x, weights, index, *leaves[2:], pairs, case.impl)
        y.backward(direction)
    expected = exact(case, range(1))
    expected |= expected["0"]
    errors = {"y": error(y.detach(), expected["y"])}
    missing, idle = [], True
    for name, leaf in zip(("x", "weights", *STACKS), leaves, strict=True):
        if leaf.grad is None:
            missing.append(name)
            continue
        errors[name] = error(leaf.grad, expected[name])
        if name in STACKS:
            unused = sorted(set(range(case.experts)) - set(index.flatten().tolist()))
            idle &= not bool(leaf.grad[unused].any())
    return {
        "errors": errors,
        "missing": missing,
        "idle_experts_get_zeros": idle,
        "same_dtype": y.dtype == x.dtype and all(leaf.grad is None or leaf.grad.dtype == leaf.dtype for leaf in leaves),
        "operands_are_parameters": {leaf.data_ptr() for leaf in leaves[2:]} == megablocks_cpu.STACKS_SEEN,
        "multiplied": bool(megablocks_cpu.STACKS_SEEN),
        "random_numbers_kept": bool(torch.equal(before, torch.get_rng_state())),
    }


def several_ranks(arguments: dict) -> list[dict]:
    """`each_rank` on all ranks, which are forked from this process: imports and the interpreter's first use of each
    kernel take it seconds."""
    import mythos_dist.model.experts
    import mythos_dist.parallel.mesh  # noqa: F401

    one_case(Case())
    torch.multiprocessing.start_processes(each_rank, (arguments,), nprocs=arguments["world"], start_method="fork")
    return [
        one for rank in range(arguments["world"]) for one in json.loads(Path(f"{arguments['file']}.{rank}").read_text())
    ]


def each_rank(rank: int, arguments: dict) -> None:
    """Every case at every layout through `Experts`, on this rank of a gloo group; the results go to a file."""
    from mythos_dist.config.schema import ParallelConfig
    from mythos_dist.parallel.mesh import build_mesh

    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{arguments['file']}", rank=rank, world_size=arguments["world"])
    results = []
    for layout in arguments["layouts"]:
        mesh = build_mesh(ParallelConfig(**layout))
        results += [
            {"layout": layout, "case": settings, "rank": rank, **on_this_rank(Case(**settings), mesh)}
            for settings in arguments["cases"]
        ]
    dist.destroy_process_group()
    Path(f"{arguments['file']}.{rank}").write_text(json.dumps(results))


def on_this_rank(case: Case, mesh: Any) -> dict:
    """One case: this rank's tokens through the experts of all ranks, against float64 on one process."""
    from mythos_dist.config.schema import MythosConfig
    from mythos_dist.model.experts import Experts
    from mythos_dist.parallel.collectives import enter_tensor_parallel, leave_tensor_parallel
    from mythos_dist.parallel.expert import combine
    from mythos_dist.parallel.tensor import shard_of

    config = MythosConfig(
        dim=case.dim, n_experts=case.experts, n_experts_per_tok=case.k, expert_dim=case.width, n_shared_experts=0
    )
    experts = Experts(config, "megablocks", mesh, case.recompute).to(case.torch_dtype)
    parameters = dict(zip(STACKS, (experts.w1, experts.w3, experts.w2), strict=True))
    parts = {}
    with torch.no_grad():
        for (name, parameter), full in zip(parameters.items(), stacks_of(case), strict=True):
            part = shard_of(parameter)
            parts[name] = tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))
            parameter.zero_()[tuple(slice(size) for size in part.shape)] = full[parts[name]]
    x, weights, index, direction = inputs_of(case, mesh.data.rank)
    megablocks_cpu.STACKS_SEEN.clear()
    x.requires_grad_()
    weights.requires_grad_()
    sums = experts(enter_tensor_parallel(x, mesh), enter_tensor_parallel(weights, mesh), index)
    y = leave_tensor_parallel(combine(*sums, mesh), mesh)
    y.backward(direction)

    first = mesh.data.rank // mesh.expert.size * mesh.expert.size  # replicas that share these experts
    expected = exact(case, range(first, first + mesh.expert.size))
    mine = expected[str(mesh.data.rank)]
    assert x.grad is not None
    assert weights.grad is not None
    errors = {
        "y": error(y.detach(), mine["y"]),
        "x": error(x.grad, mine["x"]),
        "weights": error(weights.grad, mine["weights"]),
    }
    for name, parameter in parameters.items():
        gradient = parameter.grad
        assert gradient is not None
        real = tuple(slice(size) for size in shard_of(parameter).shape)
        errors[name] = error(gradient[real], expected[name][parts[name]])
    return {
        "errors": errors,
        "multiplied": bool(megablocks_cpu.STACKS_SEEN),
        "operands_are_parameters": megablocks_cpu.STACKS_SEEN.issubset(p.data_ptr() for p in parameters.values()),
    }


def compile_ahead(launches: list[dict]) -> list[dict]:
    """Compile each launch for an H100 (sm_90), which needs no GPU; whether each cubin is an ELF file."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernels = []
    for launch in launches:
        module, name = launch["kernel"]
        kernel = getattr(importlib.import_module(module), name)
        kernel = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel  # without the autotuner
        constants = {
            key: getattr(tl, {"fp32": "float32"}[value]) if isinstance(value, str) else value
            for key, value in launch["constants"].items()
        }
        source = ASTSource(fn=kernel, signature=launch["signature"], constexprs=constants)
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=launch["options"])
        cubin = compiled.asm["cubin"]
        kernels.append({"kernel": name, "target": compiled.metadata.target.arch, "elf": cubin[:4] == b"\x7fELF"})
    return kernels


def check_gpu(packages: list[str]) -> dict[str, float]:
    """Relative errors of the checks of launch/check_gpu.py, on a CPU."""
    megablocks_cpu.launch_script("gpu_sources")
    checks = megablocks_cpu.launch_script("check_gpu").CHECKS
    return {package: checks[package]("cpu") for package in packages}


def main() -> None:
    """The first argument names the program, standard input holds its arguments."""
    torch.set_num_threads(1)
    programs = (one_process, several_ranks, compile_ahead, check_gpu)
    program = {program.__name__: program for program in programs}[sys.argv[1]]
    arguments = json.load(sys.stdin)
    sources = [Path(path) for path in os.environ["MEGABLOCKS_SOURCES"].split(os.pathsep)]
    megablocks_cpu.install(sources)
    if program is not compile_ahead:
        megablocks_cpu.interpret_kernels()
    print(json.dumps(program(arguments)))


if __name__ == "__main__":
    main()
