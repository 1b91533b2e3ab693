"""What is a function of config and step, so that a resumed run needs no state: learning rate, loops, random seeds.

The batch size is another one: `config/schema.py: TrainConfig`. Decisions: CHECKPOINT-6, LOOPS-6.
"""

import hashlib
import math
from typing import Literal, NamedTuple

import numpy as np

from mythos_dist.config.schema import Config, OptimConfig
from mythos_dist.parallel.mesh import Mesh

_ENDLESS = 1 << 62  # beyond every step


class StepLoops(NamedTuple):
    """The loops of one step."""

    n_loops: int
    no_grad_loops: int  # the first N loops run without gradient
    depths: list[int] | None = None  # loops of each sequence of the global batch, at most n_loops; None: n_loops


Phase = Literal["warmup", "stable", "decay"]


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (1-based): linear warm-up to lr, then `optim.schedule`.

    With x growing from 0 to 1 over the steps of the decay, the rate falls from lr to lr * min_lr_ratio as
    (1 + cos(pi x)) / 2 (cosine), 1 - x (linear, wsd) or 1 - sqrt(x) (wsd; Haegele et al. 2024).
    inverse_sqrt: lr * sqrt(warmup_steps / step) (Vaswani et al. 2017), but at least lr * min_lr_ratio.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "inverse_sqrt":
        return optim.lr * max(optim.min_lr_ratio, math.sqrt(max(1, optim.warmup_steps) / step))
    decay = decay_range(optim, total_steps)
    if step < decay.start:
        return optim.lr
    x = min(1.0, (step - decay.start + 1) / len(decay))
    if optim.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * x))
    else:
        left = 1 - (math.sqrt(x) if optim.decay == "1-sqrt" else x)
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * left)


def phase_at(optim: OptimConfig, step: int, total_steps: int) -> Phase:
    """The phase of the learning rate in step `step` (1-based); after its decay, a rate is stable again."""
    if step <= optim.warmup_steps:
        return "warmup"
    return "decay" if step in decay_range(optim, total_steps) else "stable"


def decay_range(optim: OptimConfig, total_steps: int) -> range:
    """The steps (1-based) in which the rate falls, after the warm-up; constant: none, from an endless step on."""
    after_warmup = max(1, total_steps - optim.warmup_steps)
    if optim.schedule == "constant":
        return range(_ENDLESS, _ENDLESS)
    if optim.schedule == "inverse_sqrt":
        return range(optim.warmup_steps + 1, _ENDLESS)
    if optim.schedule == "wsd":
        steps = min(after_warmup, optim.decay_steps or math.ceil(total_steps / 10))
        return range(total_steps - steps + 1, total_steps + 1)
    return range(optim.warmup_steps + 1, optim.warmup_steps + 1 + (optim.decay_steps or after_warmup))


def loops_at(config: Config, step: int) -> StepLoops:
    """The loops of optimizer step `step` (1-based): the same on every rank, in every micro-batch, after a resume."""
    loops, size = config.loops, config.train.batch_size_at(step) if config.loops.per == "sequence" else 1
    mean = mean_at(config, step)
    random = np.random.default_rng(_seed(config.run.seed, "loops", step))
    if loops.distribution == "fixed":
        drawn = np.full(size, round(mean))
    elif loops.distribution == "poisson":
        drawn = random.poisson(mean, size)
    elif loops.distribution == "lognormal_poisson":
        rate = random.lognormal(math.log(max(mean - 1, 1e-9)) - loops.sigma**2 / 2, loops.sigma, size)
        drawn = 1 + random.poisson(rate)
    else:
        largest = _at_curriculum(config, step, max(loops.set))
        drawn = random.choice([n for n in loops.set if n <= largest] or [min(loops.set)], size)
    depths = np.clip(drawn, 1, loops.most_of(config.model)).tolist()
    n_loops = max(depths)
    no_grad_loops = max(0, n_loops - (loops.backprop or n_loops))
    return StepLoops(n_loops, no_grad_loops, depths if loops.per == "sequence" else None)


def mean_at(config: Config, step: int) -> float:
    """The mean number of loops in step `step`, unless they are drawn from a set."""
    return _at_curriculum(config, step, config.loops.mean_of(config.model))


def _at_curriculum(config: Config, step: int, full: int) -> float:
    """From 1 in the first step up to `full` at the end of the curriculum."""
    loops = config.loops
    if loops.curriculum == "none" or step > loops.curriculum_steps:
        return full
    progress = (step - 1) / loops.curriculum_steps
    return 1 + (full - 1) * (progress if loops.curriculum == "linear" else 1 - math.sqrt(1 - progress))


def state_seed(seed: int, step: int, position: int) -> int:
    """Seed of a sequence's random initial state, by its position in a step's global batch; step 0: held-out samples."""
    return _seed(seed, "state", step, position)


def step_seed(seed: int, step: int, mesh: Mesh) -> int:
    """Seed of a rank's generator in a step (dropout): 63 bits.

    Ranks that hold the same tokens draw the same values; each stage draws its own.
    """
    return _seed(seed, step, mesh.data.rank, mesh.pipe.rank, mesh.tensor.rank if mesh.sequence else 0)


def _seed(*what: object) -> int:
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
