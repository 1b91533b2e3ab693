"""The rendezvous names missing ranks and nodes that differ; also with real processes."""

import json
import threading
from typing import Any

import pytest
import torch.distributed as dist
from helpers.launch import launch, train, train_here

from mythos_dist.errors import LostRankError
from mythos_dist.ops.cluster.authentication import sign
from mythos_dist.ops.cluster.recorder import find_blocking_ranks
from mythos_dist.ops.cluster.rendezvous import find_mismatches, format_ranges, rendezvous
from mythos_dist.ops.cluster.watchdog_protocol import CollectiveState
from mythos_dist.parallel.launcher import RankInfo


def rank_report(node: str, code: str = "a", config: str = "x") -> dict[str, str]:
    return {"node": node, "the code": code, "the config": config}


def test_a_node_in_the_minority_is_unfit():
    assert find_mismatches([rank_report("n1"), rank_report("n1"), rank_report("n2"), rank_report("n2")]) == ([], [])
    problems, nodes = find_mismatches([rank_report("n1"), rank_report("n2", code="b"), rank_report("n3")])
    assert nodes == ["n2"] and problems[0].startswith("the code on n2 is b, but on the other nodes a; ")


def test_without_a_majority_and_for_a_config_no_node_is_unfit():
    """Of two nodes, the second is named as different, but either may be wrong."""
    problems, nodes = find_mismatches([rank_report("n1"), rank_report("n2", code="b")])
    assert nodes == [] and "the code on n2 is b, but on the other nodes a" in problems[0]
    problems, nodes = find_mismatches([rank_report("n1"), rank_report("n2", config="y"), rank_report("n3")])
    assert nodes == [] and "the config on n2" in problems[0]
    problems, _ = find_mismatches([rank_report("n1"), rank_report("n1", code="b")])
    assert problems == ["the code differs between ranks of n1; start all of them with the same"]


def test_ranges():
    assert format_ranges([3, 0, 1, 2, 7, 9, 8]) == "0-3, 7-9" and format_ranges([]) == ""


def state(group: str, members: list[int], calls: dict[str, int]) -> CollectiveState:
    return CollectiveState(group=group, members=members, calls=calls, last="all_reduce", at="")


def test_the_rank_that_did_not_call_a_collective_blocks_the_others():
    """Ranks 0 and 1 wait for 2 in a group of three, and 3 waits for 1 in another group: 2 blocks all of them."""
    states = {
        0: state("world", [0, 1, 2], {"world": 8}),
        1: state("world", [0, 1, 2], {"world": 8, "pair": 3}),
        2: state("world", [0, 1, 2], {"world": 7}),
        3: state("pair", [1, 3], {"pair": 4}),
    }
    assert find_blocking_ranks(states) == ([2], "all_reduce")
    del states[2]  # it does not respond
    assert find_blocking_ranks(states) == ([2], "all_reduce")


def test_ranks_that_called_the_same_collectives_do_not_block():
    states = {rank: state("world", [0, 1], {"world": 5}) for rank in (0, 1)}
    assert find_blocking_ranks(states) == ([], "")


def test_ranks_that_wait_for_each_other_both_block():
    """Two groups used in opposite order: a bug in the code, for which neither rank is responsible alone."""
    states = {
        0: state("a", [0, 1], {"a": 1}),
        1: state("b", [0, 1], {"b": 1}),
    }
    assert find_blocking_ranks(states)[0] == [0, 1]


def run_rendezvous(store: dist.Store, world: int, ranks: Any = None, seconds: float = 60) -> dict[int, Any]:
    """The reports that each of `ranks` gets, or its error."""
    outcomes: dict[int, Any] = {}

    def one(rank: int) -> None:
        try:
            outcomes[rank] = rendezvous(store, RankInfo(rank, world, node=f"n{rank}"), {"the code": "a"}, seconds)[0]
        except LostRankError as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks or range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_entries_of_an_earlier_start_in_the_store_are_ignored():
    """torchrun's store outlives an attempt. Each start uses its own prefix, whichever rank comes first."""
    store = dist.HashStore()
    nonces = []
    for _ in range(3):
        outcomes = run_rendezvous(store, 3)
        assert all([report["node"] for report in reports] == ["n0", "n1", "n2"] for reports in outcomes.values())
        nonces.append(store.get("start"))
        assert outcomes[0] == outcomes[1] == outcomes[2]
    assert len(set(nonces)) == 3
    late = []  # a rank that reports before rank 0 has started again
    thread = threading.Thread(target=lambda: late.append(run_rendezvous(store, 2, [1])))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive(), "it accepted the result of another start"
    run_rendezvous(store, 2, [0])
    thread.join()
    assert [report["node"] for report in late[0][1]] == ["n0", "n1"]


BAD_REPORTS = [
    "", "x", "[" * 1000, "{}", "5", "null", '{"node": 5, "start": "x"}', '{"node": "n1", "start": {}}',
    '{"node": "a b", "start": "x"}', '{"node": "n1\\nn2", "start": "x"}', '{"node": "-x;touch", "start": ";"} x',
    json.dumps({"node": "n" * 300, "start": "x"}), json.dumps({"node": "n1", "the code": "\x1b[2J"}), '{"node":' * 900,
]  # fmt: skip


@pytest.mark.launch
@pytest.mark.parametrize("signed", [True, False])
def test_invalid_reports_are_ignored(signed, monkeypatch):
    """Anyone can write to torch's store. The rank may still overwrite the entry; else it counts as missing."""
    nonce = "0" * 32  # known in advance, so the report is there when rank 0 first reads it
    monkeypatch.setattr("mythos_dist.ops.cluster.rendezvous.secrets.token_hex", lambda size: nonce[: 2 * size])
    for text in BAD_REPORTS[:: 1 if signed else 6]:
        store = dist.HashStore()
        store.set(f"{nonce}/report/1", sign(b"", f"report 1 {nonce}", text) if signed else text)
        outcomes = run_rendezvous(store, 2, [0], seconds=0.4)
        assert outcomes[0].exit_code == 4, text
        assert "rank 1 (reports came from n0) of 2 did not report" in str(outcomes[0])
        assert "invalid report of rank 1 in the store" in str(outcomes[0])


def test_an_invalid_result_is_ignored(monkeypatch):
    """A forged nonce, or one signed with another secret: the rank keeps waiting, then reports why."""
    monkeypatch.setenv("MYTHOS_SECRET", "correct horse")
    for start in (b"\xff", b"[" * 1000, sign(b"", "start", "0" * 32).encode(), b""):
        store = dist.HashStore()
        store.set("start", start.decode("latin1"))
        monkeypatch.setattr("mythos_dist.ops.cluster.rendezvous._READ_MORE", 0.3)
        outcomes = run_rendezvous(store, 2, [1], seconds=0.1)
        assert outcomes[1].exit_code == 4 and "invalid data in its store: it is not signed with the secret" in str(
            outcomes[1]
        )


pytestmark = pytest.mark.timeout(480)


@pytest.mark.launch
def test_a_rank_that_never_starts_is_named(settings, tmp_path):
    """Two of three ranks start: exit code 4, so that the launcher restarts the run, and one line."""
    result = launch(2, as_two_of_three, [*settings, f"run.dir={tmp_path / 'run'}", "faults.join_within=20"])
    assert result.codes == [4, 4], result.tails
    assert "rank 2 (reports came from" in result.err and "of 3 did not report to rank 0 on" in result.err
    assert "Traceback" not in result.err and result.err.count("\n") == 1 and not (tmp_path / "run").exists()


def as_two_of_three(arguments: list[str]) -> None:
    import os

    os.environ["WORLD_SIZE"] = "3"
    train_here([*arguments, "train.global_batch=6"])


@pytest.mark.launch
def test_a_port_in_use_is_reported(settings, tmp_path):
    """Rank 0 names the node, the port and the remedy; the other ranks give up as well."""
    import socket

    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        result = train(
            2,
            *settings,
            f"run.dir={tmp_path / 'run'}",
            "faults.join_within=5",
            env={"MASTER_PORT": str(port)},
            grace=1,
        )
    assert result.codes[0] == 2, result.tails
    assert f"MASTER_PORT={port}: another program on {socket.gethostname()} uses this port" in result.err
    assert "set MASTER_PORT to a free one" in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.launch
def test_ranks_with_different_configs_are_refused(settings, tmp_path):
    """Rank 1 has another learning rate: refused before anything is written."""
    result = launch(2, with_own_rate, [*settings, f"run.dir={tmp_path / 'run'}"])
    assert result.codes == [2, 2] and "the config differs between ranks of" in result.err
    assert not (tmp_path / "run").exists()


def with_own_rate(arguments: list[str]) -> None:
    import os

    train_here([*arguments, f"optim.lr=1e-{os.environ['RANK']}"])
