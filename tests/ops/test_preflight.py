"""Preflight: problems found in the reports of nodes, and corrupt messages."""

import pytest
from helpers.launch import train

from mythos_dist.errors import NodeError, UserError
from mythos_dist.ops.preflight import NodeReport, find_problems, raise_problems
from mythos_dist.train.run_folder import take_over

USUAL = NodeReport("", clock=100.0, problems=[], sees_probe=True, gpus="8 x H100", infiniband="8 active ports")


def reports(**changes) -> list[NodeReport]:
    """Of four nodes with two ranks each; `changes` by node."""
    return [USUAL._replace(node=node, **changes.get(node, {})) for node in ("n1", "n2", "n3", "n4") for _ in range(2)]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"clock": 107.5}, "its clock is off by +7.5 s; start its time service"),
        ({"sees_probe": False}, "files that n1 writes in run.dir are not visible; set run.dir to a shared folder"),
        ({"gpus": "7 x H100"}, "it has 7 x H100, other nodes have 8 x H100"),
        ({"infiniband": "6 active ports"}, "it has 6 active ports, other nodes have 8 active ports"),
        ({"problems": ["disk"]}, "disk"),
    ],
)
def test_a_single_bad_node_is_named_with_what_to_do(changed, words):
    problems = find_problems(reports(n3=changed), clock_skew=5)
    assert [(node, words in text) for node, text in problems] == [("n3", True)]
    with pytest.raises(NodeError) as refused:
        raise_problems(problems, reports())
    assert refused.value.nodes == ["n3"] and refused.value.exit_code == 3


def test_a_problem_of_all_nodes_is_a_user_error():
    """A disk that is full on every node, and a run folder on a disk of the first node: no node is at fault."""
    full = {f"n{i}": {"problems": ["disk"]} for i in (1, 2, 3, 4)}
    with pytest.raises(UserError) as refused:
        raise_problems(find_problems(reports(**full), 5), reports(**full))
    assert refused.value.exit_code == 2
    own = {f"n{i}": {"sees_probe": False} for i in (2, 3, 4)}
    with pytest.raises(UserError) as refused:
        raise_problems(find_problems(reports(**own), 5), reports(**own))
    assert refused.value.exit_code == 2


def test_equal_healthy_nodes_have_no_problem():
    assert find_problems(reports(), 5) == []
    raise_problems([], reports())


@pytest.mark.launch
def test_a_rank_that_sends_wrong_values_is_named(settings, tmp_path):
    """On one machine there is no other node to train on: exit code 2, and nothing is written."""
    run_dir = tmp_path / "run"
    result = train(4, *settings, f"run.dir={run_dir}", "faults.inject=bad_link@0:2")
    assert result.codes == [2] * 4, result.tails
    assert "rank 2 sent or received wrong values in an all-to-all" in result.err and not run_dir.exists()


@pytest.mark.launch
def test_the_preflight_option_does_not_train(settings, tmp_path):
    """`--preflight` prints what it measured and writes no file."""
    result = train(2, *settings, f"run.dir={tmp_path / 'run'}", "--preflight")
    assert result.codes == [0, 0], result.tails
    assert "preflight: 2 ranks on 1 node, all-reduce" in result.out and "all-to-all" in result.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.launch
def test_concurrent_preflights_in_one_folder_keep_each_others_files(settings, tmp_path):
    """Two runs that start at the same time have probe files of their own; the other run's file stays."""
    other = tmp_path / ".run2.seen-by-all-0123456789abcdef"
    other.touch()
    assert train(2, *settings, f"run.dir={tmp_path / 'run'}", "--preflight").codes == [0, 0]
    assert list(tmp_path.iterdir()) == [other]


def test_a_start_removes_the_probe_files_of_a_killed_start(tmp_path):
    """In the run's folder, and in its parent for a first start; files of other runs stay."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    mine = [folder / ".run.seen-by-all-0123456789abcdef" for folder in (run_dir, tmp_path)]
    others = [tmp_path / f".run{end}" for end in ("2.seen-by-all-0123456789abcdef", ".seen-by-all-of-my-friends", "")]
    for file in mine + others:
        file.touch()
    take_over(run_dir)
    assert not any(file.exists() for file in mine) and all(file.exists() for file in others)
