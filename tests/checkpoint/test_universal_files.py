"""Files of universal checkpoints: bit-equal both ways; what is lost is named; wrong and hostile content is refused."""

import importlib.metadata
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.huggingface import WIDTHS
from helpers.selection import first_is_quick

from mythos_dist.checkpoint.averaged import AverageOf
from mythos_dist.checkpoint.canonical import write_full_tensors
from mythos_dist.checkpoint.manifest import CheckpointManifest, Lineage, TensorEntry, library_versions
from mythos_dist.checkpoint.restore import open_checkpoint
from mythos_dist.checkpoint.torch_file import Placeholder, read_torch_file
from mythos_dist.checkpoint.universal import MODEL_STATES, export_universal
from mythos_dist.checkpoint.universal_import import find_universal, import_universal
from mythos_dist.config.schema import AverageConfig, Config, MythosConfig, OptimConfig, TrainConfig
from mythos_dist.errors import UserError
from mythos_dist.model import Mythos

STEP = 7
CONFIG = Config(model=MythosConfig(**WIDTHS), train=TrainConfig(steps=20, global_batch=4, micro_batch=4, seq_len=16))
A_PARAMETER = "recurrent.block.ffn.experts.w1"
BIAS = "recurrent.block.ffn.router.bias"


def save(run_dir: Path, config: Config = CONFIG, **changes: Any) -> Path:
    """A run with one checkpoint of drawn values, with the kinds of tensors that its settings lead to."""
    draw, values = np.random.default_rng(0), {}
    model = Mythos(config.model)
    tensors = {}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        is_parameter = isinstance(value, torch.nn.Parameter)
        moments = ("momentum_buffer",) if config.optim.uses_muon(name) else ("exp_avg", "exp_avg_sq")
        kinds = ("parameter", *moments) if is_parameter else ("buffer",)
        kinds += ("average",) if config.average.kind != "off" else ()
        tensors[name] = TensorEntry(tuple(value.shape), kinds)
        for kind in kinds:
            values[kind, name] = draw.standard_normal(value.shape, np.float32)
    fields = dict(step=STEP, tokens=448, start=1, layout={}, config=asdict(config), data="", tensors=tensors, files={})
    fields["optimizer"] = {"steps": 6, "skipped_steps": 1, "loss_scale": {}}
    fields |= {"versions": library_versions(), "lineage": Lineage(tokens=448)} | changes

    def blocks(kind: str, name: str) -> Iterator[memoryview]:
        yield values[kind, name].reshape(-1).data

    write_full_tensors(run_dir, CheckpointManifest(**fields), blocks, workers=1)
    return run_dir


def exported(tmp_path: Path, config: Config = CONFIG, **options: Any) -> tuple[Path, list[str]]:
    """The folder that DeepSpeed reads, and the notes."""
    notes: list[str] = []
    changes = options.pop("changes", {})
    source = open_checkpoint(save(tmp_path / "run", config, **changes))
    return export_universal(source, tmp_path / "out", report=notes.append, **options), notes


def imported(folder: Path, run_dir: Path, **changes: Any) -> tuple[Any, list[str]]:
    """The checkpoint, and the notes."""
    config = replace(CONFIG, run=replace(CONFIG.run, dir=str(run_dir)), **changes)
    notes: list[str] = []
    import_universal(folder, config, report=notes.append)
    return open_checkpoint(run_dir), notes


@pytest.mark.parametrize("prefix", first_is_quick(["", "model.", "module.model."]))
def test_an_export_that_is_imported_has_every_bit(prefix, tmp_path):
    """Also where the module of the program holds ours under a name."""
    folder, _ = exported(tmp_path, prefix=prefix)
    assert (folder / "zero" / f"{prefix}{A_PARAMETER}" / "fp32.pt").is_file()
    again, _ = imported(folder.parent, tmp_path / "again")
    source = open_checkpoint(tmp_path / "run")
    assert again.manifest.tensors == source.manifest.tensors
    for name, tensor in source.manifest.tensors.items():
        for kind in tensor.kinds:
            assert np.array_equal(again.full_tensor(kind, name), source.full_tensor(kind, name)), (kind, name)
    assert (again.manifest.step, again.manifest.optimizer["steps"], again.manifest.optimizer["skipped_steps"]) == (
        7,
        6,
        1,
    )
    assert again.manifest.lineage.next_sample == STEP * 4 and again.manifest.tokens == STEP * 4 * 16


@pytest.mark.launch
def test_every_file_loads_without_running_anything(tmp_path):
    """DeepSpeed unpickles them; torch's weights_only needs no class that it does not have."""
    folder, _ = exported(tmp_path, learning_rate=0.25)
    files = list(folder.rglob("*.pt"))
    assert len(files) == 4 * sum(1 for _ in Mythos(CONFIG.model).parameters()) + 1 + len(MODEL_STATES)
    content = {file.name: torch.load(file, weights_only=True) for file in files}
    groups = content["optimizer_state.pt"]["param_groups"]
    assert len(groups) > 64 and all(group == {"lr": 0.25} for group in groups)
    assert content["optimizer_state.pt"]["optimizer_state_dict"]["param_groups"] == [{"lr": 0.25}]
    assert content[MODEL_STATES[0]]["ds_version"] == importlib.metadata.version("deepspeed")
    assert (folder.parent / "latest_universal").read_text() == folder.name == "global_step7_universal"


@pytest.mark.parametrize(
    ("config", "changes", "note"),
    [
        (replace(CONFIG, optim=OptimConfig(name="muon")), {}, "Muon's momentum is lost"),
        (replace(CONFIG, average=AverageConfig(kind="ema")), {"average_samples": 3}, "average of 3 snapshots"),
        (
            replace(CONFIG, train=replace(CONFIG.train, dtype="fp16")),
            {"loss_scale": {"cur_scale": 1024.0}},
            "initial_scale_power=10",
        ),
        (CONFIG, {}, "set the router's bias"),
        (CONFIG, {}, "28 samples in 7 steps"),
        (CONFIG, {}, "weight decay 0.1 for matrices"),
    ],
)
@pytest.mark.launch
def test_what_an_export_loses_is_named(config, changes, note, tmp_path):
    optimizer = {"steps": 6, "skipped_steps": 1, "loss_scale": {}} | changes
    folder, notes = exported(tmp_path, config, changes={"optimizer": optimizer})
    assert any(note in line for line in notes), notes
    steps = torch.load(folder / "zero" / A_PARAMETER / "step.pt")
    moments = torch.load(folder / "zero" / A_PARAMETER / "exp_avg.pt")["param"]
    begins_anew = config.optim.name == "muon"
    assert steps == (0 if begins_anew else 6) and bool(moments.any()) != begins_anew


@pytest.mark.launch
def test_an_average_is_exported_without_moments(tmp_path):
    config = replace(CONFIG, average=AverageConfig(kind="ema"))
    optimizer = {"steps": 6, "skipped_steps": 0, "loss_scale": {}, "average_samples": 3}
    source = open_checkpoint(save(tmp_path / "run", config, optimizer=optimizer))
    notes: list[str] = []
    folder = export_universal(AverageOf(source), tmp_path / "out", report=notes.append)
    value = torch.load(folder / "zero" / A_PARAMETER / "fp32.pt")["param"]
    assert np.array_equal(value.numpy(), source.full_tensor("average", A_PARAMETER))
    assert torch.load(folder / "zero" / A_PARAMETER / "step.pt") == 0
    assert any("no moments" in line for line in notes) and not any("--average" in line for line in notes)


@pytest.mark.launch
def test_what_an_import_loses_is_named(tmp_path):
    folder, _ = exported(tmp_path, learning_rate=0.25)
    shutil.rmtree(folder / "zero" / "norm.weight")
    (folder / "zero" / "norm.weight").mkdir()
    torch.save({"param": torch.ones(32)}, folder / "zero" / "norm.weight" / "fp32.pt")  # no gradient, so no moments
    for file in MODEL_STATES:
        states = torch.load(folder / file)
        torch.save(states | {"module": {}, "global_samples": 1000}, folder / file)
    again, notes = imported(folder, tmp_path / "again")
    for note in (
        "without moments, which begin with zeros: 1 tensor: norm.weight",
        "DeepSpeed's was 0.25",
        "had read 1,000 samples; the run continues after sample 28",
        f"{BIAS} is not in the checkpoint",
    ):
        assert any(note in line for line in notes), notes
    assert not again.full_tensor("exp_avg", "norm.weight").any() and not again.full_tensor("buffer", BIAS).any()


@pytest.mark.launch
def test_weights_without_moments_are_imported_as_such(tmp_path):
    folder, _ = exported(tmp_path)
    for file in [*folder.rglob("exp_avg.pt"), *folder.rglob("exp_avg_sq.pt"), *folder.rglob("step.pt")]:
        file.unlink()
    again, notes = imported(folder, tmp_path / "again")
    assert again.manifest.tensors[A_PARAMETER].kinds == ("parameter",) and again.manifest.optimizer["steps"] == 0
    assert any("no moments of Adam" in line for line in notes)


@pytest.mark.launch
def test_a_checkpoint_that_does_not_fit_is_refused_with_all_mismatches(tmp_path):
    folder, _ = exported(tmp_path)
    zero = folder / "zero"
    torch.save({"param": torch.zeros(5)}, zero / "norm.weight" / "fp32.pt")
    torch.save({"param": torch.zeros(3, 2)}, zero / A_PARAMETER / "exp_avg.pt")
    with pytest.raises(UserError) as raised:
        imported(folder, tmp_path / "again")
    for message in ("norm.weight/fp32.pt: has shape [5] instead of [32]", "exp_avg.pt: has shape [3, 2] instead of"):
        assert message in str(raised.value)
    shutil.move(zero / "norm.weight", zero / "norm.scale")
    with pytest.raises(UserError, match=r"missing 1 tensor: norm.weight[\s\S]*unknown 1 tensor: norm.scale"):
        imported(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.launch
def test_settings_that_do_not_go_with_it_are_refused_together(tmp_path):
    folder, _ = exported(tmp_path)
    train = replace(CONFIG.train, steps=STEP)
    with pytest.raises(UserError) as raised:
        imported(folder, tmp_path / "again", train=train, optim=OptimConfig(name="muon"))
    assert "optim.name=muon, but these are the moments of AdamW" in str(raised.value)
    assert "train.steps=7, but the checkpoint is of step 7; raise train.steps" in str(raised.value)


@pytest.mark.launch
def test_other_folders_are_refused_with_what_to_do(tmp_path):
    folder, _ = exported(tmp_path)
    assert find_universal(folder.parent) == find_universal(folder) == folder
    zero = tmp_path / "zero checkpoint"
    zero.mkdir()
    (zero / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(UserError, match=r"python -m deepspeed\.checkpoint\.ds_to_universal"):
        find_universal(zero)
    with pytest.raises(UserError, match="no such folder"):
        find_universal(tmp_path / "missing")
    with pytest.raises(UserError, match=r"neither zero/ nor latest_universal"):
        find_universal(tmp_path)
    for name in ("../out/global_step7_universal", "..", "missing", ""):
        (folder.parent / "latest_universal").write_text(name)
        with pytest.raises(UserError, match="which is not a universal checkpoint here"):
            find_universal(folder.parent)
    with pytest.raises(UserError, match="exists; name a new folder"):
        export_universal(open_checkpoint(tmp_path / "run"), tmp_path / "out")
    (folder / "zero" / "optimizer_state.pt").unlink()
    with pytest.raises(UserError, match=r"optimizer_state.pt: is missing"):
        imported(folder, tmp_path / "again")


@pytest.mark.launch
def test_different_counts_of_steps_are_refused(tmp_path):
    folder, _ = exported(tmp_path)
    torch.save(torch.tensor(5.0), folder / "zero" / A_PARAMETER / "step.pt")
    with pytest.raises(UserError, match="different counts of Adam's steps"):
        imported(folder, tmp_path / "again")


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.file)!r}, 'w').close()",)


def test_nothing_in_a_file_is_run(tmp_path):
    """Where only tensors belong, an object of another class is refused; elsewhere it becomes a placeholder."""
    folder, _ = exported(tmp_path)
    mark, parameter = tmp_path / "mark", folder / "zero" / "norm.weight" / "fp32.pt"
    optimizer, weights = folder / "zero" / "optimizer_state.pt", parameter.read_bytes()
    for file in (optimizer, folder / MODEL_STATES[0]):
        content = torch.load(file)
        torch.save(content | {"harm": Harmful(mark)}, file)
        assert isinstance(read_torch_file(file, placeholders=True)["harm"], Placeholder)
    imported(folder, tmp_path / "again")
    torch.save({"param": torch.zeros(32), "harm": Harmful(mark)}, parameter)
    with pytest.raises(UserError, match=r"cannot be read as a file of torch\.save"):
        imported(folder, tmp_path / "refused")
    with parameter.open("wb") as stream:
        pickle.dump({"param": Harmful(mark)}, stream)
    with pytest.raises(UserError, match="not a zip archive"):
        imported(folder, tmp_path / "refused")
    parameter.write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="not a zip archive, or truncated"):
        imported(folder, tmp_path / "refused")
    assert not mark.exists() and not (tmp_path / "refused").exists()
    with open(parameter, "wb") as stream:  # the test would notice a reader that runs it
        torch.save(Harmful(mark), stream)
    torch.load(parameter, weights_only=False)
    assert mark.exists()


@pytest.mark.launch
def test_a_small_file_does_not_become_large(tmp_path):
    """Compressed members, and a tensor whose elements are one element, many times."""
    folder, _ = exported(tmp_path)
    parameter = folder / "zero" / "norm.weight" / "fp32.pt"
    torch.save({"param": torch.zeros(1).expand(1 << 40)}, parameter)
    with pytest.raises(UserError, match=r"has shape \[1099511627776\] instead of \[32\]"):
        imported(folder, tmp_path / "again")
    torch.save({"param": torch.zeros(32)}, parameter)
    with zipfile.ZipFile(parameter) as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(parameter, "w", zipfile.ZIP_DEFLATED) as compressed:
        for name, content in members.items():
            compressed.writestr(name, content)
    with pytest.raises(UserError, match="compressed members"):
        imported(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()
