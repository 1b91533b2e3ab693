"""What Muon needs in a step: FLOPs, bytes and memory of a rank, from the rounds that the trainer computes.

The trap: a rank owns some matrices of its group, and others own more or fewer. Sizes are those of the rank that is
asked for; by default plans are for the first replica's.
"""

import functools
from dataclasses import replace

from mythos_dist.config.schema import Config, MythosConfig
from mythos_dist.model.parameter_groups import rank_groups
from mythos_dist.ops.plan.activations import ITEM_BYTES
from mythos_dist.ops.plan.layer_communication import Messages, message
from mythos_dist.parallel.mesh import Axis, Mesh
from mythos_dist.parallel.pipeline import StageSpec
from mythos_dist.train.matrix_exchange import GroupLayout, Round, axis_name

_STATE_MATRICES = 3  # full matrices at once: the momentum, its normalized copy or the last iterate, the next iterate
_GRAM_MATRICES = 2  # of the shorter side


@functools.lru_cache(maxsize=4096)
def _rounds(model: MythosConfig, mesh: Mesh, stage: StageSpec) -> list[tuple[Axis, list[Round]]]:
    """The rounds of each group with matrices, and the axis of its messages."""
    exchanges = []
    for group in rank_groups(model, mesh, stage):
        if group.decays:
            layout = GroupLayout(group, model, mesh)
            axis = Axis(axis_name(mesh, layout.axis), layout.axis.size * mesh.tensor.size)
            exchanges.append((axis, layout.rounds()))
    return exchanges


def _same_rounds(mesh: Mesh) -> Mesh:
    """The mesh without what rounds do not depend on, besides the stage."""
    return replace(mesh, sequence=False, pipe=replace(mesh.pipe, rank=0))


def muon_messages(config: Config, mesh: Mesh, stage: StageSpec) -> Messages:
    """What `train/matrix_exchange.py` sends: elements to the owners of their matrices, and the results back."""
    total: Messages = Messages()
    if config.optim.name != "muon":
        return total
    for axis, rounds in _rounds(config.model, _same_rounds(mesh), stage):
        elements = 0
        for one in rounds:
            if one.exchanges:
                elements += sum(share.numel for share in one.held if share.sends)
                elements += sum(share.numel for share in one.parts)
        total += message(axis, "all_to_all", elements * ITEM_BYTES[config.train.dtype])
    return total


def muon_flops(config: Config, mesh: Mesh, stage: StageSpec) -> float:
    """Newton-Schulz of the matrices that a rank owns: three products per iteration."""
    if config.optim.name != "muon":
        return 0.0
    total = 0
    for short, long in _owned(config, mesh, stage):
        total += 2 * (2 * short * short * long + short**3)
    return float(config.optim.muon_ns_steps * total)


def muon_workspace(config: Config, mesh: Mesh, stage: StageSpec) -> float:
    """Bytes of the matrices that exist at once while a rank's largest one is iterated on."""
    if config.optim.name != "muon":
        return 0.0
    sizes = (
        _STATE_MATRICES * short * long + _GRAM_MATRICES * short * short for short, long in _owned(config, mesh, stage)
    )
    return float(ITEM_BYTES[config.train.dtype] * max(sizes, default=0))


def _owned(config: Config, mesh: Mesh, stage: StageSpec) -> list[tuple[int, int]]:
    """Shorter and longer side of each matrix that the rank owns."""
    matrices = [
        one.matrix for _, rounds in _rounds(config.model, _same_rounds(mesh), stage) for one in rounds if one.matrix
    ]
    return [(min(one.rows, one.columns), max(one.rows, one.columns)) for one in matrices]
