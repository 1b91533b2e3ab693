"""Bytes that one rank passes to collectives in one optimizer step, by formula, per axis and kind.

Sizes follow the convention of `parallel.traffic`, which measures the same bytes. Each term names the code that it is
read from: ours, or DeepSpeed 0.19.8's (deepspeed_communication.py). The trap: how many rows go to which rank's experts
depends on data, so the caller passes the number of rows.
"""

# B batch, S sequence (S' of it on this rank: S / tensor with sequence parallelism, else S), D model, k experts per
# token, n ranks of an axis, N = B * S tokens.

from collections import Counter
from collections.abc import Sequence

from mythos_dist.config.schema import Config
from mythos_dist.model.flops import loops_computing_kv, stage_loops, stage_specs
from mythos_dist.model.parameter_table import local_parameters
from mythos_dist.ops.plan.deepspeed_communication import pipeline_messages, tied_gradients, zero_messages
from mythos_dist.ops.plan.layer_communication import LayerMessages, Messages, Pass, scaled
from mythos_dist.ops.plan.muon import muon_messages
from mythos_dist.parallel.mesh import Mesh, mesh_coordinates
from mythos_dist.parallel.pipeline import StageSpec, loops_with_grad

RowPair = tuple[int, int]  # rows sent and received over the expert axis
# [micro-batch][t * loop_layers + i], of layer i in loop t; or one pair, the same for every layer and loop
Rows = Sequence[Sequence[RowPair]] | RowPair


def communication(
    config: Config,
    world_size: int,
    rank: int,
    n_loops: int,
    no_grad: int,
    rows: Rows | None = None,
    first_send: bool = False,
    micro_batches: int | None = None,
) -> dict[str, dict[str, int]]:
    """{axis: {kind: bytes}} that `rank` sends in a step of `n_loops` loops, the first `no_grad` without gradient.

    rows: with parallel.expert > 1, [micro-batch][layer of loop] -> (rows sent, rows received), own ones included; or
    one such pair for all.
    first_send: whether this is the first step, in which pipeline stages send each other shapes.
    micro_batches: per replica; None: as train.global_batch gives.
    Sizes are those of `parallel.traffic`. Holds for a step that is not skipped (fp16).
    """
    mesh = mesh_coordinates(config.parallel, world_size, rank)
    if micro_batches is None:
        micro_batches = config.train.global_batch // (config.train.micro_batch * mesh.data.size)
    loops = stage_loops(config, n_loops, no_grad)[mesh.pipe.rank]
    return stage_communication(config, mesh, loops, n_loops, no_grad, rows, first_send, micro_batches)


def stage_communication(
    config: Config,
    mesh: Mesh,
    loops: range,
    n_loops: int,
    no_grad: int,
    rows: Rows | None,
    first_send: bool,
    micro_batches: int,
) -> dict[str, dict[str, int]]:
    """`communication` of a rank with coordinates `mesh` whose stage runs the loops `loops` of `n_loops`."""
    stages = stage_specs(config)
    stage = stages[mesh.pipe.rank]
    parameters = local_parameters(config.model, mesh.tensor.size, mesh.expert.size, stage)
    layers = LayerMessages(config, mesh, config.loops.readouts(n_loops, no_grad))

    per_micro_batch: Messages = Counter()
    for layer in _non_looped_layers(layers, stage):
        per_micro_batch += layer.forward + layer.backward
    per_micro_batch += layers.replicated_gradients(parameters)
    per_micro_batch += layers.stage_activations(stages, loops, no_grad)

    total = scaled(per_micro_batch, micro_batches)
    trained = loops_with_grad(loops, no_grad)
    with_grad, all_loops = (
        layers.loops(
            micro_batches * len(some),
            micro_batches * len(loops_computing_kv(config, some)),
            *_sum_rows(rows, micro_batches, some, config.model.loop_layers),
        )
        for some in (trained, loops)
    )
    total += all_loops.forward
    total += with_grad.backward
    if config.train.recompute == "loop":  # model/recompute.py; selective recomputation repeats no collective
        total += with_grad.forward
    total += tied_gradients(parameters, stages, layers)
    if mesh.pipe.size > 1:
        total += pipeline_messages(mesh, shape_messages=micro_batches if layers.per_loop else int(first_send))
    total += zero_messages(parameters, layers, micro_batches)
    total += muon_messages(config, mesh, stage)

    by_axis: dict[str, dict[str, int]] = {}
    for (axis, kind), size in total.items():
        by_axis.setdefault(axis, {})[kind] = size
    return by_axis


def _non_looped_layers(layers: LayerMessages, stage: StageSpec) -> list[Pass]:
    """What a stage runs once per micro-batch; the coda runs on all readouts."""
    blocks = len(stage.prelude) + len(stage.coda) * layers.readouts
    passes = [layers.dense_block() for _ in range(blocks)]
    if stage.has_loops:
        passes.append(layers.injection())
    if stage.is_first:
        passes.append(layers.leave(layers.x))  # the input embedding
    if stage.is_last:
        passes.append(layers.head())
    return passes


def _sum_rows(rows: Rows | None, micro_batches: int, loops: range, layers: int) -> RowPair:
    """Rows sent and received in these loops of all micro-batches; every size is proportional to them. layers: of a
    loop."""
    match rows:
        case None:
            return 0, 0
        case (int(sent), int(received)):
            times = micro_batches * len(loops) * layers
            return sent * times, received * times
    calls = range(loops.start * layers, loops.stop * layers)
    pairs = [rows[micro_batch][call] for micro_batch in range(micro_batches) for call in calls]
    return sum(sent for sent, _ in pairs), sum(received for _, received in pairs)
