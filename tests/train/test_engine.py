"""Half precision, evaluation and dropout under DeepSpeed; fp32 at every layout is in parallel/test_parity_grid.py."""

import itertools
import shutil

import pytest
import torch
from helpers.launch import run_ranks
from helpers.parity import batches, change, train_reference, train_under_deepspeed

from mythos_dist.config.schema import Config

pytestmark = pytest.mark.launch


def test_bf16_and_fp16_follow_fp32(config):
    """Half precision under every ZeRO stage: losses are close to fp32's, and the router's bias is not rounded."""
    base = change(config, train={"global_batch": 8, "micro_batch": 2}, experts={"bias_update_rate": 0.001})
    expected = train_reference(base)
    cases = [(dtype, {"zero": zero}) for dtype in ("bf16", "fp16") for zero in (1, 2, 3)]
    cases += [("fp16", {"pipe": 2}), ("fp16", {"tensor": 2}), ("fp16", {"expert": 2})]
    work = [(change(base, train={"dtype": dtype}, parallel=parallel), None) for dtype, parallel in cases]
    for case, got in zip(cases, run_ranks(2, train_under_deepspeed, work)[0], strict=True):
        assert got["loss"][0] == pytest.approx(expected["loss"][0], rel=3e-3), case
        assert got["loss"] == pytest.approx(expected["loss"], rel=2e-2), case
        steps = got["bias"] / base.experts.bias_update_rate
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)  # integer multiples of the update rate
        assert steps.abs().max() > 0


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.long  # the compiler takes a minute, and a run compiles only with train.compile
@pytest.mark.parametrize(("recompute", "parallel"), [("none", {"tensor": 2}), ("loop", {"pipe": 2})])
def test_compiled_blocks_give_the_same_losses(config, recompute, parallel):
    """With tensor parallelism, and in a pipeline that recomputes its loops: the losses of one process without
    torch.compile, to 1e-5."""
    base = change(config, train={"global_batch": 4, "micro_batch": 2})
    compiled = change(base, train={"compile": True, "recompute": recompute}, parallel=parallel)
    (got,) = run_ranks(2, train_under_deepspeed, [(compiled, None)], seconds=1120)[0]
    assert got["loss"] == pytest.approx(train_reference(base)["loss"], rel=1e-5)


def evaluate(configs: list[Config]) -> list[tuple[list[float], list[float]]]:
    """Each config's held-out loss and accuracy before and after a step, and the values of the loop probe.

    Of two passes, the second selects samples on replica 0 only.
    """
    from mythos_dist.parallel.mesh import build_mesh
    from mythos_dist.train.engine import Engine
    from mythos_dist.train.loop_probe import probe_loops

    results = []
    for config in configs:
        mesh = build_mesh(config.parallel)
        engine = Engine(config, mesh)
        steps = batches(config, mesh.data.rank, mesh.data.size)
        first = next(steps)
        all_samples = torch.ones(config.train.micro_batch, dtype=torch.bool)
        passes = [(first[0], all_samples), (first[1], all_samples if mesh.data.rank == 0 else ~all_samples)]
        before = engine.evaluate(iter(passes))
        engine.train_step(next(steps), 1)
        after = engine.evaluate(iter(passes))
        probe = probe_loops(engine, first[0])
        probed = [probe.loss, probe.loss_of_one, probe.rho, *itertools.chain(*probe.by_loop.values()), probe.gain]
        results.append(([*before, *after], probed))
        engine.close()
    return results


def test_the_held_out_loss_is_the_same_at_every_layout(config):
    """Layouts of one replica against one rank, layouts of two against data parallelism alone. Only the last stage
    computes the loss, and a stage may run no loops in a step, but every rank must return all results."""
    base = change(config, train={"global_batch": 4, "micro_batch": 1}, loops={"backprop": 1})
    one_replica = {2: [{"tensor": 2, "sequence": True}, {"pipe": 2}], 4: [{"pipe": 2, "tensor": 2}, {"pipe": 4}]}
    two_replicas = {2: [{}], 4: [{"tensor": 2}, {"pipe": 2}, {"tensor": 2, "expert": 2}]}
    by_replicas: dict[int, list[tuple[list[float], list[float]]]] = {1: run_ranks(1, evaluate, [base])[0], 2: []}
    for ranks in (2, 4):
        layouts = one_replica[ranks] + two_replicas[ranks]
        results = run_ranks(ranks, evaluate, [change(base, parallel=layout) for layout in layouts])
        assert all(each == results[0] for each in results), "ranks disagree"
        by_replicas[1] += results[0][: len(one_replica[ranks])]
        by_replicas[2] += results[0][len(one_replica[ranks]) :]
    for same in by_replicas.values():
        for held_out, probed in same:
            assert held_out == pytest.approx(same[0][0], rel=1e-5)
            assert probed[:-1] == pytest.approx(same[0][1][:-1], rel=1e-4)
            assert probed[-1] == pytest.approx(same[0][1][-1], rel=1e-3)  # a power iteration from another vector
        assert same[0][0][0] != same[0][0][2]


def test_dropout_trains_at_every_layout(config):
    """Losses differ by layout, as ranks draw different masks, but are close to those without dropout."""
    base = change(config, train={"global_batch": 8, "micro_batch": 2})
    plain = train_reference(base)["loss"]
    layouts = [{}, {"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipe": 2}]
    work = [(change(base, model={"dropout": 0.1}, parallel=layout), None) for layout in layouts]
    for layout, got in zip(layouts, run_ranks(2, train_under_deepspeed, work)[0], strict=True):
        assert got["loss"] == pytest.approx(plain, rel=0.1), layout
        assert got["loss"] != plain
