"""A small Qwen3 of transformers, pretrained on stories of experiments.story_task by a plain PyTorch loop.

    python -m experiments.pretrain OUT --seed 0

First it learns to find a person in short stories, in questions of one hop, then questions of `PRETRAINED_HOPS` hops in
longer ones. OUT gets config.json and the weights, as save_pretrained writes them.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.depth_task import EOS
from experiments.story_task import WORDS, build_stories

LAYERS, PRETRAINED_HOPS = 4, 2


class Phase(NamedTuple):
    """Steps on stories of one shape."""

    steps: int
    batch: int
    people: int
    questions: int
    hops: int


PHASES = (Phase(600, 64, 4, 4, 1), Phase(1600, 32, 10, 6, PRETRAINED_HOPS))
RATE, WARMUP, DECAY = 2e-3, 50, 200  # steps


def build_model(seed: int) -> Any:
    """A Qwen3 for causal language modeling with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=128,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        initializer_range=0.1,
        use_cache=False,
    )
    return Qwen3ForCausalLM(Qwen3Config(**settings))


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (B, S) and targets (B, S) of every step; -100: none."""
    random = np.random.default_rng([seed, 17])
    for phase in PHASES:
        for _ in range(phase.steps):
            stories = build_stories(random, phase.batch, phase.people, phase.questions, phase.hops)
            yield (
                torch.from_numpy(stories.tokens),
                torch.from_numpy(np.where(stories.answers == EOS, -100, stories.answers)),
            )


def pretrain(seed: int) -> Any:
    """A trained model; prints its loss every hundred steps."""
    model = build_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    steps = sum(phase.steps for phase in PHASES)
    for step, (tokens, targets) in enumerate(batches(seed)):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / WARMUP, (steps - step) / DECAY)
        logits = model(input_ids=tokens).logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  loss {loss.item():.3f}", flush=True)
    return model


def main() -> None:
    """Pretrain and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pretrain(arguments.seed).save_pretrained(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
