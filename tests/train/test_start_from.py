"""Runs that begin with the weights of another: what they carry over, at any layout, and what is refused."""

import functools
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.launch import run_tool, train
from helpers.run_folder import at, lines
from helpers.small_run import REPOSITORY

from mythos_dist.checkpoint.exported import ExportedWeights
from mythos_dist.checkpoint.manifest import read_checkpoint_manifest
from mythos_dist.checkpoint.pieces import Piece
from mythos_dist.checkpoint.restore import load_model
from mythos_dist.config.dump import dump_config
from mythos_dist.config.load import config_from, load_config
from mythos_dist.errors import UserError

pytestmark = [pytest.mark.launch, pytest.mark.timeout(2400)]
EXACT = ("loss", "grad_norm", "n_loops", "batch_id", "lr", "phase", "expert_load_max")
TOKENS = 4 * 32  # of a step


@pytest.fixture(scope="module")
def run(settings) -> list[str]:
    return [
        *settings,
        *"train.steps=8 train.global_batch=4 checkpoint.every=2 checkpoint.keep=9 loops.distribution=poisson".split(),
        *"model.dropout=0.1 experts.bias_update_rate=0.01".split(),
    ]


@pytest.fixture(scope="module")
def parent(run, tmp_path_factory) -> Path:
    """A finished run of two ranks, with checkpoints of steps 2, 4, 6 and 8."""
    run_dir = tmp_path_factory.mktemp("stages") / "parent"
    assert train(2, *run, f"run.dir={run_dir}").codes == [0, 0]
    return run_dir


def exact(run_dir: Path, keys: tuple[str, ...] = EXACT) -> list[tuple]:
    return [tuple(line[key] for key in keys) for line in lines(run_dir)]


def tensors_of(folder: Path) -> dict[str, bytes]:
    from mythos_dist.checkpoint.reader import Checkpoint

    opened = Checkpoint(folder)
    return {
        f"{kind}/{name}": opened.full_tensor(kind, name).tobytes()
        for name, tensor in opened.manifest.tensors.items()
        for kind in tensor.kinds
    }


def test_a_stage_that_changes_nothing_is_a_resume_bit_for_bit(parent, run, tmp_path):
    """From step 4 of 8: the lines of the parent's steps 5 to 8, under the stage's own numbers; killed inside, it
    resumes from its own checkpoint, the parent being gone by then; and its last state is the parent's."""
    source, run_dir = tmp_path / "source", tmp_path / "stage"
    shutil.copytree(parent, source)
    stage = [*run, f"run.dir={run_dir}", f"start_from={at(source, 4)}", "start_from_state=everything"]
    killed = train(2, *stage, env={"KILL_AFTER": str(at(run_dir, 2) / "checkpoint.json")})
    assert killed.codes == [-signal.SIGKILL] * 2
    shutil.rmtree(source)
    resumed = train(2, *stage)
    assert resumed.codes == [0, 0], resumed.tails
    assert f"resuming from {at(run_dir, 2)}" in resumed.out and "done: 4 steps" in resumed.out
    assert exact(run_dir) == exact(parent)[4:]
    found = lines(run_dir)
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert [line["schedule_step"] for line in found] == [5, 6, 7, 8]
    assert [line["tokens"] for line in found] == [step * TOKENS for step in (1, 2, 3, 4)]
    assert [line["tokens_total"] for line in found] == [step * TOKENS for step in (5, 6, 7, 8)]
    assert tensors_of(at(run_dir, 4)) == tensors_of(at(parent, 8))
    assert read_checkpoint_manifest(at(run_dir, 4)).optimizer == read_checkpoint_manifest(at(parent, 8)).optimizer
    again = train(2, *stage)
    assert again.codes == [0, 0] and "is complete: 4 of 4 steps" in again.out


def test_a_wsd_run_branches_by_one_command(run, tmp_path):
    """The command of docs/recipes.md: a decay from step 4 of a constant rate, which trains on to step 8. The branch
    has the stable run's batches, and its first loss, from the same weights."""
    stable, decayed = tmp_path / "stable", tmp_path / "decayed"
    assert train(1, *run, f"run.dir={stable}", "optim.schedule=constant").codes == [0]
    branch = f"run.dir={decayed} start_from={at(stable, 4)} start_from_state=everything optim.schedule=wsd "
    result = train(1, *run, *branch.split(), "optim.decay_steps=3", "train.steps=7")
    assert result.codes == [0], result.tails
    found, stable_lines = lines(decayed), lines(stable)
    assert [line["batch_id"] for line in found] == [line["batch_id"] for line in stable_lines[4:7]]
    assert found[0]["loss"] == stable_lines[4]["loss"] and found[1]["loss"] != stable_lines[5]["loss"]
    assert [line["phase"] for line in found] == ["decay"] * 3
    assert [line["lr"] for line in found] == pytest.approx([2e-3 * (0.1 + 0.9 * (1 - i / 3)) for i in (1, 2, 3)])


def test_muons_momentum_is_carried_over(run, tmp_path):
    """From step 4 of a run with Muon: the rest of that run, bit for bit."""
    muon = "optim.name=muon optim.schedule=constant parallel.zero=2 train.steps=7".split()
    whole, stage = tmp_path / "whole", tmp_path / "stage"
    assert train(2, *run, *muon, f"run.dir={whole}").codes == [0, 0]
    branch = [f"run.dir={stage}", f"start_from={at(whole, 4)}", "start_from_state=everything"]
    result = train(2, *run, *muon, *branch)
    assert result.codes == [0, 0] and "moments of the optimizer" in result.out
    assert [line["loss"] for line in lines(stage)] == [line["loss"] for line in lines(whole)[4:]]
    assert tensors_of(at(stage, 3)) == tensors_of(at(whole, 7))


@pytest.mark.parametrize("state", ["weights", "weights+moments"])
def test_a_stage_begins_anew_with_the_parents_weights(parent, run, tmp_path, state):
    """Step 1 evaluates and trains the parent's weights with a schedule, batches and loops from their beginning."""
    run_dir = tmp_path / "stage"
    changes = "train.steps=3 optim.warmup_steps=1 optim.schedule=wsd optim.decay_steps=1 optim.lr=1e-3".split()
    stage = [*run, f"run.dir={run_dir}", f"start_from={parent}", f"start_from_state={state}", *changes]
    result = train(2, *stage)
    assert result.codes == [0, 0], result.tails
    moments = "moments of the optimizer"
    for line in (
        f"starting from {at(parent, 8)} (step 8, {8 * TOKENS:,} tokens trained), start_from_state={state}",
        f"carried over: weights; router bias{f'; {moments}' if state != 'weights' else ''}\n",
        f"starts over: {f'{moments}; ' if state == 'weights' else ''}step count",
        "optim.schedule 'cosine' -> 'wsd'",
        "the same batches come again; set run.seed",
    ):
        assert line in result.out, result.out
    found = lines(run_dir)
    assert [(line["step"], line["phase"], line["lr"]) for line in found] == [
        (1, "warmup", 1e-3),
        (2, "stable", 1e-3),
        (3, "decay", pytest.approx(1e-4)),
    ]
    assert [line["tokens_total"] - line["tokens"] for line in found] == [8 * TOKENS] * 3
    assert [line["batch_id"] for line in found] == [line["batch_id"] for line in lines(parent)[:3]]
    # The held-out loss before step 1 is the parent's after its last.
    assert lines(run_dir, "eval.jsonl")[0]["heldout_loss"] == lines(parent, "eval.jsonl")[-1]["heldout_loss"]
    steps = read_checkpoint_manifest(at(run_dir, 3)).optimizer["steps"]
    assert steps == (3 if state == "weights" else 11)


def test_adams_moments_make_the_difference_between_the_states(parent, run, tmp_path):
    """One step each, against torch's AdamW by hand: from the same weights and gradients the updates follow from
    moments and bias correction alone."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    for state in ("weights", "weights+moments"):
        arguments = f"train.steps=1 optim.warmup_steps=0 optim.schedule=constant start_from_state={state}".split()
        assert train(1, *run, f"run.dir={tmp_path / state}", f"start_from={parent}", *arguments).codes == [0]
        states[state] = {
            name: torch.frombuffer(bytearray(content), dtype=torch.float32)
            for name, content in tensors_of(at(tmp_path / state, 1)).items()
        }
    before = {
        name: torch.frombuffer(bytearray(content), dtype=torch.float32)
        for name, content in tensors_of(at(parent, 8)).items()
    }
    config = load_config(run[0], run[1:])
    names = [key.removeprefix("parameter/") for key in before if key.startswith("parameter/")]
    name = next(key for key in names if not config.optim.decays(key))  # without weight decay
    b1, b2 = config.optim.beta1, config.optim.beta2
    fresh = states["weights"]
    gradient = fresh[f"exp_avg/{name}"] / (1 - b1)  # the moments began with zeros
    for state, first, second, steps in (
        ("weights", torch.zeros_like(gradient), torch.zeros_like(gradient), 1),
        ("weights+moments", before[f"exp_avg/{name}"], before[f"exp_avg_sq/{name}"], 9),
    ):
        mean = (b1 * first + (1 - b1) * gradient) / (1 - b1**steps)
        square = (b2 * second + (1 - b2) * gradient**2) / (1 - b2**steps)
        expected = before[f"parameter/{name}"] - config.optim.lr * mean / (square.sqrt() + config.optim.eps)
        torch.testing.assert_close(states[state][f"parameter/{name}"], expected, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def quiet(run) -> list[str]:
    """Arguments of a run of three steps without dropout."""
    return [*run, "model.dropout=0.0", "train.steps=3"]


@pytest.fixture(scope="module")
def same(parent, quiet, tmp_path_factory) -> Callable[[str], list[dict]]:
    """The lines of a stage from the middle of the parent, at the parent's layout."""

    @functools.cache
    def train_stage(state: str) -> list[dict]:
        run_dir = tmp_path_factory.mktemp("same") / "run"
        more = [f"start_from={at(parent, 4)}", f"start_from_state={state}", f"train.steps={STEPS_OF[state]}"]
        assert train(2, *quiet, *more, f"run.dir={run_dir}").codes == [0, 0]
        return lines(run_dir)

    return train_stage


STEPS_OF = {"weights": 3, "everything": 7}  # `everything` continues the steps of the parent
LAYOUTS = {
    (4, "parallel.pipe=2 parallel.expert=2"): "weights",
    (2, "parallel.expert=2 parallel.zero=3"): "everything",
    (4, "parallel.expert=4 parallel.zero=3 train.micro_batch=1"): "",
    (1, "train.micro_batch=4"): "",
    (2, "parallel.tensor=2"): "",
}


@pytest.mark.parametrize(
    ("ranks", "layout", "state"),
    [
        pytest.param(*layout, state, marks=() if state == short else pytest.mark.long)
        for layout, short in LAYOUTS.items()
        for state in STEPS_OF
    ],
)
def test_a_stage_gives_the_same_losses_at_every_layout(parent, quiet, same, tmp_path, ranks, layout, state):
    """Other ranks and axes than the parent's: batches equal, losses to the order of sums."""
    more = [f"start_from={at(parent, 4)}", f"start_from_state={state}", f"train.steps={STEPS_OF[state]}"]
    result = train(ranks, *quiet, *more, f"run.dir={tmp_path}", *layout.split(), seconds=900)
    assert result.codes == [0] * ranks, result.tails
    for got, other in zip(lines(tmp_path), same(state), strict=True):
        assert (got["batch_id"], got["n_loops"], got["lr"]) == (other["batch_id"], other["n_loops"], other["lr"])
        assert got["loss"] == pytest.approx(other["loss"], rel=1e-5), layout
        assert got["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), layout


def test_lineage_is_recorded_over_generations(parent, run, tmp_path):
    """Parent, child and grandchild: paths, steps, tokens and settings of each; another batch size and learning rate."""
    child, grandchild = tmp_path / "child", tmp_path / "grandchild"
    changes = ["train.steps=2", "train.global_batch=2", "optim.lr=1e-3", "optim.warmup_steps=0"]
    assert train(1, *run, f"run.dir={child}", f"start_from={at(parent, 6)}", *changes).codes == [0]
    more = [f"run.dir={grandchild}", f"start_from={child}", "start_from_state=weights+moments", "train.steps=2"]
    assert train(1, *run, *more).codes == [0]
    lineage = read_checkpoint_manifest(at(grandchild, 2)).lineage
    assert lineage.tokens == 6 * TOKENS + 2 * TOKENS // 2 + 2 * TOKENS
    assert [(one.path, one.step, one.tokens, one.state) for one in lineage.parents] == [
        (str(at(child, 2).resolve()), 2, 6 * TOKENS + 2 * TOKENS // 2, "weights+moments"),
        (str(at(parent, 6).resolve()), 6, 6 * TOKENS, "weights"),
    ]
    configs = [config_from(one.config) for one in lineage.parents]
    assert [config.optim.lr for config in configs] == [1e-3, 2e-3]
    assert [config.train.global_batch for config in configs] == [2, 4]
    assert lines(grandchild)[-1]["tokens_total"] == lineage.tokens
    shown = run_tool(REPOSITORY / "tools" / "inspect_checkpoint.py", grandchild).out
    tree = [line.strip() for line in shown[shown.index("lineage (tokens") :].splitlines()[1:-1]]
    assert tree == [
        f"{at(parent, 6).resolve()}, step 6, {6 * TOKENS} tokens",
        f"`- weights: {at(child, 2).resolve()}, step 2, {7 * TOKENS} tokens",
        "train.global_batch 4 -> 2",
        "train.steps 8 -> 2",
        "optim.lr 0.002 -> 0.001",
        "optim.warmup_steps 2 -> 0",
        f"`- weights+moments: this checkpoint, step 2, {9 * TOKENS:,} tokens",
        "train.global_batch 2 -> 4",
        "optim.lr 0.001 -> 0.002",
        "optim.warmup_steps 0 -> 2",
    ]


def test_everything_continues_the_data_at_another_batch_size(parent, run, tmp_path):
    """Step 1 of twice the batch reads what the parent's steps 5 and 6 read."""
    from mythos_dist.data.stream import ReplicaStream
    from mythos_dist.train.metrics import batch_id

    stage = [
        f"run.dir={tmp_path}",
        f"start_from={at(parent, 4)}",
        "start_from_state=everything",
        "train.steps=6",
    ]
    result = train(1, *run, *stage, "train.global_batch=8")
    assert result.codes == [0], result.tails
    assert "data order, from sample 16" in result.out
    config = load_config(run[0], run[1:])
    stream = ReplicaStream(
        config.data.path, "train", seq_len=32, vocab_size=512, global_batch=4, micro_batch=4, replica=0,
        num_replicas=1, seed=config.run.seed,
    )  # fmt: skip
    ids = [[int(i) for i in stream.step(step)[0].sample_ids] for step in range(4, 8)]
    assert [line["batch_id"] for line in lines(tmp_path)] == [batch_id(ids[0] + ids[1]), batch_id(ids[2] + ids[3])]


@pytest.fixture(scope="module")
def exportable(run, tmp_path_factory) -> tuple[list[str], Path]:
    """Arguments of a run that has the loops of OpenMythos, and its folder."""
    source = tmp_path_factory.mktemp("exportable") / "run"
    loops = [*run, "model.mode=reference", "model.dropout=0.0", "train.steps=2", "act.mode=reference"]
    assert train(1, *loops, f"run.dir={source}").codes == [0]
    return loops, source


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("safetensors", "fp32"),
        ("open_mythos", "bf16"),
        pytest.param("safetensors", "bf16", marks=pytest.mark.long),
        pytest.param("open_mythos", "fp32", marks=pytest.mark.long),
    ],
)
def test_an_export_starts_a_run_at_any_layout(exportable, tmp_path, form, dtype):
    """Each rank reads its shards of the unsharded tensors; a bf16 export gives the weights rounded to bf16."""
    (loops, source), out = exportable, tmp_path / "weights"
    tool = REPOSITORY / "tools" / "export_checkpoint.py"
    assert run_tool(tool, source, "--out", out, "--format", form, "--dtype", dtype, "--quiet").codes == [0]
    exported = ExportedWeights(out)
    assert (exported.manifest.step, exported.manifest.lineage.tokens) == (2, 2 * TOKENS)
    model, _, _ = load_model(source)
    for name, value in model.state_dict().items():
        kind = "parameter" if "parameter" in exported.manifest.tensors[name].kinds else "buffer"
        read = torch.empty(value.shape)
        exported.read(kind, name, Piece.full(tuple(value.shape)), read.view(-1).numpy())
        torch.testing.assert_close(
            read, value.to(getattr(torch, {"bf16": "bfloat16"}.get(dtype, "float32"))).float(), rtol=0, atol=0
        )
    losses = []
    for ranks, layout in ((1, []), (4, ["parallel.pipe=2", "parallel.tensor=2"])):
        run_dir = tmp_path / str(ranks)
        result = train(ranks, *loops, f"run.dir={run_dir}", f"start_from={out}", *layout)
        assert result.codes == [0] * ranks, result.tails
        losses.append([line["loss"] for line in lines(run_dir)])
        assert lines(run_dir)[0]["tokens_total"] == 3 * TOKENS
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    if dtype == "fp32":
        again = tmp_path / "again"
        assert train(1, *loops, f"run.dir={again}", f"start_from={source}").codes == [0]
        assert [line["loss"] for line in lines(again)] == losses[0]


def refused(result, *words: str) -> None:
    assert set(result.codes) == {2}, (result.codes, result.err)
    assert "Traceback" not in result.err and result.err.startswith("error: "), result.err
    for word in words:
        assert word in result.err, result.err


def test_a_parent_that_does_not_fit_is_refused_with_all_widths(parent, run, tmp_path):
    """By name with both values; settings without tensors may differ. Nothing is written."""
    other = ["model.dim=64", "model.n_experts=4", "model.lora_rank=2", "model.rope_theta=10000", "optim.lr=1e-4"]
    result = train(2, *run, f"run.dir={tmp_path / 'stage'}", f"start_from={parent}", *other)
    refused(result, "model.dim=64", "has 32", "model.n_experts=4", "has 8", "model.lora_rank=2", "has 4")
    assert "rope_theta" not in result.err and "optim.lr" not in result.err
    assert not (tmp_path / "stage").exists()


def test_what_a_parent_cannot_give_is_refused(parent, run, tmp_path):
    """No such path; a run without a checkpoint; moments of an export; a step count beyond the end; a URL."""
    (tmp_path / "empty").mkdir()
    weights = tmp_path / "weights"
    tool = REPOSITORY / "tools" / "export_checkpoint.py"
    assert run_tool(tool, parent, "--out", weights, "--quiet").codes == [0]
    for start_from, more, words in (
        ("nowhere", [], ["start_from=nowhere: no such folder", "give a run.dir"]),
        (str(tmp_path / "empty"), [], ["neither a run with a checkpoint, nor a checkpoint or an export"]),
        (str(weights), ["start_from_state=weights+moments"], ["holds weights only; set start_from_state=weights"]),
        (str(parent), ["optim.name=muon", "start_from_state=weights+moments"], ["has the moments of adamw"]),
        (str(parent), ["start_from_state=everything"], ["train.steps=8", "is at step 8", "raise train.steps above 8"]),
        (
            "https://me:hunter2@host/run",
            [],
            ["start_from=https://***@host/run contains a password or key; leave it out"],
        ),
        ("", ["start_from_state=everything"], ["start_from_state=everything needs start_from"]),
    ):
        refused(train(1, *run, f"run.dir={tmp_path / 'stage'}", f"start_from={start_from}", *more), *words)
    assert not (tmp_path / "stage").exists()


def test_a_damaged_parent_is_named(parent, run, tmp_path):
    """A single checkpoint ends the start; of a run the newest intact one is taken, with a warning."""
    source = tmp_path / "source"
    shutil.copytree(parent, source)
    file = at(source, 8) / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    refused(
        train(2, *run, f"run.dir={tmp_path / 'a'}", f"start_from={at(source, 8)}"),
        str(file),
        "no checkpoint is intact",
    )
    result = train(
        2, *run, f"run.dir={tmp_path / 'b'}", f"start_from={source}", "train.steps=1", "optim.warmup_steps=0"
    )
    assert result.codes == [0, 0], result.tails
    assert f"WARNING: {file}" in result.err and f"starting from {at(source, 6)}" in result.out


def test_an_export_is_refused_where_signatures_are_required(parent, run, tmp_path):
    weights, key = tmp_path / "weights", tmp_path / "key"
    key.write_bytes(b"k" * 32)
    key.chmod(0o600)
    assert run_tool(REPOSITORY / "tools" / "export_checkpoint.py", parent, "--out", weights, "--quiet").codes == [0]
    result = train(1, *run, f"run.dir={tmp_path / 'a'}", f"start_from={weights}", f"checkpoint.key_file={key}")
    refused(result, "an export has no signature")


def test_the_settings_need_no_section(tmp_path):
    """In YAML, on the command line before or after the config, and through config.yaml."""
    file = tmp_path / "config.yaml"
    file.write_text("start_from: runs/a\nstart_from_state: everything\ndata: {path: shards}\nrun: {seed: 3}\n")
    config = load_config(file)
    assert (config.run.start_from, config.run.start_from_state, config.run.seed) == ("runs/a", "everything", 3)
    assert load_config(file, ["start_from=~x", "start_from_state=weights"]).run.start_from == "~x"
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    for wrong, words in (("start_fron=a", "start_fron=a"), ("start_from_state=all", "or 'everything'")):
        with pytest.raises(UserError, match=words):
            load_config(file, [wrong])
    file.write_text("start_fron: runs/a\ndata: {path: shards}\n")
    with pytest.raises(UserError, match=r"did you mean start_from\?"):
        load_config(file)
