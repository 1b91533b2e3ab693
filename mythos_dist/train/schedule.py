"""What depends on the step alone, so that a resumed run needs no state for it: learning rate, loops, random numbers."""

import hashlib
import math
from typing import NamedTuple

import numpy as np

from mythos_dist.config.schema import Config, OptimConfig
from mythos_dist.parallel.mesh import Mesh


class Loops(NamedTuple):
    """Turns of the recurrent block in one step."""

    n_loops: int
    frozen: int  # how many of them, the first ones, get no gradient


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (1-based): a line up to lr, then a cosine down to lr * min_lr_ratio."""
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    progress = min(1.0, (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)


def loops_at(config: Config, step: int) -> Loops:
    """The loops of optimizer step `step`: the same on every rank, in every micro-batch and after a resume."""
    n_loops = mean = config.loops.mean_of(config.model)
    if config.loops.distribution == "poisson":
        maximum = config.loops.maximum or max(mean, config.model.max_loop_iters)
        drawn = np.random.default_rng(_seed(config.run.seed, "loops", step)).poisson(mean)
        n_loops = int(min(max(drawn, 1), maximum))
    return Loops(n_loops, max(0, n_loops - (config.loops.backprop or n_loops)))


def step_seed(seed: int, step: int, mesh: Mesh) -> int:
    """Seed of a rank's generator in a step (dropout): 63 bits.

    Ranks that hold the same tokens draw the same numbers; each stage draws its own.
    """
    return _seed(seed, step, mesh.data.rank, mesh.pipe.rank, mesh.tensor.rank if mesh.sequence else 0)


def _seed(*what: object) -> int:
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
