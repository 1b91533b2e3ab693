"""A probe of the loops during training: what each of them does, and warnings about known failures.

The failures are those of Huginn's first runs (Geiping et al. 2025, section 4) and of OpenMythos as shipped: the states
of all tokens collapse into one; the state is ignored, so that more loops change nothing; the state grows with every
loop; experts receive no tokens.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mythos_dist.data.stream import MicroBatch
from mythos_dist.model.loop_recorder import LoopRecorder
from mythos_dist.parallel.process import device
from mythos_dist.units import count

if TYPE_CHECKING:
    from mythos_dist.train.engine import Engine

SAME_LOSS = 1e-3  # relative difference of the losses with one loop and with all, below which the state is ignored
SAME_TOKENS = 0.98  # mean cosine of the states of a sequence's tokens, above which they have collapsed
GROWTH = 1.1  # gain of the last loop's update, above which the state grows


class LoopProbe(NamedTuple):
    """What `probe_loops` measures on one micro-batch per replica."""

    n_loops: int
    loss: float  # with n_loops, nats
    loss_of_one: float  # with one loop, nats
    by_loop: dict[str, list[float]]  # LoopRecorder.COLUMNS, means over tokens
    gain: float  # of the last loop's update: by how much it amplifies a perturbation of the state
    rho: float  # the largest element of A


def probe_loops(engine: "Engine", batch: MicroBatch) -> LoopProbe:
    """Measure each loop of a forward pass over one micro-batch per replica, with the mean number of loops."""
    n_loops = engine.config.loops.mean_of(engine.config.model)
    recurrent = getattr(engine.model, "recurrent", None)  # None on a stage without loops
    micro_batches = [(batch, torch.ones(len(batch.labels), dtype=torch.bool))]
    with_one_loop = engine.evaluate(micro_batches, 1)
    recorder = LoopRecorder(engine.mesh)
    try:
        if recurrent is not None:
            recurrent.recorder = recorder
        with_all_loops = engine.evaluate(micro_batches, n_loops)
    finally:
        if recurrent is not None:
            recurrent.recorder = None
    rows = torch.zeros(n_loops + 1, len(LoopRecorder.COLUMNS), device=device())
    for t, row in recorder.rows.items():
        rows[t] = row
    # The last row: (ranks that measured, gain, rho), on the stage of the last loop. One tensor is one all-reduce.
    if n_loops - 1 in recorder.rows and recorder.rho is not None:
        rows[-1, :3] = torch.stack([torch.ones_like(recorder.rho), recorder.gains[-1], recorder.rho])
    engine.sum_over_ranks(rows)
    rows /= rows[:, :1].clone()  # the first column is the number of tokens
    means, (gain, rho) = rows[:-1].T.tolist(), rows[-1, 1:3].tolist()
    by_loop: dict[str, list[float]] = dict(zip(LoopRecorder.COLUMNS, means, strict=True))
    return LoopProbe(n_loops, with_all_loops.loss, with_one_loop.loss, by_loop, gain, rho)


def probe_entries(probe: LoopProbe, counts: Tensor) -> dict[str, Any]:
    """For metrics.jsonl: the probe, and each loop's largest expert load over the mean, from a step's token counts
    (n_loops, loop_layers * E). All layers have the same number of tokens."""
    load = counts.double()
    busiest = load.amax(1) / load.mean(1).clamp(min=1e-9)
    return {
        "n_loops": probe.n_loops,
        "loss": probe.loss,
        "loss_of_one": probe.loss_of_one,
        **{name: values for name, values in probe.by_loop.items() if name != "tokens"},
        "expected_loops": sum((t + 1) * mass for t, mass in enumerate(probe.by_loop["act_mass"])),
        "gain": probe.gain,
        "rho_A": probe.rho,
        "expert_load_max": busiest.tolist(),
    }


def find_failures(probe: LoopProbe, counts: Tensor) -> dict[str, str]:
    """Known failures that a probe and a step's token counts (n_loops, loop_layers * E) show: name -> message."""
    failures = {}
    if probe.n_loops > 1 and abs(probe.loss - probe.loss_of_one) < SAME_LOSS * probe.loss:
        failures["state ignored"] = (
            f"the loss is the same with 1 loop ({probe.loss_of_one:.4f}) and with {probe.n_loops} ({probe.loss:.4f}): "
            "the model does not use its loops yet; try act.mode=off, loops.curriculum=linear, "
            "loops.distribution=poisson"
        )
    correlation = probe.by_loop["token_correlation"][-1]
    if correlation > SAME_TOKENS:
        failures["collapse"] = (
            f"the states of a sequence's tokens have collapsed (mean cosine {correlation:.3f} after the last loop); "
            "try a lower optim.lr, model.injection=parcae, model.init=depth_scaled"
        )
    if not math.isnan(probe.gain) and probe.gain > GROWTH:
        failures["growth"] = (
            f"a loop amplifies a perturbation of the state by {probe.gain:.2f} (A alone by {probe.rho:.2f}): more "
            "loops than in training will not be stable; try model.qk_norm=true, model.init=depth_scaled"
        )
    idle = int((counts.sum(0) == 0).sum())
    if idle:
        failures["dead experts"] = (
            f"{idle} of {count(counts.shape[1], 'expert')} received no token in this step; try a larger "
            "experts.bias_update_rate, or experts.sequence_balance_loss=1e-4"
        )
    return failures
