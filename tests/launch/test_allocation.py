"""A layout that does not fit on the nodes is refused, with numbers of nodes that fit."""

import dataclasses
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.selection import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mythos_dist.config.layout import layout_problems
from mythos_dist.config.load import load_config, load_stages
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.ops.cluster.allocation import (
    Allocation,
    check_allocation,
    even_allocation,
    is_completed,
    layout_notes,
    read_hostfile,
)

REPOSITORY = Path(__file__).parents[2]
TINY = str(REPOSITORY / "configs" / "tiny_cpu.yaml")


def config(*overrides: str) -> Config:
    return load_config(TINY, overrides)


def hostfile(tmp_path, text: str):
    (tmp_path / "hostfile").write_text(text)
    return tmp_path / "hostfile"


# Hostfiles


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    """Comments, empty lines, tabs, and text after the number."""
    file = hostfile(tmp_path, "# comment\n\nnode1 slots=8\n  node2\tslots=8 # comment\n#node3 slots=2\n")
    assert read_hostfile(file) == Allocation(nodes=2, ranks_per_node=8)


def test_the_example_is_a_hostfile():
    assert read_hostfile(REPOSITORY / "hostfile.example").ranks == 16


def test_every_wrong_line_is_named(tmp_path):
    file = hostfile(tmp_path, "node1\nnode2 slots=8\nnode2 slots=8\nnode3 slots=0\nnode4 slot=8\n")
    with pytest.raises(UserError) as refused:
        read_hostfile(file)
    problems = refused.value.problems
    for number, words in {
        1: "'node1' is not of the form",
        3: "node2 is listed twice",
        4: "gives no ranks",
    }.items():
        assert any(line.startswith(f"line {number}: ") and words in line for line in problems), words
    assert len(problems) == 4


@pytest.mark.parametrize("text", ["", "# comment\n"])
def test_a_hostfile_without_hosts_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="lists no host; write a line like `node1 slots=8`"):
        read_hostfile(hostfile(tmp_path, text))


def test_a_missing_hostfile_is_named():
    with pytest.raises(UserError, match="the hostfile nowhere cannot be read"):
        read_hostfile("nowhere")


def test_a_host_with_other_slots_is_named(tmp_path):
    file = hostfile(tmp_path, "node1 slots=8\nnode2 slots=4\nnode3 slots=8\n")
    with pytest.raises(UserError) as refused:
        read_hostfile(file)
    (problem,) = refused.value.problems
    for words in ("node2 has slots=4", "node1 and 1 more have slots=8", "remove node2", "set all to 4"):
        assert words in problem


# Ranks on nodes


def test_ranks_that_cannot_be_distributed_evenly_are_refused():
    assert even_allocation(8, 2) == Allocation(2, 4)
    with pytest.raises(UserError, match=r"7 ranks on 2 nodes.*one of \[6, 8\]"):
        even_allocation(7, 2)
    with pytest.raises(UserError, match="0 ranks on 0 nodes: give at least one of each"):
        even_allocation(0, 0)


def test_more_ranks_than_gpus_on_a_node_are_refused():
    with pytest.raises(UserError, match=r"8 ranks per node, but only 4 GPUs.*set the ranks per node to 4"):
        even_allocation(16, 2, gpus_per_node=4)
    assert even_allocation(16, 4, gpus_per_node=4).gpus_per_node == 4


def test_a_layout_that_does_not_fit_is_refused_with_the_nearest_numbers_of_nodes():
    with pytest.raises(UserError) as refused:
        check_allocation([config("parallel.tensor=2")], Allocation(3, 4), TINY)
    assert (
        refused.value.problems[-1]
        == "3 nodes x 4 ranks = 12 ranks do not fit; set the number of nodes to one of [2, 4]"
    )
    assert "train.global_batch=8" in refused.value.problems[0]


def test_more_ranks_than_a_layout_can_use_are_refused_with_the_maximum():
    """tiny_cpu: 8 sequences per step in micro-batches of 1, so 8 replicas."""
    with pytest.raises(UserError, match=r"64 ranks do not fit, and this layout can use at most 16.*nodes to 2"):
        check_allocation([config("parallel.pipe=2")], Allocation(8, 8), TINY)


def test_a_layout_that_fits_on_no_number_of_nodes_is_refused():
    with pytest.raises(UserError, match="no number of nodes with 5 ranks each does"):
        check_allocation([config("parallel.tensor=2")], Allocation(2, 5), TINY)


def staged(tmp_path, *stages: str) -> list[Config]:
    """The configs of stages a, b, ... with these layouts."""
    entries = [f"{{name: {name}, steps: 2, {layout}}}" for name, layout in zip("abc", stages, strict=False)]
    (tmp_path / "stages.yaml").write_text(f"base: {TINY}\nstages: [{', '.join(entries)}]\n")
    return load_stages(tmp_path / "stages.yaml")


def test_every_stage_is_checked_and_the_proposed_number_of_nodes_fits_all(tmp_path):
    """Of pipe=2 x 8 replicas and tensor=4 x 8 replicas: 1 to 16 and 1 to 32 ranks."""
    pipe, tensor = "parallel: {pipe: 2}", "parallel: {tensor: 4}"
    for stages in ((pipe, tensor), (tensor, pipe)):
        with pytest.raises(UserError) as refused:
            check_allocation(staged(tmp_path, *stages), Allocation(1, 2), TINY)
        problem, advice = refused.value.problems
        assert problem.startswith(f"stage {'ab'[stages.index(tensor)]}: the number of ranks, 2, is not divisible by")
        assert advice == "1 node x 2 ranks = 2 ranks do not fit; set the number of nodes to 2"
    with pytest.raises(UserError) as refused:
        check_allocation(staged(tmp_path, tensor, pipe), Allocation(32, 1), TINY)
    assert refused.value.problems[-1] == (
        "32 nodes x 1 rank = 32 ranks do not fit, and the layout of stage b can use at most 16 (parallel.pipe x "
        "parallel.tensor x train.global_batch / train.micro_batch); set the number of nodes to 16"
    )


def test_a_problem_or_note_of_all_stages_is_reported_once(tmp_path):
    pipe, tensor = "parallel: {pipe: 2}", "parallel: {tensor: 4}"
    with pytest.raises(UserError) as refused:
        check_allocation(staged(tmp_path, pipe, pipe), Allocation(3, 4), TINY)
    assert len(refused.value.problems) == 2 and "stage" not in str(refused.value)
    stages = staged(tmp_path, pipe, tensor)
    idle, wide = check_allocation(stages, Allocation(2, 2, gpus_per_node=3), TINY)
    assert idle == "3 GPUs per node, but 2 ranks: 1 GPU of each node stays idle"
    assert wide.startswith("stage b: parallel.tensor=4 is more than the 2 ranks of a node")


@settings(max_examples=examples(30))
@given(
    nodes=st.integers(1, 20),
    ranks_per_node=st.integers(1, 8),
    tensor=st.sampled_from([1, 2, 4]),
    pipe=st.integers(1, 3),
    expert=st.sampled_from([1, 2, 4]),
    batch=st.sampled_from([4, 8, 24, 96]),
)
@pytest.mark.launch
def test_proposed_numbers_of_nodes_are_the_nearest_that_fit(nodes, ranks_per_node, tensor, pipe, expert, batch):
    """Compared with a search over all numbers of nodes."""
    layout = f"parallel.tensor={tensor} parallel.pipe={pipe} parallel.expert={expert} train.global_batch={batch}"
    one = config(*layout.split())

    def fits(n: int) -> bool:
        return not layout_problems(one, n * ranks_per_node)

    assume(not fits(nodes))
    with pytest.raises(UserError) as refused:
        check_allocation([one], Allocation(nodes, ranks_per_node), TINY)
    last = refused.value.problems[-1]
    proposed = {int(n) for n in last.partition("set the number of nodes to ")[2].strip("one f[]").split(", ") if n}
    working = [n for n in range(1, batch * tensor * pipe + 1) if fits(n)]
    below, above = [n for n in working if n < nodes][-1:], [n for n in working if n > nodes][:1]
    assert proposed == {*below, *above}


# Notes


@pytest.mark.parametrize(
    ("overrides", "allocation", "words"),
    [
        ("parallel.pipe=3 train.global_batch=12", Allocation(3, 4), "pipe x parallel.tensor=3 and 4 ranks per node"),
        ("parallel.pipe=3 parallel.tensor=2", Allocation(3, 8), "span 2 nodes where 1 would do"),
        ("parallel.tensor=4", Allocation(4, 6), "parallel.tensor=4 and 6 ranks per node"),
        ("parallel.tensor=4", Allocation(4, 2), "parallel.tensor=4 is more than the 2 ranks of a node"),
        ("", Allocation(2, 2, gpus_per_node=4), "2 GPUs of each node stay idle"),
    ],
)
def test_an_inefficient_layout_is_noted(overrides, allocation, words):
    (note,) = layout_notes(config(*overrides.split()), allocation)
    assert words in note


@pytest.mark.parametrize(
    ("overrides", "allocation"),
    [
        ("parallel.tensor=2 parallel.pipe=2", Allocation(2, 4)),
        ("parallel.tensor=2 parallel.pipe=4", Allocation(4, 4)),  # a replica needs two nodes and has two
        ("parallel.pipe=3", Allocation(1, 6)),  # one node
        ("", Allocation(2, 4, gpus_per_node=4)),
    ],
)
def test_an_efficient_layout_has_no_notes(overrides, allocation):
    assert layout_notes(config(*overrides.split()), allocation) == []


# Is the run completed?


def completed_run(tmp_path, step: int) -> Config:
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
    (run_dir / "COMPLETED").touch()
    return config(f"run.dir={run_dir}", "train.steps=20")


def test_a_run_with_a_completed_file_is_completed(tmp_path):
    assert is_completed(completed_run(tmp_path, step=20))
    (tmp_path / "run" / "COMPLETED").unlink()
    assert not is_completed(completed := config(f"run.dir={tmp_path}/run")), completed


def test_a_run_with_a_completed_file_is_not_completed_after_train_steps_was_raised(tmp_path):
    """Before the new start has removed the file."""
    one = completed_run(tmp_path, step=20)
    more = dataclasses.replace(one, train=dataclasses.replace(one.train, steps=40))
    assert not is_completed(more)


def test_a_run_without_checkpoints_is_completed(tmp_path):
    one = completed_run(tmp_path, step=20)
    (tmp_path / "run" / "checkpoints" / "latest").unlink()
    assert is_completed(one)


# The command that launch scripts run


def run_allocation(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mythos_dist.ops.cluster.allocation", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_the_command_prints_only_the_run_folder():
    """Options and settings in any order; notes go to standard error."""
    done = run_allocation(TINY, "--ranks", "8", "run.dir=runs/x y", "--nodes", "4", "parallel.tensor=4")
    assert (done.returncode, done.stdout) == (0, "runs/x y\n")
    assert done.stderr.startswith("note: parallel.tensor=4")


def test_the_command_refuses_a_later_stage_that_does_not_fit(tmp_path):
    """The launch scripts run it before they start ranks."""
    staged(tmp_path, "parallel: {tensor: 1}", "parallel: {tensor: 4}")
    done = run_allocation(str(tmp_path / "stages.yaml"), "--ranks", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "stage b: the number of ranks, 2, is not divisible by" in done.stderr
    done = run_allocation(str(tmp_path / "stages.yaml"), "--ranks", "4", "run.dir=runs/x")
    assert (done.returncode, done.stdout) == (0, "runs/x\n")


def test_the_command_reports_errors_of_config_and_hostfile_together(tmp_path):
    file = hostfile(tmp_path, "node1 slots=8\nnode2\n")
    done = run_allocation(TINY, "model.dimm=3", "--hostfile", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean model.dim?" in done.stderr
    assert f"{file}: line 2: 'node2' is not of the form" in done.stderr


def test_the_command_writes_the_config_with_overrides(tmp_path):
    file = tmp_path / "config.yaml"
    assert (
        run_allocation(TINY, "train.steps=7", "data.mix={a: 1, b: 2}", 'data.path=""', "--write", str(file)).returncode
        == 0
    )
    assert load_config(file) == load_config(TINY, ["train.steps=7", "data.mix={a: 1, b: 2}", 'data.path=""'])


def test_the_exit_code_of_completed(tmp_path):
    completed_run(tmp_path, step=20)
    assert run_allocation(TINY, f"run.dir={tmp_path}/run", "--completed").returncode == 0
    assert run_allocation(TINY, f"run.dir={tmp_path}/run", "train.steps=21", "--completed").returncode == 1


def test_the_command_does_not_import_torch():
    """It runs while GPUs are idle: at most 2 s of CPU time."""
    modules = "mythos_dist.ops.cluster.allocation, mythos_dist.ops.cluster.status"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=240).returncode == 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run_allocation(TINY, "--ranks", "8").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
