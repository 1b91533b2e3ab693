"""The model's parameters, its pipeline stages, and the bytes that a rank sends in a step."""

import functools

from mythos_dist.config.schema import Config, MythosConfig
from mythos_dist.model.flops import stage_costs
from mythos_dist.ops.plan.communication import Rows, stage_communication
from mythos_dist.ops.plan.parameters import total_parameters
from mythos_dist.parallel.mesh import mesh_coordinates
from mythos_dist.parallel.pipeline import LayerCosts, StageSpec, plan_loops, plan_stages

BYTES_PER_PARAMETER = 12  # of a checkpoint: fp32 weights and both of Adam's moments


def count_parameters(model: MythosConfig) -> int:
    """Of the whole model."""
    return total_parameters(model)


@functools.lru_cache(maxsize=1024)
def parts_of(model: MythosConfig, n_loops: int, stages: int, costs: LayerCosts) -> tuple[StageSpec, ...]:
    """`plan_stages`, kept: for 1t in many stages it takes tens of milliseconds."""
    return tuple(plan_stages(model, n_loops, stages, costs))


def communication(
    config: Config,
    world_size: int,
    rank: int,
    n_loops: int,
    frozen: int,
    rows: Rows | None = None,
    first_send: bool = False,
    micro_batches: int | None = None,
) -> dict[str, dict[str, int]]:
    """{axis: {kind: bytes}} of what `rank` sends in a step of `n_loops` loops, the first `frozen` without gradient.

    rows: with parallel.expert > 1, [micro-batch][loop] -> (rows sent, rows received), own ones included; or one such
    pair that holds for all.
    first_send: whether the pipeline's stages have sent each other nothing yet; they begin with shapes.
    micro_batches: how many each replica runs; None: as many as train.global_batch makes.
    Sizes are those of `parallel.traffic`. Holds for a step that is not skipped (fp16).
    """
    mesh = mesh_coordinates(config.parallel, world_size, rank)
    if micro_batches is None:
        micro_batches = config.train.global_batch // (config.train.micro_batch * mesh.data.size)
    costs = stage_costs(config)
    parts = parts_of(config.model, config.loops.mean_of(config.model), mesh.pipe.size, costs)
    turns = plan_loops(parts, n_loops, frozen, costs)[mesh.pipe.rank]
    return stage_communication(config, mesh, parts, turns, n_loops, frozen, rows, first_send, micro_batches)
