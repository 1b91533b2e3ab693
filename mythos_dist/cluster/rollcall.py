"""Roll call: before ranks join a process group, each leaves a card in a store of rank 0, and rank 0 looks at all.

torch's own way waits for ten minutes and then names nobody. Here rank 0 says who is missing and on which node, and
that a node runs other code or another config. All ranks leave with the same verdict, one of them with words.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from mythos_dist.cluster.place import Place, nodes_of_ranks
from mythos_dist.errors import NodeError, UserError, first_line

Card = dict[str, str]  # what a rank tells; `node` is its host


def open_store(place: Place, seconds: float) -> dist.Store:
    """The store that all ranks share, kept by rank 0 or by torchrun. Raises UserError if it cannot be had in time."""
    # An agent of torchrun has opened it, at the same place.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = place.rank == 0 and not agent
    try:
        store = dist.TCPStore(
            place.master,
            place.port,
            is_master=serves,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except dist.DistNetworkError as error:
        where = f"MASTER_ADDR={place.master} MASTER_PORT={place.port}"
        if serves and "EADDRINUSE" in str(error):
            raise UserError(
                f"{where}: this port of {place.node} is taken by another program; set MASTER_PORT to a free one"
            ) from None
        if serves:
            raise UserError(f"{where}: {place} cannot listen there ({first_line(error)})") from None
        raise _unreachable(place, seconds) from None
    except dist.DistStoreError:
        raise _unreachable(place, seconds) from None
    # Another run whose rank 0 has the same port must not take our cards for its own.
    start = (
        f"{place.launch}.{os.environ.get('SLURM_RESTART_COUNT', 0)}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    )
    return dist.PrefixStore(start, store)


def _unreachable(place: Place, seconds: float) -> UserError:
    error = UserError(
        f"{place} found nobody at MASTER_ADDR={place.master} MASTER_PORT={place.port} in {seconds:g} s; rank 0 has not "
        f"started or was refused there, or a firewall is in between: look at what rank 0 says, and try "
        f"`nc -vz {place.master} {place.port}` on {place.node}"
    )
    error.alone = True
    return error


def call(store: dist.Store, place: Place, card: Card, seconds: float) -> list[Card]:
    """The cards of all ranks. Raises UserError on every rank if some are missing after `seconds`, or do not agree.

    All values of a card but `node` must be the same everywhere; their names say what they are.
    """
    store.set(f"card/{place.rank}", json.dumps({"node": place.node, **card}))
    if place.rank == 0:
        verdict = _judge(store, place, seconds)
        store.set("verdict", json.dumps(verdict))
    else:
        try:
            store.wait(["verdict"], timedelta(seconds=seconds + 60))
            verdict = json.loads(store.get("verdict"))
        except dist.DistError:  # rank 0 said why
            raise UserError(f"{place}: rank 0 on {place.master} ended while ranks were called") from None
    if verdict["problems"] and verdict["nodes"]:
        raise NodeError(verdict["problems"], verdict["nodes"])
    if verdict["problems"]:
        raise UserError(verdict["problems"])
    return verdict["cards"]


def _judge(store: dist.Store, place: Place, seconds: float) -> dict:
    """On rank 0: wait, compare; {cards, problems, nodes that are to blame}."""
    cards = _collect(store, place, seconds)
    if len(cards) < place.world:
        return _missing(cards, place, seconds)
    everyone = [cards[rank] for rank in range(place.world)]
    problems, nodes = differences(everyone)
    return {"cards": everyone, "problems": problems, "nodes": nodes}


def _collect(store: dist.Store, place: Place, seconds: float) -> dict[int, Card]:
    begin, told = time.monotonic(), 0
    waiting, cards = set(range(place.world)), {}
    while waiting and time.monotonic() - begin < seconds:
        for rank in sorted(waiting):
            if store.check([f"card/{rank}"]):
                cards[rank] = json.loads(store.get(f"card/{rank}"))
        waiting -= cards.keys()
        if waiting and time.monotonic() - begin > 20 * (told + 1):
            told += 1
            print(f"waiting for {_who(waiting, cards)} of {place.world}", file=sys.stderr, flush=True)
        if waiting:
            time.sleep(0.05)
    return cards


def _missing(cards: Mapping[int, Card], place: Place, seconds: float) -> dict:
    waiting = set(range(place.world)) - cards.keys()
    placed = nodes_of_ranks()
    silent = sorted({placed[rank] for rank in waiting if rank in placed} - {card["node"] for card in cards.values()})
    remedy = "look at what they printed; the run needs all of them"
    if silent:
        remedy = f"look at {', '.join(silent)}, or leave it out (sbatch --exclude={','.join(silent)})"
    text = f"{_who(waiting, cards)} of {place.world} did not report to {place} in {seconds:g} s; {remedy}"
    return {"cards": [], "problems": [text], "nodes": silent}


def _who(ranks: set[int], cards: Mapping[int, Card]) -> str:
    placed = nodes_of_ranks()
    nodes = sorted({placed[rank] for rank in ranks if rank in placed})
    known = f" ({', '.join(nodes)})" if nodes else ""
    if not known and cards:
        known = f" (there are ranks on {', '.join(sorted({card['node'] for card in cards.values()}))})"
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {ranges(ranks)}{known}"


def differences(cards: list[Card]) -> tuple[list[str], list[str]]:
    """What cards do not agree on, a line each, and the nodes in the minority.

    No node is blamed where there is no majority, and none for a config: that one is the user's.
    """
    problems, blamed = [], []
    for name in [name for name in cards[0] if name != "node"]:
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


def ranges(numbers: set[int] | list[int]) -> str:
    """{0, 1, 2, 5}: "0-2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
