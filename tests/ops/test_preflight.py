"""Preflight: what it makes of what nodes say, and messages that come wrong."""

import pytest
from helpers.launch import train
from helpers.parity import change

from mythos_dist.errors import NodeError, UserError
from mythos_dist.ops.preflight import judge, refuse
from mythos_dist.train.run_folder import claim_run_folder

USUAL = {"clock": 100.0, "problems": [], "sees": True, "GPUs": "8 x H100", "InfiniBand": "8 active ports"}


def nodes(**changes) -> list[dict]:
    """Four nodes with two ranks each; `changes` by node."""
    return [{"node": f"n{i}", **USUAL, **changes.get(f"n{i}", {})} for i in (1, 2, 3, 4) for _ in range(2)]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"clock": 107.5}, "its clock is +7.5 s off the others; start its time service"),
        ({"sees": False}, "it does not see what n1 writes in run.dir; give a folder that all share"),
        ({"GPUs": "7 x H100"}, "it has 7 x H100, and other nodes have 8 x H100"),
        ({"InfiniBand": "6 active ports"}, "it has 6 active ports, and other nodes have 8 active ports"),
        ({"problems": ["disk"]}, "disk"),
    ],
)
def test_one_bad_node_is_named_with_the_remedy(changed, words):
    found = judge(nodes(n3=changed), clock_skew=5)
    assert [(node, words in text) for node, text in found] == [("n3", True)]
    with pytest.raises(NodeError) as refused:
        refuse(found, nodes())
    assert refused.value.nodes == ["n3"] and refused.value.exit_code == 3


def test_what_all_nodes_have_is_the_users():
    """A disk that is full everywhere, and a run folder that only the first node has: no node is at fault."""
    full = {f"n{i}": {"problems": ["disk"]} for i in (1, 2, 3, 4)}
    with pytest.raises(UserError) as refused:
        refuse(judge(nodes(**full), 5), nodes(**full))
    assert refused.value.exit_code == 2
    own = {f"n{i}": {"sees": False} for i in (2, 3, 4)}
    with pytest.raises(UserError) as refused:
        refuse(judge(nodes(**own), 5), nodes(**own))
    assert refused.value.exit_code == 2


def test_all_in_order_is_nothing():
    assert judge(nodes(), 5) == []
    refuse([], nodes())


@pytest.mark.launch
def test_a_rank_that_sends_wrong_numbers_is_named(settings, tmp_path):
    """On one machine there is no other node to train on: exit code 2, and nothing is written."""
    run_dir = tmp_path / "run"
    result = train(4, *settings, f"run.dir={run_dir}", "faults.inject=bad_link@0:2")
    assert result.codes == [2] * 4, result.tails
    assert "rank 2 sent or got wrong numbers in an all-to-all" in result.err and not run_dir.exists()


@pytest.mark.launch
def test_preflight_alone_trains_nothing(settings, tmp_path):
    """`--preflight` says what it found and leaves no trace."""
    result = train(2, *settings, f"run.dir={tmp_path / 'run'}", "--preflight")
    assert result.codes == [0, 0], result.tails
    assert "preflight: 2 ranks on 1 node, all-reduce" in result.out and "all-to-all" in result.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.launch
def test_preflights_in_one_folder_leave_each_others_files_alone(settings, tmp_path):
    """Two runs that start beside each other look for files of their own; a file of another one stays."""
    other = tmp_path / ".run2.seen-by-all-0123456789abcdef"
    other.touch()
    assert train(2, *settings, f"run.dir={tmp_path / 'run'}", "--preflight").codes == [0, 0]
    assert list(tmp_path.iterdir()) == [other]


def test_a_start_removes_what_a_killed_one_left_to_be_seen_by_all(config, tmp_path):
    """In the run's folder, and above it for a first start; what is not exactly of this run stays."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    mine = [folder / ".run.seen-by-all-0123456789abcdef" for folder in (run_dir, tmp_path)]
    others = [tmp_path / f".run{end}" for end in ("2.seen-by-all-0123456789abcdef", ".seen-by-all-of-my-friends", "")]
    for file in mine + others:
        file.touch()
    claim_run_folder(change(config, run=dict(dir=str(run_dir)))).close()
    assert not any(file.exists() for file in mine) and all(file.exists() for file in others)
