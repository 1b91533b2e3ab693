"""The number of loops of a step, warnings about loops, plots over loops, and the depth task."""

import itertools
import json
import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.depth_task import EOS, FIRST, group_table, make_depth_task, products
from mythos_dist.config.rules import problems
from mythos_dist.config.schema import Config, LoopsConfig, MythosConfig
from mythos_dist.data.stream import ReplicaStream
from mythos_dist.prepare.verify import verify
from mythos_dist.train.evaluation import HeldOut, draw_curves, overthinks_from
from mythos_dist.train.loop_probe import LoopProbe, find_failures
from mythos_dist.train.plots import save_plot
from mythos_dist.train.schedule import loops_at, mean_at


def config(batch: int = 8, **loops) -> Config:
    base = Config()
    train = replace(base.train, global_batch=batch)
    return replace(base, model=MythosConfig(max_loop_iters=8), train=train, loops=LoopsConfig(**loops))


@pytest.mark.parametrize(
    "settings",
    [
        dict(distribution="poisson", mean=8),
        dict(distribution="lognormal_poisson", mean=8),
        dict(distribution="uniform_set", set=(2, 4, 8, 16)),
    ],
)
def test_numbers_of_loops_have_the_configured_mean(settings):
    """Over 4000 steps, and over sequences; repeatable for a step, and different for another seed."""
    run = config(**settings)
    drawn = [loops_at(run, step).n_loops for step in range(1, 4001)]
    mean = sum(settings.get("set", ())) / 4 or settings["mean"]
    assert np.mean(drawn) == pytest.approx(mean, rel=0.04)
    assert min(drawn) >= 1 and max(drawn) <= 4 * max(mean, 16)
    assert drawn[:50] == [loops_at(run, step).n_loops for step in range(1, 51)]
    other = replace(run, run=replace(run.run, seed=1))
    assert drawn[:50] != [loops_at(other, step).n_loops for step in range(1, 51)]
    each = replace(run, loops=replace(run.loops, per="sequence"))
    steps = [loops_at(each, step) for step in range(1, 501)]
    depths = [step.depths or [] for step in steps]
    assert np.mean(depths) == pytest.approx(mean, rel=0.04)
    assert all(len(each) == 8 and step.n_loops == max(each) for step, each in zip(steps, depths, strict=True))


def test_a_log_normal_rate_has_a_heavier_tail_than_poisson():
    """Huginn's variance: that of Poisson plus that of the rate, (mean - 1)^2 * (exp(sigma^2) - 1)."""
    deviation = {}
    for name in ("poisson", "lognormal_poisson"):
        run = config(distribution=name, mean=32, maximum=10_000)
        deviation[name] = np.std([loops_at(run, step).n_loops for step in range(1, 6001)])
    assert deviation["poisson"] == pytest.approx(math.sqrt(32), rel=0.05)
    assert deviation["lognormal_poisson"] == pytest.approx(math.sqrt(31 + 31**2 * (math.exp(0.25) - 1)), rel=0.1)


def test_the_maximum_and_the_loops_without_gradient():
    run = config(distribution="poisson", mean=8, maximum=9, backprop=3)
    steps = [loops_at(run, step) for step in range(1, 200)]
    assert max(step.n_loops for step in steps) == 9
    assert all(step.no_grad_loops == max(0, step.n_loops - 3) for step in steps)


@pytest.mark.parametrize("curve, middle", [("linear", 1 + 31 * 0.5), ("1-sqrt", 1 + 31 * (1 - math.sqrt(0.5)))])
def test_a_curriculum_begins_with_one_loop_and_ends_with_the_mean(curve, middle):
    run = config(mean=32, curriculum=curve, curriculum_steps=100)
    assert [mean_at(run, step) for step in (1, 51, 101, 500)] == pytest.approx([1, middle, 32, 32])
    assert [loops_at(run, step).n_loops for step in (1, 51, 101)] == [1, round(middle), 32]


def test_a_curriculum_over_a_set_begins_with_its_smallest_number_and_ends_with_all():
    run = config(distribution="uniform_set", set=(2, 4, 8), curriculum="linear", curriculum_steps=700)
    largest = [max(loops_at(run, step).n_loops for step in range(first, first + 100)) for first in (1, 301, 601, 701)]
    assert largest == [2, 4, 4, 8]
    assert {loops_at(run, step).n_loops for step in range(701, 801)} == {2, 4, 8}


def test_all_contradictions_between_loop_settings_are_reported():
    bad = config(distribution="uniform_set", mean=4, curriculum="linear", per="sequence", sweep=(4,), teacher=0.5)
    bad = replace(bad, act=replace(bad.act, mode="ponder"), model=replace(bad.model, lora="per_loop"))
    messages = "\n".join(problems(bad))
    for part in (
        "needs loops.set",
        "loops.mean=4",
        "loops.curriculum_steps",
        "set loops.objective=per_loop, or act.mode",
        "set loops.objective=per_loop, or loops.teacher=0",
        "set loops.per=step",
    ):
        assert part in messages, part
    not_open_mythos = MythosConfig.from_checked_values(mode="reference", qk_norm=True, lora="none")
    messages = "\n".join(problems(replace(bad, model=not_open_mythos)))
    for part in ("model.qk_norm=True is not OpenMythos'", "model.lora=none", "act.mode=ponder does not work with"):
        assert part in messages, part


def probe(**changes) -> LoopProbe:
    by_loop = {"token_correlation": [0.2, 0.3], "state_norm": [1.0, 1.0], "act_mass": [0.5, 0.5]}
    by_loop |= {"residual_ratio": [1.0, 0.5], "tokens": [8.0, 8.0]}
    return LoopProbe(2, 2.0, 2.5, by_loop, 0.9, 0.4)._replace(**changes)


def test_known_failures_are_detected():
    even = torch.full((2, 4), 5)
    assert not find_failures(probe(), even)
    assert set(find_failures(probe(loss_of_one=2.001), even)) == {"state ignored"}
    assert set(find_failures(probe(gain=1.3), even)) == {"growth"}
    assert set(find_failures(probe(by_loop={**probe().by_loop, "token_correlation": [0.5, 0.999]}), even)) == {
        "collapse"
    }
    idle = even.clone()
    idle[:, 3] = 0
    assert "1 of 4 experts" in find_failures(probe(), idle)["dead experts"]


def test_overthinking_begins_where_more_loops_raise_the_loss(tmp_path):
    curve = {n: HeldOut(loss, 0.5) for n, loss in {1: 3.0, 2: 2.5, 4: 2.0, 8: 2.01, 16: 2.1, 32: 2.05}.items()}
    assert overthinks_from(curve) == 16
    assert overthinks_from({1: HeldOut(2.0, 0.1), 2: HeldOut(1.9, 0.2)}) is None
    draw_curves(tmp_path / "curve.png", {"a": curve}, 4)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_axes_have_a_minimum_range_and_no_offset(tmp_path, monkeypatch):
    """Losses that differ by 1e-5 fill less than a hundredth of the height, losses that differ by 0.5 most of it, and
    tick labels are the losses themselves, not offsets from 7."""
    panels = []

    @contextmanager
    def recorded(*arguments):
        with save_plot(*arguments) as drawn:
            yield drawn
            drawn[0].figure.canvas.draw()
            for panel in drawn:
                low, high = panel.get_ylim()
                offset = panel.yaxis.get_major_formatter().get_offset()
                panels.append((high - low, offset, [t.get_text() for t in panel.get_yticklabels()]))

    monkeypatch.setattr("mythos_dist.train.evaluation.save_plot", recorded)
    noise = {n: HeldOut(7.0 + 1e-5 * n, 0.0312 + 1e-6 * n) for n in (1, 2, 4)}
    draw_curves(tmp_path / "noise.png", {"a": noise}, 2)
    draw_curves(tmp_path / "gain.png", {"a": {1: HeldOut(3.5, 0.1), 2: HeldOut(3.0, 0.4)}}, 2)
    draw_curves(tmp_path / "inf.png", {"a": {1: HeldOut(math.inf, 0.0), 2: HeldOut(math.nan, 0.0)}}, 2)
    (loss, offset, ticks), (accuracy, other, _), (gain, *_), *_ = panels
    assert loss > 100 * 3e-5 and accuracy > 100 * 3e-6 and gain < 2 * 0.5
    assert offset == other == "" and all(6 < float(tick) < 8 for tick in ticks)


def test_a_legend_has_overthinking_only_if_a_curve_overthinks(tmp_path, monkeypatch):
    legends = []

    @contextmanager
    def recorded(*arguments):
        with save_plot(*arguments) as panels:
            yield panels
            (legend,) = [legend for legend in [panels[0].get_legend()] if legend]
            legends.append([text.get_text() for text in legend.get_texts()])

    monkeypatch.setattr("mythos_dist.train.evaluation.save_plot", recorded)
    for last in (1.9, 2.5):
        draw_curves(
            tmp_path / "curve.png", {"a": {1: HeldOut(2.0, 0.1), 2: HeldOut(1.9, 0.2), 4: HeldOut(last, 0.2)}}, 2
        )
    assert ["overthinking" in legend for legend in legends] == [False, True]


def test_a_plot_is_replaced_atomically(tmp_path):
    """An error while drawing leaves the previous plot and no temporary file."""
    file = tmp_path / "a.png"
    with save_plot(file, 2, (4, 2)) as panels:
        assert len(panels) == 2
    before = file.read_bytes()
    assert before.startswith(b"\x89PNG")
    with pytest.raises(ZeroDivisionError), save_plot(file, 1, (4, 2)):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == before


def test_products_are_those_of_permutations():
    """Against each permutation applied to each point, one after the other."""
    table, degree = group_table(4), 4
    permutations = list(itertools.permutations(range(degree)))
    elements = np.random.default_rng(0).integers(24, size=(5, 6))
    for last in (1, 2, 3, 6):
        computed = products(elements, table, last)
        for row, i in itertools.product(range(5), range(6)):
            points = list(range(degree))
            for element in elements[row, max(0, i - last + 1) : i + 1]:
                points = [permutations[element][point] for point in points]
            assert permutations[computed[row, i]] == tuple(points)


@pytest.mark.parametrize("targets", ["final", "reached", "per_loop"])
def test_shards_of_the_depth_task_are_read_like_any_others(targets, tmp_path):
    """The verifier accepts them; labels are products, the final ones in the last row, and BOS has no label."""
    out = tmp_path / "s3"
    manifest = make_depth_task(out, hops=4, sequences=50, heldout=10, targets=targets)
    assert verify(out).ok
    stream = ReplicaStream(
        str(out),
        "train",
        seq_len=5,
        vocab_size=manifest.vocab_size,
        global_batch=4,
        micro_batch=4,
        replica=0,
        num_replicas=1,
        seed=0,
    )
    (batch,) = stream.step(3)
    assert batch.labels.shape == (4, 1 if targets == "final" else 4, 5)
    elements = batch.input_ids[:, 1:].numpy() - FIRST
    assert np.array_equal(batch.final_labels[:, 1:].numpy() - FIRST, products(elements, group_table(3), 4))
    assert (batch.labels[:, :, 0] == -100).all() and not (batch.input_ids == EOS).any()
    if targets == "per_loop":
        assert np.array_equal(batch.labels[:, 1, 1:].numpy() - FIRST, products(elements, group_table(3), 2))
    if targets == "reached":
        assert torch.equal(batch.labels[:, 1, :3], batch.final_labels[:, :3])
        assert (batch.labels[:, 1, 3:] == -100).all()
    again = tmp_path / "again"
    make_depth_task(again, hops=4, sequences=50, heldout=10, targets=targets)
    assert json.loads((again / "manifest.json").read_text())["fingerprint"] == manifest.fingerprint
