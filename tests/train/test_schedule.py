"""Learning rates of all schedules, as functions of the step."""

import dataclasses
import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from mythos_dist.config.rules import problems
from mythos_dist.config.schema import (
    Config,
    DataConfig,
    LoopsConfig,
    MythosConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from mythos_dist.parallel.mesh import mesh_coordinates
from mythos_dist.train.schedule import learning_rate, loops_at, phase_at, state_seed, step_seed

LR, STEPS, WARMUP = 3e-3, 60, 7


def torch_rates(build: Any, steps: int = STEPS) -> list[float]:
    """The rates of steps 1 to `steps` from a scheduler of torch: `build(optimizer)`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=LR)
    scheduler: LRScheduler = build(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def rates(steps: int = STEPS, **settings: Any) -> list[float]:
    optim = OptimConfig(lr=LR, **{"warmup_steps": WARMUP, **settings})
    return [learning_rate(optim, step, steps) for step in range(1, steps + 1)]


def warmup(optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Step s of the warm-up has lr * s / WARMUP; LinearLR counts from 0."""
    return LinearLR(optimizer, 1 / WARMUP, 1.0, WARMUP - 1)


def test_cosine_is_torchs():
    """CosineAnnealingLR reaches its minimum `T_max` steps after its start, which is the last step of the warm-up."""

    def build(optimizer):
        cosine = CosineAnnealingLR(optimizer, STEPS - WARMUP, eta_min=0.1 * LR)
        return SequentialLR(optimizer, [warmup(optimizer), cosine], [WARMUP - 1])

    assert rates() == pytest.approx(torch_rates(build), rel=1e-9)


def test_cosine_is_the_earlier_formula_bit_for_bit():
    """The expression of versions that had only this schedule: runs that resume keep their bits."""
    for ratio in (0.0, 0.1, 0.37):
        for warm in (0, 1, WARMUP, STEPS, STEPS + 5):
            for step, rate in enumerate(rates(warmup_steps=warm, min_lr_ratio=ratio), 1):
                progress = min(1.0, (step - warm) / max(1, STEPS - warm))
                cosine = LR * (ratio + (1 - ratio) * (0.5 * (1 + math.cos(math.pi * progress))))
                assert rate == (LR * step / warm if step <= warm else cosine)


@pytest.mark.parametrize("decay_steps", [None, 20])
def test_linear_is_torchs(decay_steps):
    """After `decay_steps` the rate stays at its minimum."""
    length = decay_steps or STEPS - WARMUP

    def build(optimizer):
        return SequentialLR(optimizer, [warmup(optimizer), LinearLR(optimizer, 1.0, 0.25, length)], [WARMUP - 1])

    computed = rates(schedule="linear", min_lr_ratio=0.25, decay_steps=decay_steps)
    assert computed == pytest.approx(torch_rates(build), rel=1e-9)


def test_constant_is_torchs():
    def build(optimizer):
        return SequentialLR(optimizer, [warmup(optimizer), ConstantLR(optimizer, 1.0, 1)], [WARMUP])

    assert rates(schedule="constant") == pytest.approx(torch_rates(build), rel=1e-9)


@pytest.mark.parametrize(("decay", "shape"), [("linear", lambda x: 1 - x), ("1-sqrt", lambda x: 1 - math.sqrt(x))])
def test_wsd_is_warmup_stable_and_a_decay_over_the_last_steps(decay, shape):
    """LambdaLR with the formula of Haegele et al. 2024, section 3; the last step has the lowest rate."""

    def build(optimizer):
        def factor(index: int) -> float:
            step = index + 1
            x = max(0, step - (STEPS - 12)) / 12
            return min(1, step / WARMUP) * (0.05 + 0.95 * shape(x))

        return LambdaLR(optimizer, factor)

    computed = rates(schedule="wsd", decay=decay, decay_steps=12, min_lr_ratio=0.05)
    assert computed == pytest.approx(torch_rates(build), rel=1e-9)
    assert computed[-1] == pytest.approx(0.05 * LR)


def test_inverse_sqrt_is_the_formula_of_the_transformer():
    """Vaswani et al. 2017, equation 3, scaled so that its peak is lr; `min_lr_ratio` bounds it below."""
    for step, rate in enumerate(rates(schedule="inverse_sqrt", min_lr_ratio=0.4), 1):
        formula = LR * math.sqrt(WARMUP) * min(step**-0.5, step * WARMUP**-1.5)
        assert rate == pytest.approx(max(0.4 * LR, formula) if step > WARMUP else formula)
    without_warmup = rates(schedule="inverse_sqrt", warmup_steps=0, min_lr_ratio=0.0)
    assert without_warmup == pytest.approx([LR / math.sqrt(step) for step in range(1, STEPS + 1)])


def test_the_stable_phase_of_wsd_does_not_depend_on_the_length():
    """So a run can be made longer, or branch, before its decay: bit for bit the same rates, which are lr."""
    short, long, endless = rates(schedule="wsd"), rates(1000, schedule="wsd"), rates(1000, schedule="constant")
    assert short[: STEPS - 6] == long[: STEPS - 6] == endless[: STEPS - 6]  # by default a tenth decays
    assert set(short[WARMUP : STEPS - 6]) == {LR} and short[STEPS - 6] < LR
    assert rates(5, schedule="wsd") == endless[:5]  # shorter than its warm-up


@pytest.mark.parametrize(
    ("settings", "phases"),
    [
        ({}, "w" * 7 + "d" * 53),
        ({"decay_steps": 10}, "w" * 7 + "d" * 10 + "s" * 43),
        ({"schedule": "linear", "decay_steps": 53}, "w" * 7 + "d" * 53),
        ({"schedule": "wsd", "decay_steps": 12}, "w" * 7 + "s" * 41 + "d" * 12),
        ({"schedule": "wsd", "warmup_steps": 0}, "s" * 54 + "d" * 6),
        ({"schedule": "constant"}, "w" * 7 + "s" * 53),
        ({"schedule": "inverse_sqrt"}, "w" * 7 + "d" * 53),
    ],
)
def test_the_phase_is_how_the_rate_changes(settings, phases):
    """From the names, and from the rates themselves."""
    optim = OptimConfig(lr=LR, **{"warmup_steps": WARMUP, "min_lr_ratio": 0.0, **settings})
    computed = [phase_at(optim, step, STEPS) for step in range(1, STEPS + 1)]
    assert "".join(phase[0] for phase in computed) == phases
    every = [0.0 if optim.warmup_steps else LR, *(learning_rate(optim, step, STEPS) for step in range(1, STEPS + 1))]
    for phase, before, rate in zip(computed, every[:-1], every[1:], strict=True):
        assert {"warmup": rate > before, "stable": rate == before, "decay": rate < before}[phase], (phase, before, rate)


def said_of(train: dict[str, Any] | None = None, **optim: Any) -> list[str]:
    config = Config(data=DataConfig(path="shards"), train=TrainConfig(**(train or {})), optim=OptimConfig(**optim))
    return problems(config)


@pytest.mark.parametrize(
    ("train", "optim", "named"),
    [
        (
            {"steps": 1000},
            {"schedule": "wsd", "decay_steps": 901},
            ["optim.decay_steps=901", "optim.warmup_steps=100", "train.steps=1000", "at most 900"],
        ),
        ({"steps": 50}, {"decay_steps": 1}, ["train.steps=50", "lower optim.warmup_steps"]),
        (
            {},
            {"schedule": "constant", "decay_steps": 5},
            ["optim.decay_steps=5", "optim.schedule=constant", "leave it"],
        ),
        ({}, {"schedule": "inverse_sqrt", "decay_steps": 5}, ["optim.schedule=inverse_sqrt"]),
        ({}, {"schedule": "linear", "decay": "1-sqrt"}, ["optim.decay=1-sqrt", "optim.schedule=wsd"]),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(train, optim, named):
    (problem,) = said_of(train, **optim)
    assert all(part in problem for part in named), problem


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_decay_may_take_all_steps_after_the_warmup(schedule):
    assert said_of({"steps": 1000}, schedule=schedule, decay_steps=900) == []
    assert said_of({"steps": 3}, schedule=schedule) == []  # a trial shorter than the warm-up


def test_a_checkpoint_of_an_earlier_version_has_a_cosine(config):
    """Its settings have no schedule: the config that they stand for is today's default."""
    from mythos_dist.config.load import config_from

    saved = dataclasses.asdict(config)
    for key in ("schedule", "decay", "decay_steps"):
        del saved["optim"][key]
    assert config_from(saved) == config and config.optim.schedule == "cosine"


# ---- Random draws


def hashed(text: str) -> int:
    """63 bits of a SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") // 2


def test_seeds_are_hashes_of_what_they_depend_on():
    """A run that resumes after an update draws what it would have drawn: dropout, initial states."""
    assert state_seed(5, 7, 3) == hashed("5/state/7/3")
    for sequence in (False, True):
        parallel = ParallelConfig(tensor=3, pipe=2, sequence=sequence)
        seeds = [step_seed(5, 7, mesh_coordinates(parallel, 12, rank)) for rank in range(12)]
        places = [(d, p, t if sequence else 0) for d in range(2) for p in range(2) for t in range(3)]
        assert seeds == [hashed(f"5/7/{d}/{p}/{t}") for d, p, t in places]


@pytest.mark.parametrize("per", ["step", "sequence"])
def test_loops_are_drawn_by_numpys_generator_of_seed_and_step(per):
    """Against NumPy, with the mean, the maximum of 4 times the largest mean, and the set that the step has."""
    runs = {
        "fixed": LoopsConfig(mean=5, per=per),
        "poisson": LoopsConfig(distribution="poisson", mean=5, per=per),
        "lognormal": LoopsConfig(distribution="lognormal_poisson", mean=5, sigma=0.9, per=per),
        "set": LoopsConfig(
            distribution="uniform_set", set=(2, 3, 9), per=per, curriculum="linear", curriculum_steps=40
        ),
    }
    size = 6 if per == "sequence" else 1
    for name, loops in runs.items():
        config = Config(
            model=MythosConfig(max_loop_iters=3),
            train=TrainConfig(global_batch=6),
            loops=loops,
            run=RunConfig(seed=11),
        )
        for step in range(1, 61):
            random = np.random.default_rng(hashed(f"11/loops/{step}"))
            if name == "fixed":
                expected = [5] * size
            elif name == "poisson":
                expected = random.poisson(5, size).clip(1, 20).tolist()
            elif name == "lognormal":
                rates = random.lognormal(math.log(4) - 0.9**2 / 2, 0.9, size)
                expected = (1 + random.poisson(rates)).clip(1, 20).tolist()
            else:
                # The largest grows from 1 to 9: 3 is in the set from step 11 on, 9 after step 40.
                of_step = [2] if step <= 10 else [2, 3] if step <= 40 else [2, 3, 9]
                expected = random.choice(of_step, size).tolist()
            drawn = loops_at(config, step)
            assert drawn.n_loops == max(expected) and drawn.no_grad_loops == 0, (name, step)
            assert drawn.depths == (expected if per == "sequence" else None), (name, step)
