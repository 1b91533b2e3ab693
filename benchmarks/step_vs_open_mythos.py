"""A training step, ours against open-mythos 0.5.0: equal weights and batch, interleaved, on this machine.

A step is forward, loss, backward, AdamW. The reference runs as it ships in fp32; in bf16 it can only run under autocast
(its halting code refuses bf16 tensors), so it runs under autocast. Ours runs in bf16 with fp32 master weights, as under
DeepSpeed, and once more in fp32 with every loop recomputed. Halting is disabled by a low bias, so both run every loop.
Memory is the operating system's own peak of the process; the figures compared are medians of interleaved rounds.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from common import (
    COMMON,
    SHAPES,
    ReferenceTrainer,
    Trainer,
    build_reference,
    matmul_peak,
    reset_peak,
    resident,
    run_interleaved,
    serve,
)

from mythos_dist.config.schema import MythosConfig
from mythos_dist.model import Mythos
from mythos_dist.model.flops import train_flops_per_token
from mythos_dist.model.open_mythos import from_open_mythos
from mythos_dist.model.recompute import Recompute
from mythos_dist.parallel.process import keep_freed_memory

BATCH = 4  # sequences
PEERS = ("reference fp32", "reference bf16", "ours fp32", "ours bf16", "ours fp32 recompute")


def build(peer: str, seq_len: int, settings: dict) -> Trainer:
    """The model of a peer; all start from the reference's weights, which are equal for equal seeds."""
    name, dtype, *more = peer.split()
    bf16 = dtype == "bf16"
    tokens = (BATCH, seq_len)
    if name == "reference":
        return ReferenceTrainer(settings, tokens, bf16)
    keep_freed_memory()  # as our trainer does
    recompute = Recompute("loop") if more else None
    ours = Mythos(MythosConfig(**settings, mode="reference"), recompute=recompute)  # equal loss, equal work
    ours.load_state_dict(from_open_mythos(build_reference(settings).state_dict(), ours.config))
    return Trainer(ours, settings["vocab_size"], tokens, torch.bfloat16 if bf16 else torch.float32)


def worker(peer: str, shape: str) -> None:
    """Send for each round the seconds of a step and the peak memory so far; first the loss of equal weights."""
    seq_len, settings = SHAPES[shape]
    trainer = build(peer, seq_len, COMMON | settings)
    reset_peak()  # building ours needs both models
    loss = trainer.step()["objective"].item()
    for _ in range(2):  # in bf16 kernels are compiled for new shapes
        trainer.step()

    def measure(_: int) -> dict:
        begin = time.perf_counter()
        trainer.step()
        return {"seconds": time.perf_counter() - begin, "peak_gb": resident("VmHWM") / 2**30}

    serve({"loss": loss}, measure)


def compare(shape: str, rounds: int) -> dict:
    """Interleaved rounds of all peers on a shape: medians, ratios, shares of the peak."""
    seq_len, settings = SHAPES[shape]
    flops = train_flops_per_token(
        MythosConfig(**(COMMON | settings), mode="reference"), seq_len, COMMON["max_loop_iters"]
    )
    peaks = {"fp32": matmul_peak(torch.float32), "bf16": matmul_peak(torch.bfloat16)}
    command = [sys.executable, __file__, "--shape", shape, "--worker"]
    result = {}
    for peer, (first, *measured) in run_interleaved({peer: [*command, peer] for peer in PEERS}, rounds).items():
        rate = BATCH * seq_len / statistics.median(one["seconds"] for one in measured)
        share = rate * flops / peaks[peer.split()[1]]
        result[peer] = first | {
            "tokens_per_second": rate,
            "matmul_share": share,
            "peak_gb": measured[-1]["peak_gb"],
        }
    return result


def main() -> None:
    """Compare on both shapes and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="default: both")
    parser.add_argument("--rounds", type=int, default=5, help="steps per peer, interleaved (%(default)s)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.shape)
        return
    results = {}
    for shape in [arguments.shape] if arguments.shape else SHAPES:
        results[shape] = compare(shape, arguments.rounds)
        if arguments.json:
            continue
        base = results[shape]["reference fp32"]
        print(f"\n{shape}: {torch.get_num_threads()} threads, medians of {arguments.rounds} interleaved steps")
        print(f"{'':20}{'tokens/s':>9}{'x reference':>12}{'matmul peak':>12}{'memory':>9}{'x':>6}{'first loss':>12}")
        for peer, r in results[shape].items():
            print(
                f"{peer:20}{r['tokens_per_second']:9.0f}{r['tokens_per_second'] / base['tokens_per_second']:12.2f}"
                f"{r['matmul_share']:12.0%}{r['peak_gb']:6.2f} GB{r['peak_gb'] / base['peak_gb']:6.2f}{r['loss']:12.5f}"
            )
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
