"""Rank 0's side of the watchdog by itself; what it does to runs is in `tests/train/test_faults.py` and in drills."""

import json
import socket
import time

from mythos_dist.cluster.place import Place
from mythos_dist.cluster.recorder import Recorder
from mythos_dist.cluster.watchdog import Limits, Watchdog


def test_strangers_on_the_port_do_no_harm():
    """A browser, a number, a rank of another run: rank 0 goes on answering those that know the word."""
    watchdog = Watchdog(Place(), Limits(600, 5), Recorder())
    port, token = watchdog.serve(["here"]).split()
    said = (b"GET / HTTP/1.1\r\n\r\n", b"5\n", b'{"rank": 0, "token": "x"}\n')
    strangers = [socket.create_connection(("127.0.0.1", int(port))) for _ in range(3)]
    for stranger, words in zip(strangers, said, strict=True):
        stranger.sendall(words)
        stranger.sendall(b'{"failed": "no", "cause": true}\n')
    strangers[0].close()
    with socket.create_connection(("127.0.0.1", int(port)), timeout=5) as rank:
        for _ in range(3):
            rank.sendall((json.dumps({"rank": 0, "token": token, "phase": "step 1", "age": 0.1}) + "\n").encode())
            assert json.loads(rank.recv(100)) == {"ok": 1}
            time.sleep(0.5)
        rank.sendall(b'{"bye": true}\n')


def test_many_ranks_speak_less_often_and_are_waited_for_longer():
    """500 of them a second, and nobody is lost who has missed no more than two turns."""
    watchdog = Watchdog(Place(world=20000), Limits(600, 30), Recorder())
    assert watchdog.limits.lost_after == 120
    assert Watchdog(Place(world=400), Limits(600, 30), Recorder()).limits.lost_after == 30
