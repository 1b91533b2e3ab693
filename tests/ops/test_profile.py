"""Profiles of a run: named ranges, the table of kernels, memory by category; nothing while no profile is recorded."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.launch import train

from mythos_dist.config.load import load_config
from mythos_dist.config.schema import ProfileConfig
from mythos_dist.errors import UserError
from mythos_dist.files import read_json_lines
from mythos_dist.model import Mythos, MythosConfig
from mythos_dist.ops.plan.memory import PARTS as CATEGORIES
from mythos_dist.ops.profile import check_profile
from mythos_dist.ops.profile_table import kernels_by_part, read_trace
from mythos_dist.parallel.ranges import recorded_ranges

SMALL = dict(
    vocab_size=64, dim=16, n_heads=2, n_experts=4, expert_dim=8, max_loop_iters=3, kv_lora_rank=8, q_lora_rank=8,
    qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, prelude_layers=1, coda_layers=1,
)  # fmt: skip
EXACT = ("step", "loss", "grad_norm", "n_loops", "batch_id", "lr", "tokens", "expert_load_max")


def entered_ranges(monkeypatch, work) -> list[str]:
    """The names of all ranges of PyTorch's profiler that `work` enters."""
    names, enter = [], torch.autograd.profiler.record_function.__enter__

    def counted(self):
        names.append(self.name)
        return enter(self)

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd.profiler.record_function, "__enter__", counted)
        work()
    return names


def test_ranges_cost_nothing_while_no_profile_is_recorded(monkeypatch):
    """PyTorch's record_function is not called at all; with a profile, once for each loop and each part of it."""
    model, ids = Mythos(MythosConfig(**SMALL)), torch.randint(0, 64, (1, 8))

    def work():
        model(ids, n_loops=3).sum().backward()

    assert entered_ranges(monkeypatch, work) == []
    with recorded_ranges():
        names = entered_ranges(monkeypatch, work)
    loop = ["attention", "router", "experts", "exchange", "ffn"]  # ffn: the shared experts
    block = ["attention", "ffn"]
    assert names == block + [name for t in range(3) for name in (f"loop {t}", *loop)] + block


def test_kernels_of_backward_passes_are_in_the_part_that_they_belong_to(tmp_path):
    """Products of known sizes: two in one range, one in another, and their four and two gradients."""
    inputs = [torch.randn(size, size, requires_grad=True) for size in (8, 16)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, recorded_ranges():
        with torch.profiler.record_function("attention"):
            first = inputs[0] @ inputs[0] @ inputs[0]
        with torch.profiler.record_function("loop 3"):
            second = inputs[1] @ inputs[1]
        (first.sum() + second.sum()).backward()
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    profile.export_chrome_trace(str(tmp_path / "trace.json.gz"))
    rows = kernels_by_part(read_trace(tmp_path / "trace.json.gz"))
    products = {row.part: row.calls for row in rows if row.kernel == "aten::mm"}
    assert products == {"attention": 2 + 4, "loop": 1 + 2, "other": 1}


@pytest.mark.launch
def test_a_profiled_run_writes_its_files_and_has_the_metrics_of_any_other(settings, tmp_path):
    """Two ranks that share experts: from step 1 on by the file PROFILE, which the run removes, and steps 6 and 7 by
    `run.profile`. Both ranks write; the values of the steps are those of a run without profiles, to the bit."""
    options = [*settings, "parallel.expert=2", "train.steps=8", "train.eval_samples=0"]
    plain, run_dir = tmp_path / "plain", tmp_path / "run"
    assert train(2, *options, f"run.dir={plain}").codes == [0, 0]
    run_dir.mkdir()
    (run_dir / "PROFILE").touch()
    result = train(2, *options, f"run.dir={run_dir}", "run.profile={steps: [6, 7], ranks: [0, 1]}")
    assert result.codes == [0, 0], result.tails
    assert not (run_dir / "PROFILE").exists()
    lines = read_json_lines(run_dir / "metrics.jsonl")
    wanted = {1: "trace", 2: "trace", 3: "trace", 4: "memory", 6: "trace", 7: "trace", 8: "memory"}
    assert {line["step"]: line["profile"] for line in lines if "profile" in line} == wanted
    exact = [[line[key] for key in EXACT] for line in lines]
    assert exact == [[line[key] for key in EXACT] for line in read_json_lines(plain / "metrics.jsonl")]

    for first, rank, steps in ((1, 0, (1, 2, 3)), (6, 0, (6, 7)), (6, 1, (6, 7))):
        prefix = run_dir / "profile" / f"step-{first:08d}" / f"rank-{rank:05d}"
        names = {event.get("name") for event in read_trace(f"{prefix}.trace.json.gz")}
        assert {f"step {step}" for step in steps} | {"loop 0", "attention", "router", "experts", "exchange"} <= names
        table = Path(f"{prefix}.kernels.txt").read_text()
        parts = {line.split()[0] for line in table.splitlines()[3:] if not line.startswith(" ")}
        assert {"attention", "router", "experts", "exchange", "ffn", "head", "optimizer"} <= parts
        memory = json.loads(Path(f"{prefix}.memory.json").read_text())
        assert set(memory["measured_bytes"]) == set(memory["planned_bytes"]) == set(CATEGORIES)
        assert sum(memory["measured_bytes"].values()) == memory["peak_bytes"] > 0
        assert Path(f"{prefix}.memory.png").read_bytes().startswith(b"\x89PNG")
    assert f"profile of steps 6 to 7: {run_dir / 'profile' / 'step-00000006'}" in result.out


def test_impossible_profiles_are_refused(config):
    with pytest.raises(UserError, match="the last step is before the first"):
        ProfileConfig(steps=(12, 10))
    with pytest.raises(UserError, match="more than 50 steps"):
        ProfileConfig(steps=(1, 51))
    run = dataclasses.replace(config.run, profile=ProfileConfig(steps=(1, 2), ranks=(0, 2)))
    with pytest.raises(UserError, match="no rank 2 among 2 ranks; set it to ranks from 0 to 1"):
        check_profile(dataclasses.replace(config, run=run), 2)


def test_the_setting_is_read_from_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("run: {profile: {steps: [10, 12], ranks: [0], memory: false}}\n")
    assert load_config(tmp_path / "c.yaml", ["data.path=none"]).run.profile == ProfileConfig(
        steps=(10, 12), memory=False
    )
