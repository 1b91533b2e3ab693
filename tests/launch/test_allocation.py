"""A layout against the nodes that it gets: refused with numbers that work, before anything is started."""

import dataclasses
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mythos_dist.config.layout import layout_problems
from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.ops.cluster.allocation import (
    Allocation,
    check_allocation,
    even_allocation,
    is_finished,
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
    """Comments, empty lines, tabs, and whatever stands behind the number."""
    file = hostfile(tmp_path, "# ours\n\nnode1 slots=8\n  node2\tslots=8 # the loud one\n#node3 slots=2\n")
    assert read_hostfile(file) == Allocation(nodes=2, ranks_per_node=8)


def test_the_example_is_a_hostfile():
    assert read_hostfile(REPOSITORY / "hostfile.example").ranks == 16


def test_every_line_that_is_wrong_is_named(tmp_path):
    file = hostfile(tmp_path, "node1\nnode2 slots=8\nnode2 slots=8\nnode3 slots=0\nnode4 slot=8\n")
    with pytest.raises(UserError) as refused:
        read_hostfile(file)
    problems = refused.value.problems
    for number, words in {
        1: "'node1' is not of the form",
        3: "node2 stands there a second time",
        4: "gives no rank",
    }.items():
        assert any(line.startswith(f"line {number}: ") and words in line for line in problems), words
    assert len(problems) == 4


@pytest.mark.parametrize("text", ["", "# nobody\n"])
def test_a_hostfile_without_hosts_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="names no host; write a line like `node1 slots=8`"):
        read_hostfile(hostfile(tmp_path, text))


def test_a_hostfile_that_is_not_there_is_named():
    with pytest.raises(UserError, match="the hostfile nowhere cannot be read"):
        read_hostfile("nowhere")


def test_a_host_with_other_slots_is_named_with_both_numbers_and_a_remedy(tmp_path):
    file = hostfile(tmp_path, "node1 slots=8\nnode2 slots=4\nnode3 slots=8\n")
    with pytest.raises(UserError) as refused:
        read_hostfile(file)
    (problem,) = refused.value.problems
    for words in ("node2 has slots=4", "node1 and 1 more have slots=8", "leave node2 out", "set all to 4"):
        assert words in problem


# Ranks on nodes


def test_ranks_are_dealt_out_evenly_or_refused_with_numbers_that_can_be():
    assert even_allocation(8, 2) == Allocation(2, 4)
    with pytest.raises(UserError, match=r"7 ranks on 2 nodes.*one of \[6, 8\]"):
        even_allocation(7, 2)
    with pytest.raises(UserError, match="0 ranks on 0 nodes: give at least one of each"):
        even_allocation(0, 0)


def test_a_rank_without_a_gpu_of_its_own_is_refused():
    with pytest.raises(UserError, match=r"8 ranks per node, but a node gives 4 GPUs.*set the ranks per node to 4"):
        even_allocation(16, 2, gpus_per_node=4)
    assert even_allocation(16, 4, gpus_per_node=4).gpus_per_node == 4


def test_a_layout_that_does_not_fit_is_refused_with_the_next_numbers_of_nodes_that_do():
    with pytest.raises(UserError) as refused:
        check_allocation(config("parallel.tensor=2"), Allocation(3, 4), TINY)
    assert (
        refused.value.problems[-1]
        == "3 nodes x 4 ranks = 12 ranks do not fit; set the number of nodes to one of [2, 4]"
    )
    assert "train.global_batch=8" in refused.value.problems[0]


def test_more_ranks_than_a_layout_can_use_are_said_so():
    """tiny_cpu: 8 sequences a step in micro-batches of 1, so 8 replicas."""
    with pytest.raises(UserError, match=r"64 ranks do not fit, and this layout can use 16 at most.*nodes to 2"):
        check_allocation(config("parallel.pipe=2"), Allocation(8, 8), TINY)


def test_where_no_number_of_nodes_fits_that_is_said():
    with pytest.raises(UserError, match="no number of nodes with 5 ranks each does"):
        check_allocation(config("parallel.tensor=2"), Allocation(2, 5), TINY)


@settings(max_examples=30)
@given(
    nodes=st.integers(1, 20),
    ranks_per_node=st.integers(1, 8),
    tensor=st.sampled_from([1, 2, 4]),
    pipe=st.integers(1, 3),
    expert=st.sampled_from([1, 2, 4]),
    batch=st.sampled_from([4, 8, 24, 96]),
)
def test_numbers_of_nodes_that_are_proposed_fit_and_none_nearer_does(
    nodes, ranks_per_node, tensor, pipe, expert, batch
):
    """Against trying every number up to the batch's largest use."""
    layout = f"parallel.tensor={tensor} parallel.pipe={pipe} parallel.expert={expert} train.global_batch={batch}"
    one = config(*layout.split())

    def fits(n: int) -> bool:
        return not layout_problems(one, n * ranks_per_node)

    assume(not fits(nodes))
    with pytest.raises(UserError) as refused:
        check_allocation(one, Allocation(nodes, ranks_per_node), TINY)
    last = refused.value.problems[-1]
    proposed = {int(n) for n in last.partition("set the number of nodes to ")[2].strip("one f[]").split(", ") if n}
    working = [n for n in range(1, batch * tensor * pipe + 1) if fits(n)]
    below, above = [n for n in working if n < nodes][-1:], [n for n in working if n > nodes][:1]
    assert proposed == {*below, *above}


# What works and wastes


@pytest.mark.parametrize(
    ("overrides", "allocation", "words"),
    [
        ("parallel.pipe=3 train.global_batch=12", Allocation(3, 4), "pipe x parallel.tensor=3 and 4 ranks per node"),
        ("parallel.pipe=3 parallel.tensor=2", Allocation(3, 8), "lie on 2 nodes where 1 would do"),
        ("parallel.tensor=4", Allocation(4, 6), "parallel.tensor=4 and 6 ranks per node"),
        ("parallel.tensor=4", Allocation(4, 2), "parallel.tensor=4 is more than the 2 ranks of a node"),
        ("", Allocation(2, 2, gpus_per_node=4), "2 GPUs of each node stay idle"),
    ],
)
def test_what_wastes_is_noted(overrides, allocation, words):
    (note,) = layout_notes(config(*overrides.split()), allocation)
    assert words in note


@pytest.mark.parametrize(
    ("overrides", "allocation"),
    [
        ("parallel.tensor=2 parallel.pipe=2", Allocation(2, 4)),
        ("parallel.tensor=2 parallel.pipe=4", Allocation(4, 4)),  # a replica needs two nodes and has two
        ("parallel.pipe=3", Allocation(1, 6)),  # there is no network
        ("", Allocation(2, 4, gpus_per_node=4)),
    ],
)
def test_nothing_is_noted_where_groups_lie_as_close_as_they_can(overrides, allocation):
    assert layout_notes(config(*overrides.split()), allocation) == []


# Is the run done?


def finished_run(tmp_path, step: int) -> Config:
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
    (run_dir / "COMPLETED").touch()
    return config(f"run.dir={run_dir}", "train.steps=20")


def test_a_run_is_done_by_its_marker(tmp_path):
    assert is_finished(finished_run(tmp_path, step=20))
    (tmp_path / "run" / "COMPLETED").unlink()
    assert not is_finished(finished := config(f"run.dir={tmp_path}/run")), finished


def test_a_marker_of_fewer_steps_than_are_asked_for_now_says_nothing(tmp_path):
    """train.steps was raised, and the new start has not come far enough to take the marker away."""
    one = finished_run(tmp_path, step=20)
    more = dataclasses.replace(one, train=dataclasses.replace(one.train, steps=40))
    assert not is_finished(more)


def test_a_done_run_without_its_checkpoints_is_done(tmp_path):
    one = finished_run(tmp_path, step=20)
    (tmp_path / "run" / "checkpoints" / "latest").unlink()
    assert is_finished(one)


# The command that launch scripts ask


def ask(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mythos_dist.ops.cluster.allocation", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_the_command_prints_the_run_folder_alone():
    """Options and settings in any order; notes go to standard error."""
    done = ask(TINY, "--ranks", "8", "run.dir=runs/x y", "--nodes", "4", "parallel.tensor=4")
    assert (done.returncode, done.stdout) == (0, "runs/x y\n")
    assert done.stderr.startswith("note: parallel.tensor=4")


def test_the_command_names_mistakes_of_config_and_hosts_together(tmp_path):
    file = hostfile(tmp_path, "node1 slots=8\nnode2\n")
    done = ask(TINY, "model.dimm=3", "--hostfile", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean model.dim?" in done.stderr
    assert f"{file}: line 2: 'node2' is not of the form" in done.stderr


def test_the_command_writes_the_whole_config(tmp_path):
    file = tmp_path / "config.yaml"
    assert ask(TINY, "train.steps=7", "data.mix={a: 1, b: 2}", 'data.path=""', "--write", str(file)).returncode == 0
    assert load_config(file) == load_config(TINY, ["train.steps=7", "data.mix={a: 1, b: 2}", 'data.path=""'])


def test_the_command_says_by_its_exit_code_if_a_run_is_done(tmp_path):
    finished_run(tmp_path, step=20)
    assert ask(TINY, f"run.dir={tmp_path}/run", "--finished").returncode == 0
    assert ask(TINY, f"run.dir={tmp_path}/run", "train.steps=21", "--finished").returncode == 1


def test_the_command_answers_without_torch():
    """It runs while GPUs wait. In processor time, of which other processes take none."""
    modules = "mythos_dist.ops.cluster.allocation, mythos_dist.ops.cluster.status"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=240).returncode == 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ask(TINY, "--ranks", "8").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
