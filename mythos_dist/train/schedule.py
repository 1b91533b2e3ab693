"""What depends on the step alone, so that a resumed run needs no state for it: learning rate, loops, random numbers."""

import hashlib
import math

from mythos_dist.config.schema import Config, OptimConfig


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (1-based): a line up to lr, then a cosine down to lr * min_lr_ratio."""
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    progress = min(1.0, (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)


def loops_at(config: Config, step: int) -> int:
    """Turns of the recurrent block in optimizer step `step`: the same number on every rank and after a resume."""
    del step  # one number for all steps
    return config.loops.mean or config.model.max_loop_iters


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a rank's generator in a step (dropout): 63 bits."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
