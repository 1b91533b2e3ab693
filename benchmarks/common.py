"""Shared by the benchmarks: shapes, a training step, peak memory, and interleaved measurements.

Each side of a comparison runs in its own process, and rounds are interleaved, so that a drift of the machine's speed
affects all sides.
"""

import argparse
import ctypes
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos_dist.model.mythos import Losses
from mythos_dist.model.recompute import Recompute

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
POLICIES = {
    "none": Recompute(),
    "every loop": Recompute("loop"),
    "every 2nd loop": Recompute("loop", 2),
    "every 4th loop": Recompute("loop", 4),
    "selective": Recompute("selective"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Trainer:
    """A model, its optimizer and one batch of random tokens."""

    def __init__(self, model: torch.nn.Module, vocab_size: int, tokens: tuple[int, int], dtype: torch.dtype):
        """tokens: (sequences, sequence length). In half precision the model is cast and the optimizer steps a copy."""
        self.model = model
        self.parameters = list(model.parameters())
        self.masters: list[Tensor] = list(self.parameters)
        if dtype != torch.float32:
            self.masters = [parameter.detach().clone() for parameter in self.parameters]
            model.to(dtype)
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(1)
        batch = torch.randint(0, vocab_size, (tokens[0], tokens[1] + 1), generator=generator)
        batch = batch.to(self.parameters[0].device)
        self.ids, self.labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        self.passed: dict[str, Any] = {}  # further arguments of the forward pass

    def losses(self, n_loops: int | None) -> Losses:
        """Forward."""
        return self.model(self.ids, n_loops, labels=self.labels, **self.passed)

    def step(self, n_loops: int | None = None) -> Losses:
        """Forward, backward, update."""
        losses = self.losses(n_loops)
        losses["objective"].backward()
        mixed = self.masters[0] is not self.parameters[0]
        if mixed:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None  # type: ignore[union-attr]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if mixed:
            torch._foreach_copy_([parameter.detach() for parameter in self.parameters], self.masters)
        return losses


class ReferenceTrainer(Trainer):
    """OpenMythos with the loss of its own training script; in bf16 under autocast, the only way it runs."""

    def __init__(self, settings: dict, tokens: tuple[int, int], bf16: bool, device: str | torch.device = "cpu"):
        """settings: of its config; tokens: (sequences, sequence length)."""
        super().__init__(build_reference(settings).to(device), settings["vocab_size"], tokens, torch.float32)
        self.bf16 = bf16

    def losses(self, n_loops: int | None) -> Losses:
        """Forward."""
        with torch.autocast(self.ids.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(self.ids, n_loops)
        loss = F.cross_entropy(logits.float().flatten(0, 1), self.labels.flatten())
        return cast(Losses, {"objective": loss})


def add_options(parser: argparse.ArgumentParser, loops: int, loops_help: str, rounds_help: str) -> None:
    """Options of benchmarks that train one of the shapes; loops: the default number."""
    parser.add_argument("--shape", choices=SHAPES, default="fine", help="(%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="(%(default)s)")
    parser.add_argument("--loops", type=int, default=loops, help=f"{loops_help} (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="sequences (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help=f"{rounds_help} (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    parser.add_argument("--json", action="store_true")


def resident(field: str) -> int:
    """Bytes of VmRSS (current memory of this process) or VmHWM (its peak since `reset_peak` or its start)."""
    # Not getrusage: its peak is inherited from the parent, through fork and exec.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def reset_peak() -> int:
    """Return freed memory to the system and reset VmHWM; returns the current memory in bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    return resident("VmRSS")


def serve(first: dict, measure: Callable[[int], dict]) -> None:
    """A process of `run_interleaved`: send `first` when ready, then measure once per input line, a round's number."""
    print(json.dumps(first), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(int(line))), flush=True)


def run_interleaved(
    commands: Mapping[str, list[str]], rounds: int, between: Callable[[], Any] = lambda: None
) -> dict[str, list[dict]]:
    """Start a process for each command, one after the other, then run rounds over all; `between` starts a round.

    Returns the messages of each: the first when it was ready, then one per round. A first message with a "problem"
    excludes the process from the rounds.
    """
    processes, messages = {}, {}

    def receive(name: str) -> None:
        line = processes[name].stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {name!r} ended; see its error above")
        messages[name].append(json.loads(line))

    try:
        for name, command in commands.items():
            pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
            processes[name], messages[name] = subprocess.Popen(command, **pipes), []
            receive(name)
        for i in range(rounds):
            between()
            for name in [name for name in commands if "problem" not in messages[name][0]]:
                processes[name].stdin.write(f"{i}\n")
                receive(name)
    finally:
        for process in processes.values():
            process.stdin.close()  # a worker exits at the end of its input
            process.wait()
    return messages


def open_mythos() -> Any:
    """The reference's module, which `make` installs in .venv/reference."""
    sys.path.insert(0, str(ROOT / ".venv" / "reference"))
    return importlib.import_module("open_mythos.main")


def build_reference(settings: dict) -> torch.nn.Module:
    """OpenMythos 0.5.0 with a halting bias so low that no token halts; settings: of its config."""
    reference = open_mythos()
    torch.manual_seed(0)
    model = reference.OpenMythos(reference.MythosConfig(**settings))
    torch.nn.init.constant_(model.recurrent.act.halt.bias, -3.0)  # in 8 loops the sum of p is 0.4; 0.99 halts
    return model


def matmul_peak(dtype: torch.dtype, seconds: float = 2.0) -> float:
    """Sustained FLOP/s of 2048^3 products on this machine."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    torch.mm(a, b)
    begin, products = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        torch.mm(a, b)
        products += 1
    return products * 2 * 2048**3 / (time.perf_counter() - begin)
