"""One training step, ours against open-mythos 0.5.0: equal weights, equal batch, interleaved, on this machine.

A step is forward, loss, backward, AdamW. The reference runs as it ships in fp32; in bf16 it can only run under autocast
(its halting code refuses bf16 tensors), so that is what it gets. Ours runs in bf16 with fp32 master weights, as under
DeepSpeed. Halting is set never to happen, so both run every loop. Each measurement is its own process, for the
operating system's own peak of resident memory; the figures compared are medians of interleaved rounds.
"""

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mythos_dist.config.schema import MythosConfig
from mythos_dist.model import Mythos
from mythos_dist.model.open_mythos import from_open_mythos
from mythos_dist.plan.cost import train_flops_per_token

ROOT = Path(__file__).parents[1]
COMMON: dict[str, Any] = dict(
    vocab_size=8192, n_kv_heads=4, max_seq_len=512, max_loop_iters=8, prelude_layers=1, coda_layers=1, attn_type="mla",
    n_shared_experts=1, lora_rank=8,
)  # fmt: skip
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "coarse": (512, dict(dim=512, n_heads=8, kv_lora_rank=128, q_lora_rank=256, qk_rope_head_dim=32,
                         qk_nope_head_dim=64, v_head_dim=64, n_experts=32, n_experts_per_tok=4, expert_dim=512)),
    "fine": (256, dict(dim=256, n_heads=4, kv_lora_rank=64, q_lora_rank=128, qk_rope_head_dim=32,
                       qk_nope_head_dim=32, v_head_dim=32, n_experts=128, n_experts_per_tok=8, expert_dim=128)),
}  # fmt: skip
BATCH = 4  # sequences
PEERS = ("reference fp32", "reference bf16", "ours fp32", "ours bf16")


def build_reference(settings: dict) -> torch.nn.Module:
    """OpenMythos with a halting bias that no token overcomes."""
    sys.path.insert(0, str(ROOT / ".venv" / "reference"))
    reference = importlib.import_module("open_mythos.main")
    torch.manual_seed(0)
    model = reference.OpenMythos(reference.MythosConfig(**settings))
    torch.nn.init.constant_(model.recurrent.act.halt.bias, -3.0)  # 8 loops add up to 0.4 of 0.99
    return model


class Stepper:
    """A model, its optimizer, and one training step."""

    def __init__(self, peer: str, settings: dict):
        """The peer is one of PEERS; all start from the reference's weights."""
        self.name, dtype = peer.split()
        self.bf16 = dtype == "bf16"
        model = build_reference(settings)
        if self.name == "ours":
            ours = Mythos(MythosConfig(**settings, mode="reference"))  # equal loss, equal work
            ours.load_state_dict(from_open_mythos(model.state_dict(), ours.config))
            model = ours  # the reference is freed
        self.model = model
        self.masters: list[torch.Tensor] = list(model.parameters())
        self.mixed = self.bf16 and self.name == "ours"
        if self.mixed:
            self.masters = [p.detach().clone() for p in model.parameters()]
            model.to(torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=True)

    def step(self, ids: torch.Tensor, labels: torch.Tensor) -> float:
        """Forward, backward, update; returns the loss."""
        if self.name == "ours":
            loss = self.model(ids, labels=labels)["objective"]
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                logits = self.model(ids)
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        parameters = list(self.model.parameters())
        if self.mixed:
            for master, parameter in zip(self.masters, parameters, strict=True):
                master.grad = parameter.grad.float() if parameter.grad is not None else None
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.mixed:
            torch._foreach_copy_([p.detach() for p in parameters], self.masters)
            self.model.zero_grad()
        return loss.item()


def worker(peer: str, shape: str) -> None:
    """Answer each line on standard input with the seconds of one step; the last answer holds loss and memory."""
    seq_len, settings = SHAPES[shape]
    stepper = Stepper(peer, COMMON | settings)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, COMMON["vocab_size"], (BATCH, seq_len + 1), generator=generator)
    ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    loss = stepper.step(ids, labels)  # warm-up; the loss at equal weights
    for _ in sys.stdin:
        begin = time.perf_counter()
        stepper.step(ids, labels)
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GB
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_gb": peak}), flush=True)


def matmul_peak(dtype: torch.dtype, seconds: float = 2.0) -> float:
    """FLOP/s of 2048^3 products on this machine, sustained."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    torch.mm(a, b)
    begin, products = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        torch.mm(a, b)
        products += 1
    return products * 2 * 2048**3 / (time.perf_counter() - begin)


def compare(shape: str, rounds: int) -> dict:
    """Interleaved rounds of all peers on a shape: medians, ratios, shares of the peak."""
    seq_len, settings = SHAPES[shape]
    flops = train_flops_per_token(MythosConfig(**(COMMON | settings)), seq_len, COMMON["max_loop_iters"])
    peaks = {"fp32": matmul_peak(torch.float32), "bf16": matmul_peak(torch.bfloat16)}
    command = [sys.executable, __file__, "--shape", shape, "--worker"]
    workers = {
        peer: subprocess.Popen([*command, peer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        for peer in PEERS
    }
    answers: dict[str, list[dict]] = {peer: [] for peer in PEERS}
    for _ in range(rounds):
        for peer, process in workers.items():
            assert process.stdin and process.stdout
            process.stdin.write("step\n")
            answers[peer].append(json.loads(process.stdout.readline()))
    for process in workers.values():
        process.communicate()
    result = {}
    for peer, found in answers.items():
        rate = BATCH * seq_len / statistics.median(a["seconds"] for a in found)
        share = rate * flops / peaks[peer.split()[1]]
        result[peer] = {
            "tokens_per_second": rate,
            "matmul_share": share,
            "peak_gb": found[-1]["peak_gb"],
            "loss": found[0]["loss"],
        }
    return result


def main() -> None:
    """Compare on both shapes and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="default: both")
    parser.add_argument("--rounds", type=int, default=3, help="steps per peer, interleaved (%(default)s)")
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
        base = results[shape]["reference fp32"]["tokens_per_second"]
        print(f"\n{shape}: {torch.get_num_threads()} threads, medians of {arguments.rounds} interleaved steps")
        print(f"{'':16}{'tokens/s':>10}{'x reference fp32':>18}{'matmul peak':>13}{'memory':>9}{'first loss':>12}")
        for peer, r in results[shape].items():
            print(
                f"{peer:16}{r['tokens_per_second']:10.0f}{r['tokens_per_second'] / base:18.2f}"
                f"{r['matmul_share']:13.0%}{r['peak_gb']:6.1f} GB{r['loss']:12.5f}"
            )
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
