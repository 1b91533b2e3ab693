"""Roll call: before ranks join a process group, each leaves a card in a store of rank 0, and rank 0 looks at all.

torch's own way waits for ten minutes and then names nobody. Here rank 0 says who is missing and on which node, and
that a node runs other code or another config. All ranks leave with the same verdict, one of them with words.
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
from mythos_dist.ops.cluster.authentication import launch_secret, sign, verify
from mythos_dist.parallel.launcher import RankInfo, nodes_of_ranks

Card = dict[str, str]  # what a rank reports; `node` is its host, `start` a random number of its process
_OWN = ("node", "start")  # what differs between ranks
_CARD = TypeAdapter(Card)
_AGENT_SECONDS = 10  # in which the store of a launcher that has it answers
_READ_MORE = 60  # seconds more that the others wait for the verdict than rank 0 for them
_READ_WITHIN = 20  # seconds in which ranks read a verdict that ends them


class Verdict(BaseModel):
    """What rank 0 says to all."""

    model_config = ConfigDict(strict=True, extra="forbid")

    starts: dict[str, str] = {}  # of the cards that it has seen, by rank
    cards: list[Card] = []  # of all ranks, if none is missing
    problems: list[str] = []
    nodes: list[str] = []  # that are to blame
    lost: bool = False  # ranks are missing


def open_store(rank_info: RankInfo, seconds: float) -> dist.Store:
    """The store that all ranks share, kept by rank 0 or by torchrun. Raises UserError if it cannot be had in time."""
    if rank_info.world_size == 1:
        # No launcher's: what is left of one in the environment leads nowhere. And nobody else can reach this one.
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        local = replace(rank_info, master_addr="127.0.0.1", master_port=port)
        return _store(local, seconds, is_master=True, master_listen_fd=listener.detach())
    # An agent of torchrun has opened it, at the same address; unless the variable is left over from another launch.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            return _store(rank_info, min(seconds, _AGENT_SECONDS), seconds)
        except dist.DistError as error:
            if rank_info.rank == 0:
                print(
                    f"no store of torchrun at {rank_info.master_addr}:{rank_info.master_port} ({first_line(error)})",
                    file=sys.stderr,
                )
    where = f"MASTER_ADDR={rank_info.master_addr} MASTER_PORT={rank_info.master_port}"
    try:
        return _store(rank_info, seconds, is_master=rank_info.rank == 0)
    except dist.DistNetworkError as error:
        if rank_info.rank == 0 and "EADDRINUSE" in str(error):
            raise UserError(
                f"{where}: this port of {rank_info.node} is taken by another program; set MASTER_PORT to a free one"
            ) from None
        if rank_info.rank == 0:
            raise UserError(f"{where}: {rank_info} cannot listen there ({first_line(error)})") from None
        raise _unreachable(rank_info, seconds) from None
    except dist.DistStoreError:
        raise _unreachable(rank_info, seconds) from None


def _store(rank_info: RankInfo, seconds: float, wait: float | None = None, **options: Any) -> dist.Store:
    """Connect within `seconds`, or serve; later answers may take `wait` seconds."""
    limit = timedelta(seconds=seconds)
    store = dist.TCPStore(
        rank_info.master_addr, rank_info.master_port, timeout=limit, wait_for_workers=False, **options
    )
    store.set_timeout(timedelta(seconds=wait or seconds))
    # Another run whose rank 0 has the same port must not take our cards for its own.
    return dist.PrefixStore(f"{rank_info.job_id}.{os.environ.get('SLURM_RESTART_COUNT', 0)}", store)


def _unreachable(rank_info: RankInfo, seconds: float) -> LostRankError:
    error = LostRankError(
        f"{rank_info} found nobody at MASTER_ADDR={rank_info.master_addr} MASTER_PORT={rank_info.master_port} in "
        f"{seconds:g} s; rank 0 has not "
        f"started or was refused there, or a firewall is in between: look at what rank 0 says, and try "
        f"`nc -vz {rank_info.master_addr} {rank_info.master_port}` on {rank_info.node}"
    )
    error.only_this_rank = True
    return error


def rendezvous(store: dist.Store, rank_info: RankInfo, card: Card, seconds: float) -> tuple[list[Card], dist.Store]:
    """The cards of all ranks, and a store for this start alone. All ranks leave with the same verdict.

    Raises LostRankError on every rank if some are missing after `seconds`, NodeError or UserError if they do not agree.
    All values of a card but those of `_OWN` must be the same everywhere; their names say what they are.

    torchrun's store outlives ranks, so it may hold what an earlier start has left. Rank 0 draws a number for each
    start, under which all else lies; the others take a verdict for theirs only if it answers the card that they wrote.
    """
    secret = launch_secret()
    card = {"node": rank_info.node, "start": secrets.token_hex(8), **card}
    try:
        if rank_info.rank == 0:
            verdict, ours = _judge_all(store, rank_info, card, seconds, secret)
        else:
            verdict, ours = _await_verdict(store, rank_info, card, seconds + _READ_MORE, secret)
    except dist.DistError:  # rank 0 said why
        raise LostRankError(f"{rank_info}: rank 0 on {rank_info.master_addr} ended while ranks were called") from None
    if verdict.lost and not verdict.nodes:
        raise LostRankError(verdict.problems)
    if verdict.problems and verdict.nodes:
        raise NodeError(verdict.problems, verdict.nodes)
    if verdict.problems:
        raise UserError(verdict.problems)
    return verdict.cards, ours


def _judge_all(
    store: dist.Store, rank_info: RankInfo, card: Card, seconds: float, secret: bytes
) -> tuple[Verdict, dist.Store]:
    """On rank 0."""
    number = secrets.token_hex(16)
    ours = dist.PrefixStore(number, store)
    ours.set("card/0", sign(secret, f"card 0 {number}", json.dumps(card)))
    store.set("start", sign(secret, "start", number))

    def read(rank: int, text: bytes) -> Card:
        return _checked(_CARD.validate_json(verify(secret, f"card {rank} {number}", text)))

    verdict = _judge(ours, rank_info, seconds, read)
    ours.set("verdict", sign(secret, f"verdict {number}", verdict.model_dump_json()))
    if verdict.problems:
        _await_readers(ours, verdict)
    return verdict, ours


def _await_readers(store: dist.Store, verdict: Verdict) -> None:
    """Until the ranks that came have read the verdict: this process ends next, and the store with it."""
    end = time.monotonic() + _READ_WITHIN
    readers = [f"read/{rank}" for rank in verdict.starts if rank != "0"]
    while readers and not store.check(readers) and time.monotonic() < end:
        time.sleep(0.05)


def _await_verdict(
    store: dist.Store, rank_info: RankInfo, card: Card, seconds: float, secret: bytes
) -> tuple[Verdict, dist.Store]:
    """On the other ranks: leave the card where rank 0 looks for it, until rank 0 answers that card."""
    end, number, pause, unread = time.monotonic() + seconds, "", 0.02, "rank 0 has not begun"
    ours = store
    while time.monotonic() < end:
        try:
            if store.check(["start"]) and (found := verify(secret, "start", store.get("start"))) != number:
                if not re.fullmatch("[0-9a-f]{32}", found):
                    raise ValueError(f"{found[:40]!r} is no number of a start")
                number, ours = found, dist.PrefixStore(found, store)
                ours.set(f"card/{rank_info.rank}", sign(secret, f"card {rank_info.rank} {number}", json.dumps(card)))
            if number and ours.check(["verdict"]):
                verdict = Verdict.model_validate_json(verify(secret, f"verdict {number}", ours.get("verdict")))
                if verdict.starts.get(str(rank_info.rank)) == card["start"]:
                    ours.set(f"read/{rank_info.rank}", "")
                    return _checked_verdict(verdict, rank_info), ours
            unread = "it has not answered"
        except ValueError as error:  # of others, or damaged: rank 0's own may still come
            unread = f"what lies in its store cannot be used: {first_line(error)}"
        time.sleep(pause)
        pause = min(pause * 1.2, 0.5)  # hundreds of ranks ask
    raise LostRankError(f"{rank_info}: no verdict of rank 0 on {rank_info.master_addr} in {seconds:g} s; {unread}")


def _checked_verdict(verdict: Verdict, rank_info: RankInfo) -> Verdict:
    """Raises ValueError if it is no verdict on that many ranks."""
    if not verdict.problems and len(verdict.cards) != rank_info.world_size:
        raise ValueError(f"a verdict with {len(verdict.cards)} cards")
    for card in verdict.cards:
        _checked(card)
    return verdict


def _checked(card: Card) -> Card:
    """The card, if all of it may go into messages, files and command lines. Raises ValueError."""
    bad = [name for name, value in card.items() if not re.fullmatch("[ -~]{0,200}", name + value)]
    if bad or not re.fullmatch(r"[\w.-]{1,255}", card.get("node", ""), re.ASCII):
        raise ValueError(f"no card: {str(card)[:200]!r}")
    return card


def _judge(store: dist.Store, rank_info: RankInfo, seconds: float, read: Callable[[int, bytes], Card]) -> Verdict:
    """On rank 0: wait, compare. `read` raises ValueError for what is no card of that rank."""
    cards, unread = _collect(store, rank_info, seconds, read)
    starts = {str(rank): card["start"] for rank, card in cards.items()}
    if len(cards) < rank_info.world_size:
        text, nodes = _missing(cards, rank_info, seconds)
        problems = [text, *(f"what lies there as the card of rank {rank}: {why}" for rank, why in unread.items())]
        return Verdict(starts=starts, problems=problems, nodes=nodes, lost=True)
    everyone = [cards[rank] for rank in range(rank_info.world_size)]
    problems, nodes = find_mismatches(everyone)
    return Verdict(starts=starts, cards=everyone, problems=problems, nodes=nodes)


def _collect(
    store: dist.Store, rank_info: RankInfo, seconds: float, read: Callable[[int, bytes], Card]
) -> tuple[dict[int, Card], dict[int, str]]:
    """The cards that come within `seconds`, and why others could not be read."""
    begin, told = time.monotonic(), 0
    waiting, cards, unread = set(range(rank_info.world_size)), {}, {}
    while waiting and time.monotonic() - begin < seconds:
        for rank in sorted(waiting):
            try:
                if store.check([f"card/{rank}"]):
                    cards[rank] = read(rank, store.get(f"card/{rank}"))
            except ValueError as error:  # anybody can write into the store; the rank's own may still come
                unread[rank] = first_line(error)
        waiting -= cards.keys()
        if waiting and time.monotonic() - begin > 20 * (told + 1):
            told += 1
            print(f"waiting for {_who(waiting, cards)} of {rank_info.world_size}", file=sys.stderr, flush=True)
        if waiting:
            time.sleep(0.05)
    return cards, {rank: unread[rank] for rank in sorted(waiting & unread.keys())}


def _missing(cards: Mapping[int, Card], rank_info: RankInfo, seconds: float) -> tuple[str, list[str]]:
    """What to say of it, and the nodes of which nobody came."""
    waiting = set(range(rank_info.world_size)) - cards.keys()
    placed = nodes_of_ranks()
    silent = sorted({placed[rank] for rank in waiting if rank in placed} - {card["node"] for card in cards.values()})
    remedy = "look at what they printed; the run needs all of them"
    if silent:
        remedy = f"look at {', '.join(silent)}, or leave it out (sbatch --exclude={','.join(silent)})"
    elif len(cards) == 1 and rank_info.launcher == "torchrun or deepspeed":
        remedy += "; to train with one process alone, unset RANK and WORLD_SIZE"
    return (
        f"{_who(waiting, cards)} of {rank_info.world_size} did not report to {rank_info} in {seconds:g} s; {remedy}",
        silent,
    )


def _who(ranks: set[int], cards: Mapping[int, Card]) -> str:
    placed = nodes_of_ranks()
    nodes = sorted({placed[rank] for rank in ranks if rank in placed})
    known = f" ({', '.join(nodes)})" if nodes else ""
    if not known and cards:
        known = f" (there are ranks on {', '.join(sorted({card['node'] for card in cards.values()}))})"
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {format_ranges(ranks)}{known}"


def find_mismatches(cards: list[Card]) -> tuple[list[str], list[str]]:
    """What cards do not agree on, a line each, and the nodes in the minority.

    No node is blamed where there is no majority, and none for a config: that one is the user's.
    """
    problems, blamed = [], []
    for name in [name for name in cards[0] if name not in _OWN]:
        values = {}
        for card in cards:
            values.setdefault(card["node"], card.get(name, "nothing"))
        counts = Counter(values.values())
        if len({card.get(name, "nothing") for card in cards}) == 1:
            continue
        if len(counts) == 1:  # ranks of one node differ
            problems.append(f"{name} differs between ranks of {cards[0]['node']}; start all of them with the same")
            continue
        (usual, number), (_, second) = counts.most_common(2)
        first = values[cards[0]["node"]]
        expected = usual if number > second else first
        odd = [node for node, value in values.items() if value != expected]
        found = ", ".join(sorted({values[node] for node in odd}))
        problems.append(
            f"{name} on {', '.join(odd)} is {found}, and elsewhere {expected}; "
            "give all nodes the same: one shared folder, or a copy made anew"
        )
        if number > second and name != "the config":
            blamed += odd
    return problems, sorted(set(blamed))


def format_ranges(numbers: set[int] | list[int]) -> str:
    """{0, 1, 2, 5}: "0-2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
