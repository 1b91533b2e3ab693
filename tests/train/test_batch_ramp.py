"""`train.batch_ramp`: the batch size as a function of the step, at any layout, after a kill, a rollback, in stages."""

import json
import signal
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import pytest
from helpers.launch import launch, train, train_until_rolled_back
from helpers.run_folder import at, copy_until, lines
from hypothesis import given
from hypothesis import strategies as st

from mythos_dist.checkpoint.manifest import Lineage, read_checkpoint_manifest
from mythos_dist.config.compare import differences
from mythos_dist.config.dump import dump_config
from mythos_dist.config.layout import layout_problems
from mythos_dist.config.load import config_from, load_config
from mythos_dist.config.schema import Config, TrainConfig
from mythos_dist.data.stream import ReplicaStream
from mythos_dist.errors import UserError
from mythos_dist.train.global_batch import GlobalBatch, batches_from, tokens_at
from mythos_dist.train.metrics import batch_id
from mythos_dist.train.spikes import Rollback

pytestmark = [pytest.mark.timeout(2400)]
RAMP = "[[4, 2], [8, 3]]"
SIZES = [4, 4, 8, 8, 8, 16, 16, 16]  # of the steps of a run with RAMP
EXACT = ("step", "loss", "grad_norm", "n_loops", "batch_id", "lr", "tokens", "tokens_total", "global_batch")


@pytest.fixture(scope="module")
def run(settings) -> list[str]:
    """Arguments of a run of 8 steps with RAMP."""
    changes = f"train.steps=8 train.batch_ramp={RAMP.replace(' ', '')} train.global_batch=16 checkpoint.every=1"
    loops = "checkpoint.keep=9 loops.distribution=poisson loops.per=sequence model.dropout=0.1"
    return [*settings, *changes.split(), *loops.split()]


def exact(run_dir: Path, keys: tuple[str, ...] = EXACT) -> list[tuple]:
    return [tuple(line.get(key) for key in keys) for line in lines(run_dir)]


def ids_of(shards: Path, batches: list[range]) -> list[str]:
    """The batch_id of each range of positions."""
    stream = ReplicaStream(
        shards, "train", seq_len=32, vocab_size=512, global_batch=1, micro_batch=1, replica=0, num_replicas=1, seed=0
    )
    return [batch_id([int(stream.step(position)[0].sample_ids) for position in batch]) for batch in batches]


def consecutive(sizes: list[int]) -> list[range]:
    """The ranges of these sizes that follow one another from 0."""
    return [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


# Arithmetic.

PAIRS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), max_size=4)


def ramp_of(pairs: list[tuple[int, int]]) -> TrainConfig:
    """A growing ramp: each pair is (growth, steps)."""
    sizes = [sum(growth for growth, _ in pairs[: i + 1]) for i in range(len(pairs))]
    ramp = tuple((size, steps) for size, (_, steps) in zip(sizes, pairs, strict=True))
    return TrainConfig(batch_ramp=ramp, global_batch=sum(growth for growth, _ in pairs) + 3)


@given(PAIRS, st.integers(0, 25))
def test_sizes_and_their_sums_are_those_of_the_list_of_all_steps(pairs, step):
    train = ramp_of(pairs)
    sizes = [size for size, steps in train.batch_ramp for _ in range(steps)] + [train.global_batch] * 30
    assert train.batch_size_at(step + 1) == sizes[step]
    assert train.samples_until(step) == sum(sizes[:step])


@given(
    PAIRS,
    st.integers(0, 6),
    st.integers(0, 4),
    st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(1, 4), min_size=1), st.integers(0, 4)), max_size=3),
)
def test_each_step_takes_the_next_samples_that_no_rollback_has_excluded(pairs, carried, begin, rollbacks):
    """Against a list of samples from which each step takes the first ones, with rollbacks of (good steps; which of the
    next four are skipped; steps back) anywhere, also to before earlier ones. The stage begins after step `begin` of the
    run, at sample 100, when `carried` steps of its ramp are done."""
    config = replace(Config(), train=ramp_of(pairs), run=replace(Config().run, stage_begin=begin, stage="b"))
    lineage = Lineage(first_step=carried - begin, first_sample=100, first_tokens=5)
    decided = [Rollback(1, 0, [0, 1], "", "a", [[98, 130]])]  # an earlier stage's, of other data
    excluded: set[int] = set()

    def take(step: int, taken: dict[int, list[int]]) -> GlobalBatch:
        size = config.train.batch_size_at(lineage.first_step + step)
        used = {sample for earlier in range(begin + 1, step) for sample in taken[earlier]} | excluded
        taken[step] = [sample for sample in range(100, 100 + 2000) if sample not in used][:size]
        batch = next(batches_from(config, lineage, decided, step))
        assert batch.positions.tolist() == taken[step]
        assert [sample for one in batch.ranges for sample in range(*one)] == taken[step]
        until = 5 + config.train.seq_len * sum(len(taken[earlier]) for earlier in range(begin + 1, step + 1))
        assert tokens_at(config, lineage, step) == until
        return batch

    taken: dict[int, list[int]] = {}
    step = begin
    for good, skipped, back in rollbacks:
        for _ in range(good):
            step += 1
            take(step, taken)
        batches = [take(step + i, taken) for i in range(1, max(skipped) + 1)]
        bad = [batch for i, batch in enumerate(batches, 1) if i in skipped]
        to = max(begin, step - back)
        indices = [batch.index for batch in bad]
        ranges = [list(one) for batch in bad for one in batch.ranges]
        decided.append(Rollback(step + len(batches), to, indices, "", "b", ranges))
        excluded |= {position for batch in bad for position in batch.positions.tolist()}
        step = to
    for _ in range(8):
        step += 1
        take(step, taken)


def test_rollbacks_of_earlier_versions_exclude_batches_of_the_same_size():
    """They have no samples: batches 1 and 3 of 8 sequences, in a run that began at sample 40."""
    old = [Rollback(4, 1, [1, 3], "")]
    batches = list(islice(batches_from(Config(), Lineage(first_sample=40), old, 1), 3))
    assert [batch.ranges for batch in batches] == [[(40, 48)], [(56, 64)], [(72, 80)]]
    assert [batch.index for batch in batches] == [0, 2, 4]


# Settings.


def test_a_ramp_is_read_from_yaml_and_the_command_line_and_comes_back(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "data: {path: shards}\ntrain:\n  global_batch: 32\n  batch_ramp:\n  - [8, 100]\n  - [16, 2e2]\n"
    )
    config = load_config(tmp_path / "a.yaml")
    assert config.train.batch_ramp == ((8, 100), (16, 200))
    assert load_config(tmp_path / "a.yaml", ["train.batch_ramp=[[8,100],[16,200]]"]) == config
    assert load_config(tmp_path / "a.yaml", ["train.batch_ramp=[]"]).train.batch_ramp == ()
    (tmp_path / "b.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "b.yaml") == config
    assert config_from(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batch_ramp=8", "=8: expected a list of pairs of whole numbers, such as [[8, 100], [16, 200]]"),
        ("train.batch_ramp=[8,100]", ": expected a list of pairs"),
        ("train.batch_ramp=[[8]]", ": expected a list of pairs"),
        ("train.batch_ramp=[[8,1,2]]", ": expected a list of pairs"),
        ("train.batch_ramp=[[8,1.5]]", ": expected a list of pairs"),
        ("train.batch_ramp=[[0,100]]", "=[[0, 100]] contains [0]; each must be at least 1"),
        ("train.batch_ramp=[[8,0]]", "=[[8, 0]] contains [0]; each must be at least 1"),
        ("train.batch_ramp=[[8,9999999999]]", "contains [9999999999]; each must be at most 1,073,741,824"),
        (
            "train.batch_ramp=[[8,100],[64,100]]",
            "=[[8, 100], [64, 100]] (sequences, steps) has batches that do not grow from each to the next and to "
            "train.global_batch=32; set train.batch_ramp to [[8, 100]]",
        ),
        ("train.batch_ramp=[[16,100],[8,100]]", "set train.batch_ramp to [[16, 100]]"),
        ("train.batch_ramp=[[32,100]]", "set train.batch_ramp to []"),
        (
            "train.batch_ramp=[[6,10],[18,20]] train.micro_batch=4",
            "=[[6, 10], [18, 20]] (sequences, steps) has batches that are not divisible by train.micro_batch=4; set "
            "train.micro_batch to one of [1, 2], or set train.batch_ramp to one of [[[4, 10], [16, 20]], "
            "[[8, 10], [20, 20]]]",
        ),
    ],
)
def test_a_wrong_ramp_is_one_message(tmp_path, override, words):
    (tmp_path / "a.yaml").write_text("data: {path: shards}\ntrain: {global_batch: 32}")
    with pytest.raises(UserError) as refused:
        load_config(tmp_path / "a.yaml", override.split())
    (problem,) = refused.value.problems
    assert problem.startswith("train.batch_ramp=") and words in problem


def test_a_number_of_ranks_that_a_ramp_does_not_divide_into_is_refused_with_what_would_work():
    config = replace(Config(), train=TrainConfig(global_batch=48, batch_ramp=((6, 10), (18, 20)), micro_batch=2))
    assert layout_problems(config, 3) == []
    (problem,) = layout_problems(config, 4)
    assert problem == (
        "train.batch_ramp=[[6, 10], [18, 20]] (sequences, steps) has batches that are not divisible by "
        "train.micro_batch=2 x 4 (replicas) = 8: every replica runs the same number of micro-batches; set "
        "train.batch_ramp to one of [[[8, 10], [16, 20]], [[8, 10], [24, 20]]], or set the number of ranks to 3"
    )


def test_a_ramp_cannot_be_added_to_a_run_of_a_version_without_it():
    """Its checkpoints have no such setting: they were trained on batches of one size."""
    config = replace(Config(), train=TrainConfig(batch_ramp=((4, 10),)))
    before = asdict(config)
    assert list(differences(json.loads(json.dumps(before)), config)) == []
    del before["train"]["batch_ramp"]
    assert list(differences(before, config)) == [("train.batch_ramp", (), ((4, 10),))]
    assert list(differences(before, Config())) == []


# Runs.


@pytest.fixture(scope="module")
def ramped(run, tmp_path_factory) -> Path:
    """A run of two ranks that was not interrupted."""
    run_dir = tmp_path_factory.mktemp("ramped") / "run"
    result = train(2, *run, f"run.dir={run_dir}")
    assert result.codes == [0, 0], result.tails
    return run_dir


@pytest.mark.launch
def test_a_ramped_run_reads_consecutive_batches_of_growing_size(ramped, shards):
    found = lines(ramped)
    assert [line["global_batch"] for line in found] == SIZES
    assert [line["batch_id"] for line in found] == ids_of(shards, consecutive(SIZES))
    assert [line["tokens"] for line in found] == [32 * sum(SIZES[: step + 1]) for step in range(8)]
    for line in found:  # both are measured over the same seconds
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(32 * line["global_batch"])
    lineage = read_checkpoint_manifest(at(ramped, 4)).lineage
    assert (lineage.next_sample, lineage.tokens) == (sum(SIZES[:4]), 32 * sum(SIZES[:4]))


@pytest.mark.launch
@pytest.mark.parametrize(
    "layout",
    [
        "parallel.pipe=2",
        pytest.param("", marks=pytest.mark.long),
        pytest.param("parallel.zero=2 train.dtype=bf16", marks=pytest.mark.long),
        pytest.param("parallel.zero=3", marks=pytest.mark.long),
    ],
)
def test_a_ramp_is_a_run_of_stages_of_constant_batches_bit_for_bit(run, tmp_path, layout):
    """Each stage has the size of one part of the ramp, and continues the schedule of the stage before it: losses and
    gradient norms are divided by the micro-batches of the step, and the rate is not scaled."""
    common = [one for one in run if not one.startswith(("train.steps", "train.batch_ramp", "train.global_batch"))]
    common += ["optim.schedule=constant", *layout.split()]
    ramp = [*common, "train.steps=8", f"train.batch_ramp={RAMP}", "train.global_batch=16"]
    result = train(2, *ramp, f"run.dir={tmp_path / 'ramp'}")
    assert result.codes == [0, 0], result.tails
    parts = [f"{{steps: {steps}, train: {{global_batch: {size}}}" for size, steps in ((4, 2), (8, 3), (16, 3))]
    parts = [parts[0] + "}", *(part + ", start_from_state: everything}" for part in parts[1:])]
    (tmp_path / "stages.yaml").write_text(f"base: {common[0]}\nstages: [{', '.join(parts)}]\n")
    result = train(2, str(tmp_path / "stages.yaml"), *common[1:], f"run.dir={tmp_path / 'stages'}")
    assert result.codes == [0, 0], result.tails
    keys = EXACT[:-1]
    assert exact(tmp_path / "ramp", keys) == exact(tmp_path / "stages", keys)


@pytest.mark.launch
@pytest.mark.parametrize("step", [2, *(pytest.param(step, marks=pytest.mark.long) for step in (1, 3, 5, 6))])
def test_killed_inside_or_at_a_border_of_the_ramp_it_writes_the_same_lines(ramped, run, tmp_path, step):
    arguments = [*run, f"run.dir={tmp_path}", "data.workers=1"]
    killed = train(2, *arguments, env={"KILL_AFTER": str(at(tmp_path, step) / "checkpoint.json")})
    assert killed.codes == [-signal.SIGKILL] * 2
    resumed = train(2, *arguments)
    assert resumed.codes == [0, 0], resumed.tails
    assert exact(tmp_path) == exact(ramped)


LAYOUTS = [
    (4, "parallel.pipe=2 parallel.expert=2"),
    pytest.param(1, "train.micro_batch=1", marks=pytest.mark.long),
    pytest.param(2, "parallel.tensor=2 train.micro_batch=4", marks=pytest.mark.long),
    pytest.param(2, "parallel.pipe=2", marks=pytest.mark.long),
    pytest.param(4, "parallel.expert=4 parallel.zero=3 train.micro_batch=1", marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def on_two_ranks(run, tmp_path_factory) -> Path:
    """The folder of a run without dropout on two ranks."""
    folder = tmp_path_factory.mktemp("ramp") / "two"
    assert train(2, *run, "model.dropout=0.0", f"run.dir={folder}").codes == [0, 0]
    return folder


@pytest.mark.launch
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_a_ramp_gives_the_same_losses_at_every_layout(run, on_two_ranks, tmp_path, ranks, layout):
    """Two ranks train to the first border of the ramp, and this layout resumes; against the two ranks alone."""
    here = copy_until(on_two_ranks, 2, tmp_path / "here")
    result = train(ranks, *run, "model.dropout=0.0", f"run.dir={here}", *layout.split(), seconds=900)
    assert result.codes == [0] * ranks and "resuming from" in result.out, result.tails
    for got, expected in zip(lines(here), lines(on_two_ranks), strict=True):
        for key in ("batch_id", "n_loops", "mean_loops", "lr", "tokens"):
            assert got[key] == expected[key]
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5), layout
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), layout


@pytest.mark.launch
@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_rollback_over_a_border_of_the_ramp_excludes_the_samples_of_the_skipped_steps(run, shards, tmp_path, killed):
    """Batches 4, 5 and 6 are bad (of 8, 16 and 16 sequences): steps 5 to 8 keep their sizes, and read what follows,
    also when the run is killed during the rollback."""
    faults = ",".join(f"bad_batch@{batch}:0" for batch in (4, 5, 6))
    arguments = [*run, f"faults.inject={faults}", f"run.dir={tmp_path}"]
    if killed:
        ended = launch(2, train_until_rolled_back, arguments)
        assert set(ended.codes) <= {-signal.SIGKILL, 4}, ended.tails
    result = train(2, *arguments)
    assert result.codes == [0, 0], result.tails
    found = lines(tmp_path)
    assert killed or "to the checkpoint of step 4, excluding batches 4, 5, 6" in found[4]["decision"]
    taken = consecutive([4, 4, 8, 8, 8, 16, 16, 8, 16, 16, 16])
    assert [line["batch_id"] for line in found] == ids_of(shards, taken[:4] + taken[7:])
    assert [line["global_batch"] for line in found] == SIZES
    assert [line["tokens"] for line in found] == [32 * sum(SIZES[: step + 1]) for step in range(8)]
    assert read_checkpoint_manifest(at(tmp_path, 8)).lineage.next_sample == taken[-1].stop


@pytest.mark.launch
@pytest.mark.parametrize("step", [3, pytest.param(5, marks=pytest.mark.long)])
def test_a_run_that_starts_from_the_middle_of_a_ramp_continues_it(ramped, run, tmp_path, step):
    """`everything`, from inside and from a border of the ramp: the lines of the parent, bit for bit."""
    branch = [f"run.dir={tmp_path}", f"start_from={at(ramped, step)}", "start_from_state=everything"]
    result = train(2, *run, *branch)
    assert result.codes == [0, 0], result.tails
    keys = ("loss", "grad_norm", "n_loops", "batch_id", "lr", "tokens_total", "global_batch")
    assert exact(tmp_path, keys) == exact(ramped, keys)[step:]
    own = [32 * sum(SIZES[step : done + 1]) for done in range(step, 8)]
    assert [line["tokens"] for line in lines(tmp_path)] == own


@pytest.mark.launch
def test_a_stage_begins_its_ramp_anew_unless_it_continues_the_schedule(run, shards, tmp_path):
    """Three stages with one ramp: a new schedule ramps again, `everything` continues, and data are read on. It is
    killed inside a later stage's ramp, and resumes."""
    common = [one for one in run if not one.startswith("train.steps")]
    text = "stages: [{steps: 4}, {steps: 3}, {steps: 4, start_from_state: everything}]"
    (tmp_path / "stages.yaml").write_text(f"base: {common[0]}\n{text}\n")
    arguments = [str(tmp_path / "stages.yaml"), *common[1:], "checkpoint.keep=99", f"run.dir={tmp_path / 'run'}"]
    killed = train(2, *arguments, env={"KILL_AFTER": str(at(tmp_path / "run", 6) / "checkpoint.json")})
    assert killed.codes == [-signal.SIGKILL] * 2
    result = train(2, *arguments)
    assert result.codes == [0, 0], result.tails
    sizes = [*SIZES[:4], *SIZES[:7]]
    found = lines(tmp_path / "run")
    assert [line["stage"] for line in found] == ["1"] * 4 + ["2"] * 3 + ["3"] * 4
    assert [line["global_batch"] for line in found] == sizes
    assert [line["batch_id"] for line in found] == ids_of(shards, consecutive(sizes))
    assert [line["tokens"] for line in found] == [32 * sum(sizes[: step + 1]) for step in range(11)]


@pytest.mark.launch
def test_a_ramp_cannot_change_when_a_run_resumes(ramped, run, tmp_path):
    before = (ramped / "metrics.jsonl").read_bytes()
    for changed in ("[]", "[[4,2],[8,4]]"):
        result = train(1, *run, f"run.dir={ramped}", f"train.batch_ramp={changed}", "train.steps=9")
        assert result.codes == [2] and "train.batch_ramp=" in result.err, result.err
    assert (ramped / "metrics.jsonl").read_bytes() == before
