"""A training step of a full variant on one GPU in bf16, by backend, attention and recomputation; against open-mythos.

A step is forward, loss, backward and fused AdamW on fp32 master weights. `mfu` counts the FLOPs of all loops
(`mythos_dist.model.flops`, nothing for recomputation) against the data sheet's peak; `matmul` against products of
8192^3 measured here. By default one choice at a time is changed from `grouped, sdpa, every loop`. Each case is a
process of its own, one after the other; its row says if it does not fit in memory or a package is missing.
open-mythos runs under autocast, the only way in which its halting code runs in bf16, and never halts; if it does not
fit, its sequences are halved, and ours is measured with these too.

`--device cpu --tiny` tests the same code on a small model; its figures are meaningless.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
import traceback
from typing import Any, cast

import torch
from common import POLICIES, ReferenceTrainer, Trainer, resident, run_interleaved, serve
from tqdm import tqdm

from mythos_dist.config.schema import BY_MODE, Config, ExpertsConfig, MythosConfig, TrainConfig
from mythos_dist.config.variants import VARIANTS
from mythos_dist.errors import UserError, exit_with
from mythos_dist.gpu_packages import DISTRIBUTIONS, unavailable
from mythos_dist.model import Mythos
from mythos_dist.model.flops import train_flops_per_token
from mythos_dist.train.metrics import peak_flops

TINY = dict(
    vocab_size=512, dim=64, n_heads=4, max_loop_iters=3, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=16, v_head_dim=16, n_experts=8, expert_dim=32, max_seq_len=64,
)  # fmt: skip
CHOICES = {
    "backend": ("grouped", "megablocks"),
    "attention": ("sdpa", "flash_attn"),
    "recompute": ("every loop", "none", "selective"),
    "compile": ("", "compiled"),  # each block by torch.compile
}
REFERENCE, MATMUL = "open-mythos", "matmul"


def cases(every: bool) -> list[str]:
    """Names of cases: the base, then cases that change one choice; or, with `every`, all combinations."""
    if every:
        return [join(choices) for choices in itertools.product(*CHOICES.values())]
    base = [values[0] for values in CHOICES.values()]
    changed = [(i, value) for i, values in enumerate(CHOICES.values()) for value in values[1:]]
    return [join(base), *(join([*base[:i], value, *base[i + 1 :]]) for i, value in changed)]


def join(choices: Any) -> str:
    """The name of a case."""
    return ", ".join(filter(None, choices))


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of the model's config."""
    return VARIANTS[arguments.variant] | (TINY if arguments.tiny else {})


def build_ours(case: str, settings: dict[str, Any], device: torch.device, tokens: tuple[int, int]) -> Trainer:
    """Our model with the choices of a case. Raises UserError if a package is missing."""
    backend, attention, recompute, *compiled = case.split(", ")
    for package in {backend, attention} & set(DISTRIBUTIONS):
        if problem := unavailable(package):
            raise UserError(problem)
    model = Mythos(
        MythosConfig(**settings, **BY_MODE["reference"]),  # the same loops as OpenMythos, and the same work
        experts=ExpertsConfig(backend=cast(Any, backend)),
        recompute=POLICIES[recompute],
        attention=cast(Any, attention),
    ).to(device)
    if compiled:
        model.compile_blocks()
    return Trainer(model, settings["vocab_size"], tokens, torch.bfloat16)


def clock(device: torch.device) -> float:
    """Seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_steps(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Median seconds of a step, the first loss, peak memory."""
    device = trainer.ids.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # includes longer sequences that did not fit
    loss = trainer.step()["objective"].item()
    trainer.step()
    seconds = []
    for _ in range(steps):
        begin = clock(device)
        trainer.step()
        seconds.append(clock(device) - begin)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")
    return {"seconds": statistics.median(seconds), "loss": loss, "bytes": peak, "tokens": list(trainer.ids.shape)}


def time_shorter(trainer: Trainer, steps: int) -> dict[str, Any]:
    """`time_steps`; sequences are halved until the step fits in memory."""
    while True:
        try:
            return time_steps(trainer, steps)
        except torch.OutOfMemoryError:
            if trainer.ids.shape[1] <= 256:
                raise
        trainer.optimizer.zero_grad()
        torch.cuda.empty_cache()
        half = trainer.ids.shape[1] // 2
        trainer.ids, trainer.labels = trainer.ids[:, :half].contiguous(), trainer.labels[:, :half].contiguous()


def time_matmul(device: torch.device) -> dict[str, Any]:
    """Median FLOP/s of a bf16 product, the name of the device and its peak."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(30):
        begin = clock(device)
        torch.mm(a, b)
        seconds.append(clock(device) - begin)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak = peak_flops(Config(train=TrainConfig(dtype="bf16")))
    return {"device": name, "matmul": 2 * size**3 / statistics.median(seconds), "peak": peak}


def worker(case: str, arguments: argparse.Namespace) -> None:
    """Measure a case and send the result, or why it cannot run."""
    device, settings, tokens = torch.device(arguments.device), settings_of(arguments), tokens_of(arguments)
    try:
        if case == MATMUL:
            result = time_matmul(device)
        elif case == REFERENCE:
            result = time_shorter(ReferenceTrainer(settings, tokens, True, device), arguments.steps)
        else:
            result = time_steps(build_ours(case, settings, device, tokens), arguments.steps)
    except torch.OutOfMemoryError:
        result = {"problem": "does not fit in memory"}
    except UserError as error:
        result = {"problem": str(error)}
    except Exception as error:  # a failing compiler or kernel is reported in its row, and the others still run
        traceback.print_exc()
        result = {"problem": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
    serve(result, lambda _: {})


def tokens_of(arguments: argparse.Namespace) -> tuple[int, int]:
    """Sequences and their length."""
    return arguments.batch, min(arguments.seq_len, int(settings_of(arguments)["max_seq_len"]))


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All cases, each in its own process."""
    names = ("variant", "batch", "steps", "device")
    settings = [f"--{name}={getattr(arguments, name)}" for name in names]
    if arguments.tiny:
        settings.append("--tiny")

    def run(case: str, seq_len: int) -> dict[str, Any]:
        command = [sys.executable, __file__, *settings, f"--seq-len={seq_len}", f"--worker={case}"]
        try:
            return run_interleaved({case: command}, 0)[case][0]
        except RuntimeError as error:  # the process died
            return {"problem": str(error)}

    seq_len = tokens_of(arguments)[1]
    selected = [case for case in cases(arguments.all) if arguments.compile or not case.endswith("compiled")]
    results = {case: run(case, seq_len) for case in tqdm((MATMUL, REFERENCE, *selected), unit="case", disable=None)}
    if "problem" in results[MATMUL]:
        raise UserError(f"no matrix product runs on {arguments.device}: {results[MATMUL]['problem']}")
    shorter = results[REFERENCE].get("tokens", [0, seq_len])[1]
    if shorter < seq_len:
        results[f"{selected[0]}, {shorter} tokens"] = run(selected[0], shorter)
    config = MythosConfig(**settings_of(arguments), **BY_MODE["reference"])
    for case in (case for case in results.values() if "seconds" in case):
        sequences, length = case["tokens"]
        case["tokens_per_second"] = sequences * length / case["seconds"]
        flops = case["tokens_per_second"] * train_flops_per_token(config, length, config.max_loop_iters)
        case["mfu"], case["matmul_share"] = (flops / results[MATMUL][of] for of in ("peak", "matmul"))
    return results


def report(results: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """The table."""
    matmul = results.pop(MATMUL)
    print(f"{matmul['device']}: {matmul['matmul'] / 1e12:.1f} TFLOP/s in bf16 products, ", end="")
    print(f"{matmul['peak'] / 1e12:.1f} on the data sheet" if arguments.device == "cuda" else "not a GPU")
    sequences, length = tokens_of(arguments)
    name = f"{arguments.variant}{', tiny' * arguments.tiny}"
    print(f"{name}: {sequences} x {length} tokens, medians of {arguments.steps} steps\n")
    print(f"{'':40}{'tokens/s':>10}{'x':>7}{'mfu':>8}{'matmul':>8}{'memory':>10}{'loss':>9}")
    base = results[REFERENCE].get("tokens_per_second")
    for case, r in results.items():
        if "problem" in r:
            print(f"{case:40}  {r['problem']}")
            continue
        ratio = f"{r['tokens_per_second'] / base:.2f}" if base else ""
        shorter = f"  {r['tokens'][1]} tokens" if r["tokens"][1] < length else ""
        print(
            f"{case:40}{r['tokens_per_second']:10.0f}{ratio:>7}{r['mfu']:8.1%}{r['matmul_share']:8.1%}"
            f"{r['bytes'] / 1e9:7.1f} GB{r['loss']:9.4f}{shorter}"
        )


def main() -> None:
    """Measure and print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, default="1b", help="(%(default)s)")
    parser.add_argument("--seq-len", type=int, default=4096, help="tokens (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed, after two (%(default)s)")
    parser.add_argument("--all", action="store_true", help="all combinations of the choices")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="include the torch.compile cases"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, to test this script")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise UserError("no CUDA GPU found; run this on a machine with one, or test it with --device cpu --tiny")
        if arguments.worker:
            worker(arguments.worker, arguments)
            return
        results = measure(arguments)
    except UserError as error:
        exit_with(error)
    print(json.dumps(results)) if arguments.json else report(results, arguments)


if __name__ == "__main__":
    main()
