"""Rendezvous: every rank reports to rank 0 through a store, and rank 0 names ranks that are missing or differ.

It precedes the creation of the process group, because torch's own rendezvous waits for ten minutes and then names no
rank. All ranks get the same result, and one of them prints it.

Decisions: CLUSTER-4.
"""

import json
import os
import re
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, TypeAdapter

from mythos_dist.errors import LostRankError, NodeError, UserError, first_line
from mythos_dist.ops.cluster.authentication import launch_secret, sign, verify_signature
from mythos_dist.parallel.launcher import RankInfo, nodes_of_ranks

# `node` is the host of a rank and `start` a random number of its process; all other values must be equal on all ranks.
RankReport = dict[str, str]
_PER_RANK = ("node", "start")
_REPORT = TypeAdapter(RankReport)
_AGENT_STORE_TIMEOUT = 10  # seconds to connect to the store of a torchrun agent
_READ_MORE = 60  # seconds that other ranks wait for the result beyond rank 0's timeout
_READ_WITHIN = 20  # seconds that ranks get to read a result that ends the run

ReadReport = Callable[[int, bytes], RankReport]


class Result(BaseModel):
    """What rank 0 sends to all ranks."""

    model_config = ConfigDict(strict=True, extra="forbid")

    starts: dict[str, str] = {}  # `start` of the reports that were received, by rank
    reports: list[RankReport] = []  # of all ranks, if none is missing
    problems: list[str] = []
    nodes: list[str] = []  # unfit ones
    lost: bool = False  # ranks are missing


def open_store(rank_info: RankInfo, seconds: float) -> dist.Store:
    """The store that all ranks share, hosted by rank 0 or by torchrun. Raises UserError if that takes too long."""
    if rank_info.world_size == 1:
        # On loopback, because the address in the environment may be left over from another launch.
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        local = replace(rank_info, master_addr="127.0.0.1", master_port=port)
        return _store(local, seconds, is_master=True, master_listen_fd=listener.detach())
    address = f"MASTER_ADDR={rank_info.master_addr} MASTER_PORT={rank_info.master_port}"
    # The agent of torchrun hosts a store at this address, unless the variable is left over from another launch.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            return _store(rank_info, min(seconds, _AGENT_STORE_TIMEOUT), seconds)
        except dist.DistError as error:
            if rank_info.rank == 0:
                print(f"no store of torchrun at {address} ({first_line(error)})", file=sys.stderr)
    try:
        return _store(rank_info, seconds, is_master=rank_info.rank == 0)
    except dist.DistNetworkError as error:
        if rank_info.rank == 0 and "EADDRINUSE" in str(error):
            raise UserError(
                f"{address}: another program on {rank_info.node} uses this port; set MASTER_PORT to a free one"
            ) from None
        if rank_info.rank == 0:
            raise UserError(f"{address}: {rank_info} cannot listen there ({first_line(error)})") from None
        raise _unreachable(rank_info, seconds) from None
    except dist.DistStoreError:
        raise _unreachable(rank_info, seconds) from None


def _store(rank_info: RankInfo, seconds: float, wait: float | None = None, **options: Any) -> dist.Store:
    """Connect within `seconds`, or serve; later operations may take `wait` seconds."""
    timeout = timedelta(seconds=seconds)
    store = dist.TCPStore(
        rank_info.master_addr, rank_info.master_port, timeout=timeout, wait_for_workers=False, **options
    )
    store.set_timeout(timedelta(seconds=wait or seconds))
    # The prefix separates runs that use the same address by mistake.
    return dist.PrefixStore(f"{rank_info.job_id}.{os.environ.get('SLURM_RESTART_COUNT', 0)}", store)


def _unreachable(rank_info: RankInfo, seconds: float) -> LostRankError:
    host, port = rank_info.master_addr, rank_info.master_port
    error = LostRankError(
        f"{rank_info} could not connect to MASTER_ADDR={host} MASTER_PORT={port} within {seconds:g} s: rank 0 has not "
        f"started or failed, or a firewall blocks the port; check the output of rank 0, and run `nc -vz {host} {port}` "
        f"on {rank_info.node}"
    )
    error.only_this_rank = True
    return error


def rendezvous(
    store: dist.Store, rank_info: RankInfo, report: RankReport, seconds: float
) -> tuple[list[RankReport], dist.Store]:
    """The reports of all ranks, and a store for this start only. All ranks get the same result.

    Raises LostRankError on every rank if ranks are missing after `seconds`, and NodeError or UserError if they differ.
    The keys of `report` are names for error messages.

    torchrun's store outlives ranks, so it may contain entries of an earlier start. Rank 0 draws a nonce for each start,
    which prefixes all other entries, and the other ranks accept a result only if it contains the `start` of their
    report.
    """
    secret = launch_secret()
    report = {"node": rank_info.node, "start": secrets.token_hex(8), **report}
    try:
        if rank_info.rank == 0:
            result, start_store = _serve_result(store, rank_info, report, seconds, secret)
        else:
            result, start_store = _await_result(store, rank_info, report, seconds + _READ_MORE, secret)
    except dist.DistError:  # rank 0 has printed the reason
        raise LostRankError(f"{rank_info}: rank 0 on {rank_info.master_addr} exited during the rendezvous") from None
    if result.lost and not result.nodes:
        raise LostRankError(result.problems)
    if result.problems and result.nodes:
        raise NodeError(result.problems, result.nodes)
    if result.problems:
        raise UserError(result.problems)
    return result.reports, start_store


def _serve_result(
    store: dist.Store, rank_info: RankInfo, report: RankReport, seconds: float, secret: bytes
) -> tuple[Result, dist.Store]:
    """On rank 0: publish the nonce, compare all reports and publish the result."""
    nonce = secrets.token_hex(16)
    start_store = dist.PrefixStore(nonce, store)
    start_store.set("report/0", sign(secret, f"report 0 {nonce}", json.dumps(report)))
    store.set("start", sign(secret, "start", nonce))

    def read(rank: int, text: bytes) -> RankReport:
        return _validated(_REPORT.validate_json(verify_signature(secret, f"report {rank} {nonce}", text)))

    result = _compare_reports(start_store, rank_info, seconds, read)
    start_store.set("result", sign(secret, f"result {nonce}", result.model_dump_json()))
    if result.problems:
        _await_readers(start_store, result)
    return result, start_store


def _await_readers(store: dist.Store, result: Result) -> None:
    """Wait until all ranks that reported have read the result: this process exits next, and the store with it."""
    deadline = time.monotonic() + _READ_WITHIN
    readers = [f"read/{rank}" for rank in result.starts if rank != "0"]
    while readers and not store.check(readers) and time.monotonic() < deadline:
        time.sleep(0.05)


def _await_result(
    store: dist.Store, rank_info: RankInfo, report: RankReport, seconds: float, secret: bytes
) -> tuple[Result, dist.Store]:
    """On the other ranks: report to each start of rank 0 until a result contains this report."""
    rank, deadline = rank_info.rank, time.monotonic() + seconds
    nonce, start_store = "", store
    pause, problem = 0.02, "rank 0 has not started"
    while time.monotonic() < deadline:
        try:
            if store.check(["start"]):
                newest = verify_signature(secret, "start", store.get("start"))
                if newest != nonce:
                    if not re.fullmatch("[0-9a-f]{32}", newest):
                        raise ValueError(f"{newest[:40]!r} is not the nonce of a start")
                    nonce, start_store = newest, dist.PrefixStore(newest, store)
                    start_store.set(f"report/{rank}", sign(secret, f"report {rank} {nonce}", json.dumps(report)))
            if nonce and start_store.check(["result"]):
                result = Result.model_validate_json(
                    verify_signature(secret, f"result {nonce}", start_store.get("result"))
                )
                if result.starts.get(str(rank)) == report["start"]:
                    start_store.set(f"read/{rank}", "")
                    return _validated_result(result, rank_info), start_store
            problem = "it has not responded"
        except ValueError as error:  # written by others, or damaged: rank 0 may still overwrite it
            problem = f"invalid data in its store: {first_line(error)}"
        time.sleep(pause)
        pause = min(pause * 1.2, 0.5)  # hundreds of ranks poll the store
    raise LostRankError(
        f"{rank_info}: no rendezvous result from rank 0 on {rank_info.master_addr} within {seconds:g} s; {problem}"
    )


def _validated_result(result: Result, rank_info: RankInfo) -> Result:
    """Raises ValueError if the result does not have a report of every rank."""
    if not result.problems and len(result.reports) != rank_info.world_size:
        raise ValueError(f"a result with {len(result.reports)} reports")
    for report in result.reports:
        _validated(report)
    return result


def _validated(report: RankReport) -> RankReport:
    """The report, if all of it is safe in messages, files and command lines. Raises ValueError."""
    bad = [name for name, value in report.items() if not re.fullmatch("[ -~]{0,200}", name + value)]
    if bad or not re.fullmatch(r"[\w.-]{1,255}", report.get("node", ""), re.ASCII):
        raise ValueError(f"invalid report: {str(report)[:200]!r}")
    return report


def _compare_reports(store: dist.Store, rank_info: RankInfo, seconds: float, read: ReadReport) -> Result:
    """On rank 0: collect the reports and compare them. `read` raises ValueError for an invalid report of a rank."""
    reports, invalid = _collect_reports(store, rank_info, seconds, read)
    starts = {str(rank): report["start"] for rank, report in reports.items()}
    if len(reports) < rank_info.world_size:
        problem, nodes = _describe_missing(reports, rank_info, seconds)
        problems = [problem]
        for rank, error in invalid.items():
            problems.append(f"invalid report of rank {rank} in the store: {error}")
        return Result(starts=starts, problems=problems, nodes=nodes, lost=True)
    in_order = [reports[rank] for rank in range(rank_info.world_size)]
    problems, nodes = find_mismatches(in_order)
    return Result(starts=starts, reports=in_order, problems=problems, nodes=nodes)


def _collect_reports(
    store: dist.Store, rank_info: RankInfo, seconds: float, read: ReadReport
) -> tuple[dict[int, RankReport], dict[int, str]]:
    """The reports that arrive within `seconds`, and for missing ranks the error of an invalid one."""
    begin, num_messages = time.monotonic(), 0
    missing, reports, invalid = set(range(rank_info.world_size)), {}, {}
    while missing and time.monotonic() - begin < seconds:
        for rank in sorted(missing):
            try:
                if store.check([f"report/{rank}"]):
                    reports[rank] = read(rank, store.get(f"report/{rank}"))
            except ValueError as error:  # anyone can write to the store; the rank may still overwrite it
                invalid[rank] = first_line(error)
        missing -= reports.keys()
        if missing and time.monotonic() - begin > 20 * (num_messages + 1):
            num_messages += 1
            names = _describe_ranks(missing, reports)
            print(f"waiting for {names} of {rank_info.world_size}", file=sys.stderr, flush=True)
        if missing:
            time.sleep(0.05)
    return reports, {rank: invalid[rank] for rank in sorted(missing & invalid.keys())}


def _describe_missing(reports: Mapping[int, RankReport], rank_info: RankInfo, seconds: float) -> tuple[str, list[str]]:
    """The error message, and the nodes from which no rank reported."""
    missing = set(range(rank_info.world_size)) - reports.keys()
    node_of = nodes_of_ranks()
    silent = {node_of[rank] for rank in missing if rank in node_of} - {report["node"] for report in reports.values()}
    nodes = sorted(silent)
    remedy = "check their output; the run needs all ranks"
    if nodes:
        remedy = f"check {', '.join(nodes)}, or exclude it (sbatch --exclude={','.join(nodes)})"
    elif len(reports) == 1 and rank_info.launcher == "torchrun or deepspeed":
        remedy += "; to train with one process only, unset RANK and WORLD_SIZE"
    names = _describe_ranks(missing, reports)
    return f"{names} of {rank_info.world_size} did not report to {rank_info} within {seconds:g} s; {remedy}", nodes


def _describe_ranks(ranks: set[int], reports: Mapping[int, RankReport]) -> str:
    """Ranks with their nodes; if these are unknown, with the nodes that have reported."""
    node_of = nodes_of_ranks()
    nodes = sorted({node_of[rank] for rank in ranks if rank in node_of})
    known = f" ({', '.join(nodes)})" if nodes else ""
    if not known and reports:
        known = f" (reports came from {', '.join(sorted({report['node'] for report in reports.values()}))})"
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {format_ranges(ranks)}{known}"


def find_mismatches(reports: list[RankReport]) -> tuple[list[str], list[str]]:
    """One problem for each value that differs between reports, and the nodes in the minority.

    Nodes are unfit only if a majority has another value. A config that differs is the user's error, not a node's.
    """
    problems, unfit = [], []
    for name in reports[0]:
        if name in _PER_RANK or len({report.get(name, "nothing") for report in reports}) == 1:
            continue
        value_of_node = {}
        for report in reports:
            value_of_node.setdefault(report["node"], report.get(name, "nothing"))
        counts = Counter(value_of_node.values()).most_common(2)
        if len(counts) == 1:
            problems.append(f"{name} differs between ranks of {reports[0]['node']}; start all of them with the same")
            continue
        (usual, number), (_, second_number) = counts
        has_majority = number > second_number
        expected = usual if has_majority else value_of_node[reports[0]["node"]]
        odd = [node for node, value in value_of_node.items() if value != expected]
        values = ", ".join(sorted({value_of_node[node] for node in odd}))
        problems.append(
            f"{name} on {', '.join(odd)} is {values}, but on the other nodes {expected}; give all nodes the same: a "
            "shared folder, or a new copy"
        )
        if has_majority and name != "the config":
            unfit += odd
    return problems, sorted(set(unfit))


def format_ranges(numbers: set[int] | list[int]) -> str:
    """{0, 1, 2, 5}: "0-2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
