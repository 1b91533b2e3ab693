"""Time and memory of activation recomputation: a training step under each policy, against saving all activations.

A step is forward, loss, backward and AdamW; bf16 has fp32 master weights, as under DeepSpeed. Each policy runs in its
own process and rounds are interleaved, so that a drift of the machine's speed affects all; seconds are medians. Peak
memory is the operating system's: of the whole process, and above the model's state (the memory before a step, plus the
gradients). The table is Markdown.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from common import COMMON, DTYPES, POLICIES, SHAPES, Trainer, add_options, reset_peak, resident, run_interleaved, serve

from mythos_dist.config.schema import MythosConfig
from mythos_dist.model import Mythos


def worker(policy: str, arguments: argparse.Namespace) -> None:
    """Send for each round the seconds of a step and the peak memory of all steps so far."""
    torch.set_num_threads(arguments.threads)
    seq_len, shape = SHAPES[arguments.shape]
    config = MythosConfig(**(COMMON | shape | dict(max_loop_iters=arguments.loops)))
    model = Mythos(config, recompute=POLICIES[policy])
    trainer = Trainer(model, config.vocab_size, (arguments.batch, seq_len), DTYPES[arguments.dtype])
    trainer.step(1)  # allocates the optimizer's moments
    held = reset_peak() + sum(parameter.numel() * parameter.element_size() for parameter in trainer.parameters)
    for _ in range(2):  # in bf16 kernels are compiled for new shapes
        trainer.step()

    def measure(_: int) -> dict:
        begin = time.perf_counter()
        trainer.step()
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "process_bytes": resident("VmHWM"), "above_bytes": resident("VmHWM") - held}

    serve({}, measure)


def compare(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{policy: seconds of a step, bytes, and both relative to policy "none"}."""
    settings = f"--shape {arguments.shape} --dtype {arguments.dtype} --loops {arguments.loops}"
    settings += f" --batch {arguments.batch} --threads {arguments.threads}"
    command = [sys.executable, __file__, *settings.split(), "--worker"]
    messages = run_interleaved({policy: [*command, policy] for policy in POLICIES}, arguments.rounds)
    result = {}
    for policy, (_, *rounds) in messages.items():
        medians = {what: statistics.median(one[what] for one in rounds) for what in rounds[0]}
        medians |= {what: rounds[-1][what] for what in medians if what.endswith("bytes")}  # the peak of all rounds
        base = result["none"] if result else medians
        result[policy] = medians | {f"{what}_ratio": medians[what] / base[what] for what in list(medians)}
    return result


def main() -> None:
    """Print the Markdown table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, 8, "loops of the recurrent block", "steps of each policy")
    parser.add_argument("--worker", choices=POLICIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments)
        return
    result = compare(arguments)
    if arguments.json:
        print(json.dumps(result))
        return
    a, tokens = arguments, arguments.batch * SHAPES[arguments.shape][0]
    print(f"{a.shape} {a.dtype}: {a.loops} loops, {tokens} tokens, {a.threads} threads, medians of {a.rounds} rounds\n")
    print("| recompute | step, s | time | process, MB | ratio | above its state, MB | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for policy, r in result.items():
        print(
            f"| {policy} | {r['seconds']:.2f} | {r['seconds_ratio']:.2f} | {r['process_bytes'] / 1e6:.0f} | "
            f"{r['process_bytes_ratio']:.2f} | {r['above_bytes'] / 1e6:.0f} | {r['above_bytes_ratio']:.2f} |"
        )


if __name__ == "__main__":
    main()
