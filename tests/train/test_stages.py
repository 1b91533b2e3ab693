"""`stages:` in one config: one run folder, stage after stage, wherever it is killed."""

import shutil
import signal
from pathlib import Path

import pytest
from helpers.launch import launch, train, train_here, train_until_rolled_back
from helpers.run_folder import lines

from mythos_dist.checkpoint.manifest import read_checkpoint_manifest
from mythos_dist.config.dump import dump_stages
from mythos_dist.config.load import load_config, load_stages
from mythos_dist.config.schema import Config
from mythos_dist.data.stream import ReplicaStream
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.ops.cluster.allocation import is_completed
from mythos_dist.ops.session import describe_rank
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.prepare.convert import convert
from mythos_dist.train.metrics import batch_id

pytestmark = [pytest.mark.launch, pytest.mark.timeout(2400)]
EXACT = ("step", "loss", "grad_norm", "n_loops", "batch_id", "lr", "phase", "tokens", "tokens_total")
STAGES = """
stages:
  - {name: stable, steps: 4, optim: {schedule: constant, warmup_steps: 2}}
  - name: decay
    steps: 3
    optim: {schedule: linear, warmup_steps: 0, lr: 1.0e-3}
    train: {global_batch: 2}
"""


@pytest.fixture(scope="module")
def common(settings) -> list[str]:
    """Overrides of every run here."""
    changes = "train.global_batch=4 train.micro_batch=1 checkpoint.every=3 checkpoint.keep=9"
    changes += " loops.distribution=poisson model.dropout=0.1"
    return [one for one in settings[1:] if not one.startswith(("train.steps", "optim.warmup"))] + changes.split()


def write(folder: Path, stages: str, common: list[str]) -> list[str]:
    """Arguments of a run whose config has these stages; what stages set is in the file and not overridden."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    tiny = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"
    file.write_text(f"base: {tiny}\ntrain: {{global_batch: 4}}\n{stages}")
    return [str(file), *(one for one in common if not one.startswith("train.global_batch"))]


def exact(run_dir: Path) -> list[tuple]:
    return [tuple(line[key] for key in EXACT) for line in lines(run_dir)]


def batches_of_two(common: list[str], number: int) -> list[list[int]]:
    """The sample ids of the first batches of two sequences."""
    path = next(one for one in common if one.startswith("data.path=")).removeprefix("data.path=")
    stream = ReplicaStream(
        path, "train", seq_len=32, vocab_size=512, global_batch=2, micro_batch=2, replica=0, num_replicas=1, seed=0
    )
    return [[int(i) for i in stream.step(step)[0].sample_ids] for step in range(number)]


@pytest.fixture(scope="module")
def staged(common, tmp_path_factory) -> tuple[list[str], Path]:
    """Arguments of a run of two stages, and the folder of one on two ranks that was not interrupted."""
    folder = tmp_path_factory.mktemp("staged")
    arguments = write(folder, STAGES, common)
    result = train(2, *arguments, f"run.dir={folder / 'run'}")
    assert result.codes == [0, 0], result.tails
    assert "stage stable is done: 4 steps" in result.out and "done: 7 steps" in result.out
    assert "stage decay: starting from" in result.out and "carried over: weights; router bias; moments" in result.out
    return arguments, folder / "run"


def test_stages_train_one_after_the_other_in_one_folder(staged, common):
    """Steps count over the folder, each stage has its own schedule and batch, and unchanged data are read on."""
    arguments, run_dir = staged
    found = lines(run_dir)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["stage"] for line in found] == ["stable"] * 4 + ["decay"] * 3
    assert [line["phase"] for line in found] == ["warmup"] * 2 + ["stable"] * 2 + ["decay"] * 3
    rates = [1e-3, 2e-3, 2e-3, 2e-3, *(1e-3 * (0.1 + 0.9 * (1 - i / 3)) for i in (1, 2, 3))]
    assert [line["lr"] for line in found] == pytest.approx(rates)
    assert [line["tokens"] for line in found] == [32 * n for n in (4, 8, 12, 16, 18, 20, 22)]
    ids = batches_of_two(common, 11)
    batches = [ids[0] + ids[1], ids[2] + ids[3], ids[4] + ids[5], ids[6] + ids[7], ids[8], ids[9], ids[10]]
    assert [line["batch_id"] for line in found] == [batch_id(batch) for batch in batches]
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("step-*")) == [
        f"step-{step:08d}"
        for step in (3, 4, 6, 7)  # borders besides checkpoint.every
    ]
    assert (run_dir / "COMPLETED").exists()
    written = exact(run_dir)
    again = train(2, *arguments, f"run.dir={run_dir}")
    assert again.codes == [0, 0] and "is complete: 7 of 7 steps" in again.out and exact(run_dir) == written


@pytest.mark.parametrize("step", [4, *(pytest.param(step, marks=pytest.mark.long) for step in (3, 6))])
def test_killed_inside_or_at_the_border_it_writes_the_same_lines(staged, tmp_path, step):
    arguments, whole = staged
    run = [*arguments, f"run.dir={tmp_path}"]
    file = tmp_path / "checkpoints" / f"step-{step:08d}" / "checkpoint.json"
    killed = train(2, *run, env={"KILL_AFTER": str(file)})
    assert killed.codes == [-signal.SIGKILL] * 2 and not (tmp_path / "COMPLETED").exists()
    resumed = train(2, *run)
    assert resumed.codes == [0, 0], resumed.tails
    assert exact(tmp_path) == exact(whole)


def _train_with_stop_file(arguments: list[str], file: str) -> None:
    """Train with a STOP file that appears between the last step of a stage and the next stage."""
    from mythos_dist.train.loop import Run

    finish = Run.finish

    def finish_later(self: Run, reason: str) -> None:
        if not reason and self.rank == 0:
            Path(file).touch()
        finish(self, reason)

    Run.finish = finish_later
    train_here(arguments)


def test_a_stop_file_at_the_border_stops_the_next_stage(staged, tmp_path):
    arguments, whole = staged
    run = [*arguments, f"run.dir={tmp_path}"]
    stopped = launch(2, _train_with_stop_file, run, str(tmp_path / "STOP"))
    assert stopped.codes == [85, 85] and f"stopped after step 4: found {tmp_path / 'STOP'}" in stopped.out
    assert not (tmp_path / "STOP").exists() and not (tmp_path / "COMPLETED").exists()
    resumed = train(2, *run)
    assert resumed.codes == [0, 0] and exact(tmp_path) == exact(whole)


def test_a_rollback_to_the_beginning_of_a_stage_holds_after_a_restart(common: list[str], tmp_path):
    """Batches 4, 5 and 6 are bad, the first of stage 2. It is killed before it has a checkpoint of its own."""
    changes = {"checkpoint.every=3": "checkpoint.every=99", "checkpoint.keep=9": "checkpoint.keep=99"}
    arguments = write(tmp_path, STAGES.replace("steps: 3", "steps: 5"), [changes.get(one, one) for one in common])
    faults = ",".join(f"bad_batch@{batch}:0" for batch in (4, 5, 6))
    run = [*arguments, f"run.dir={tmp_path / 'run'}", f"faults.inject={faults}"]
    killed = launch(2, train_until_rolled_back, run)
    assert set(killed.codes) <= {-signal.SIGKILL, 4} and "to the checkpoint of step 4" in killed.err, killed.tails
    resumed = train(2, *run)
    assert resumed.codes == [0, 0], resumed.tails
    ids = batches_of_two(common, 16)
    expected = [ids[0] + ids[1], ids[2] + ids[3], ids[4] + ids[5], ids[6] + ids[7], *ids[11:16]]
    assert [line["batch_id"] for line in lines(tmp_path / "run")] == [batch_id(batch) for batch in expected]


def test_a_stage_that_is_added_to_a_complete_run_is_trained(staged, common, tmp_path):
    arguments, whole = staged
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    longer = write(tmp_path, STAGES + "  - {name: more, steps: 2, optim: {warmup_steps: 0}}\n", common)
    assert is_completed(load_stages(arguments[0], [*arguments[1:], f"run.dir={run_dir}"])[-1])
    assert not is_completed(load_stages(longer[0], [*longer[1:], f"run.dir={run_dir}"])[-1])
    result = train(2, *longer, f"run.dir={run_dir}")
    assert result.codes == [0, 0], result.tails
    assert exact(run_dir)[:7] == exact(whole) and [line["stage"] for line in lines(run_dir)[7:]] == ["more"] * 2
    assert (run_dir / "COMPLETED").read_text() == "9\n"


def test_a_stage_that_changes_nothing_is_no_border(common, tmp_path):
    """`everything` and equal settings: the lines of one run of both lengths, bit for bit."""
    arguments = write(
        tmp_path,
        "optim: {schedule: constant}\nstages: [{steps: 4}, {steps: 3, start_from_state: everything}]",
        common,
    )
    assert train(2, *arguments, f"run.dir={tmp_path / 'two'}").codes == [0, 0]
    one = write(tmp_path / "one", "optim: {schedule: constant}", common)
    assert train(2, *one, f"run.dir={tmp_path / 'one' / 'run'}", "train.steps=7").codes == [0, 0]
    assert exact(tmp_path / "two") == exact(tmp_path / "one" / "run")
    assert [line["stage"] for line in lines(tmp_path / "two")] == ["1"] * 4 + ["2"] * 3


def test_stages_may_have_layouts_of_their_own(common, tmp_path):
    """The second stage on other axes: the same batches, losses to the order of sums; killed inside it resumes."""
    stages = STAGES.replace("train: {global_batch: 2}", "train: {global_batch: 2}\n    parallel: {pipe: 2, zero: 1}")
    quiet = [one for one in common if one != "model.dropout=0.1"]
    reference = write(tmp_path / "reference", STAGES, quiet)
    assert train(2, *reference, f"run.dir={tmp_path / 'reference' / 'run'}").codes == [0, 0]
    arguments = [*write(tmp_path, stages, quiet), f"run.dir={tmp_path / 'run'}"]
    file = tmp_path / "run" / "checkpoints" / "step-00000006" / "checkpoint.json"
    assert train(2, *arguments, env={"KILL_AFTER": str(file)}).codes == [-signal.SIGKILL] * 2
    resumed = train(2, *arguments)
    assert resumed.codes == [0, 0], resumed.tails
    assert read_checkpoint_manifest(file.parents[1] / "step-00000007").layout["pipe"] == 2
    for got, expected in zip(lines(tmp_path / "run"), lines(tmp_path / "reference" / "run"), strict=True):
        assert got["batch_id"] == expected["batch_id"] and got["lr"] == expected["lr"]
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def short_shards(shards, tmp_path_factory) -> list[Path]:
    """Two folders of shards with windows of 16 tokens, of the text and the tokenizer of `shards`."""
    work = tmp_path_factory.mktemp("short")
    corpus, tokenizer = shards.parent / "corpus.parquet", Tokenizer.load(shards.parent / "tokenizer.model")
    folders = [work / "a", work / "b"]
    for folder, heldout in zip(folders, (0.1, 0.3), strict=True):
        convert(corpus, tokenizer, 16, folder, heldout=heldout, quiet=True)
    return folders


def test_sequence_length_and_mix_may_differ_between_stages(common, shards, short_shards, tmp_path):
    """32 tokens of one folder, then 16 of a mix, then of another mix of it, whose data start over; killed inside a
    stage, and two ranks after one."""
    a, b = short_shards
    stages = f"""
data: {{path: {shards}}}
stages:
  - {{steps: 2, train: {{seq_len: 32}}}}
  - {{steps: 2, train: {{seq_len: 16}}, data: {{mix: {{{a}: 0.7, {b}: 0.3}}}}}}
  - {{steps: 2, train: {{seq_len: 16}}, data: {{mix: {{{a}: 0.2, {b}: 0.8}}}}, start_from_state: everything}}
"""
    quiet = [one for one in common if not one.startswith(("data.path", "train.seq_len", "model.dropout"))]
    arguments = write(tmp_path, stages, [*quiet, "checkpoint.every=1"])
    run = [*arguments, f"run.dir={tmp_path / 'run'}"]
    file = tmp_path / "run" / "checkpoints" / "step-00000003" / "checkpoint.json"
    assert train(1, *run, env={"KILL_AFTER": str(file)}).codes == [-signal.SIGKILL]
    result = train(2, *run)
    assert result.codes == [0, 0], result.tails
    expected = []
    for path, seq_len in ((shards, 32), ({str(a): 0.7, str(b): 0.3}, 16), ({str(a): 0.2, str(b): 0.8}, 16)):
        stream = ReplicaStream(
            path,
            "train",
            seq_len=seq_len,
            vocab_size=512,
            global_batch=4,
            micro_batch=4,
            replica=0,
            num_replicas=1,
            seed=0,
        )
        expected += [batch_id(stream.step(step)[0].sample_ids.tolist()) for step in range(2)]
    found = lines(tmp_path / "run")
    assert [line["batch_id"] for line in found] == expected
    assert [line["tokens"] for line in found] == [128, 256, 320, 384, 448, 512]


def load(tmp_path: Path, text: str, *overrides: str) -> list:
    file = tmp_path / "config.yaml"
    file.write_text(f"data: {{path: shards}}\n{text}")
    return load_stages(file, overrides)


def test_each_stage_is_a_config_of_its_own(tmp_path):
    """Settings of the stage override the file's, the command line overrides both; lengths add up."""
    stages = load(tmp_path, STAGES.replace("decay\n", "decay\n    start_from_state: everything\n"), "optim.lr=0.5")
    assert [stage.run.stage for stage in stages] == ["stable", "decay"]
    assert [stage.run.stage_begin for stage in stages] == [0, 4]
    assert [stage.train.steps for stage in stages] == [4, 7]  # everything: where the schedule of both ends
    assert [stage.run.start_from_state for stage in stages] == ["weights", "everything"]
    assert [stage.optim.schedule for stage in stages] == ["constant", "linear"]
    assert [stage.optim.lr for stage in stages] == [0.5, 0.5]
    assert [stage.train.steps for stage in load(tmp_path, STAGES)] == [4, 3]
    assert load_config(tmp_path / "config.yaml") == load(tmp_path, STAGES)[0]
    assert load(tmp_path, "train: {steps: 5}")[0].run.stage == ""


def test_ranks_compare_the_settings_of_all_stages_when_they_join(tmp_path):
    stages = load(tmp_path, STAGES)
    other = load(tmp_path, STAGES.replace("lr: 1.0e-3", "lr: 1.1e-3"))
    assert stages[0] == other[0] and describe_rank(stages) != describe_rank(other)


@pytest.mark.parametrize("state", ["weights", "everything"])
def test_stages_come_back_from_their_dump(tmp_path, state):
    stages = load(
        tmp_path, STAGES.replace("decay\n", f"decay\n    start_from_state: {state}\n"), "data.mix={a: 1, b: 2}"
    )
    (tmp_path / "dump.yaml").write_text(dump_stages(stages))
    assert load_stages(tmp_path / "dump.yaml") == stages


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("stages: 3", [], ["stages=3: expected a list"]),
        ("stages: []", [], ["stages=[]: expected a list"]),
        ("stages: [a]", [], ["stages[0]='a': expected settings"]),
        ("stages: [{name: a}]", [], ["stages[0].steps=null: expected a number of steps"]),
        ("stages: [{steps: 0}, {steps: x}]", [], ["stages[0].steps=0", "stages[1].steps='x'"]),
        ("stages: [{name: a, steps: 1}, {name: a, steps: 1}]", [], ["stages[1].name='a'", "a name of its own"]),
        ("stages: [{name: a/b, steps: 1}]", [], ["stages[0].name='a/b'"]),
        ("stages: [{steps: 9, optim: {lrr: 1}}]", [], ["stage 1: optim.lrr: unknown key; did you mean optim.lr?"]),
        ("stages: [{steps: 9, optimm: {lr: 1}}]", [], ["stage 1: optimm: unknown section; did you mean optim?"]),
        (
            "stages: [{steps: 9}, {steps: 5, optim: {warmup_steps: 3, decay_steps: 4}}]",
            [],
            ["stage 2: optim.decay_steps=4", "train.steps=5"],
        ),
        ("stages: [{steps: 9}, {steps: 5, model: {dim: 64}}]", [], ["stage 2: model.dim=64, but stage 1 has 2048"]),
        (
            "stages: [{steps: 9}, {steps: 5, run: {dir: b}}]",
            [],
            ["stage 2: run.dir='b', but stage 1 has 'runs"],
        ),
        ("stages: [{steps: 9}, {steps: 9, optim: {name: muon}}]", [], ["cannot take over the moments of adamw"]),
        ("stages: [{steps: 9, start_from_state: weights}]", [], ["stages[0].start_from_state: the first stage"]),
        ("stages: [{steps: 9}, {steps: 1, start_from_state: all}]", [], ["run.start_from_state='all'"]),
        ("stages: [{steps: 9}]", ["train.steps=4"], ["train.steps does not work with `stages:`"]),
        ("stages: [{steps: 9}]", ["run.stage_begin=4"], ["run.stage_begin follows from `stages:`; leave it out"]),
        ("stages: [{steps: 9, train: {steps: 4}}]", [], ["stages[0] sets train.steps, which follows from"]),
        ("stages: [{steps: 9, stages: []}]", [], ["stage 1: stages belongs at the top of a config file"]),
        (
            "start_from: a\nstart_from_state: everything\nstages: [{steps: 1}, {steps: 1}]",
            [],
            ["start_from_state=everything does not work with `stages:`"],
        ),
        ("stagess: [{steps: 9}]", [], ["did you mean stages?"]),
    ],
)
def test_a_mistake_in_stages_is_one_message(tmp_path, text, overrides, words):
    with pytest.raises(UserError) as refused:
        load(tmp_path, text, *overrides)
    assert len(refused.value.problems) == len(words) or len(words) > 1, refused.value.problems
    for word in words:
        assert word in str(refused.value)


def test_stages_that_contradict_the_run_are_refused(staged, common, tmp_path):
    """The first stage made longer after it has ended: the run is in the second."""
    _, whole = staged
    before = (whole / "metrics.jsonl").read_bytes()
    arguments = write(tmp_path, STAGES.replace("steps: 4", "steps: 5"), common)
    result = train(2, *arguments, f"run.dir={whole}")
    assert result.codes == [2, 2] and "run.stage_begin=5" in result.err and "has 4" in result.err, result.err
    assert (whole / "metrics.jsonl").read_bytes() == before


def _train_and_watch(arguments: list[str]) -> None:
    """Train; each new engine notes whether the model and the fp32 masters of the last one are still in memory."""
    import weakref

    from mythos_dist.train.engine import Engine

    build, watched = Engine.__init__, []

    def watching(self: Engine, config: Config, mesh: Mesh) -> None:
        alive = [name for one in watched for name, reference in one.items() if reference() is not None]
        print(f"before an engine: {len(watched)} earlier, in memory: {alive}", flush=True)
        build(self, config, mesh)
        masters = next(iter(self.local_shards.values())).weights.untyped_storage()
        watched.append({"model": weakref.ref(self.model), "masters": weakref.ref(masters)})

    Engine.__init__ = watching
    train_here(arguments)


@pytest.mark.parametrize(("ranks", "layout"), [(1, ""), (2, "parallel.zero=3"), (2, "parallel.pipe=2")])
def test_the_next_stage_does_not_hold_the_memory_of_the_last_one(common, tmp_path, ranks, layout):
    """DeepSpeed's engines are in cycles that the garbage collector cannot see."""
    arguments = [*write(tmp_path, STAGES, common), f"run.dir={tmp_path / 'run'}", *layout.split()]
    result = launch(ranks, _train_and_watch, arguments)
    assert result.codes == [0] * ranks, result.tails
    found = [line for line in result.out.splitlines() if line.startswith("before an engine")]
    assert found == [f"before an engine: {earlier} earlier, in memory: []" for earlier in (0, 1)]
