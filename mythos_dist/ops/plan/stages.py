"""The pipeline stages of a layout, and which loops of a step each of them runs."""

import functools

from mythos_dist.config.schema import Config, MythosConfig
from mythos_dist.model.flops import stage_costs
from mythos_dist.parallel.pipeline import LayerCosts, StageSpec, plan_loops, plan_stages


def stage_specs(config: Config) -> tuple[StageSpec, ...]:
    """The layers of each stage, balanced for the mean number of loops."""
    n_loops = config.loops.mean_of(config.model)
    return _cached_stages(config.model, n_loops, config.parallel.pipe, stage_costs(config))


@functools.lru_cache(maxsize=1024)
def _cached_stages(model: MythosConfig, n_loops: int, stages: int, costs: LayerCosts) -> tuple[StageSpec, ...]:
    # Cached: for 1t in many stages `plan_stages` takes tens of milliseconds.
    return tuple(plan_stages(model, n_loops, stages, costs))


def loop_ranges(config: Config, n_loops: int, no_grad: int) -> list[range]:
    """The loops that each stage runs in a step of `n_loops` loops, the first `no_grad` of them without gradient."""
    return plan_loops(stage_specs(config), n_loops, no_grad, stage_costs(config))
