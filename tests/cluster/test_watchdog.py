"""Rank 0's port under attack, and both sides of the watchdog by themselves; what it does to runs is in
`tests/train/test_faults.py`, in `test_port_attack.py` and in drills."""

import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from mythos_dist.errors import LostRankError, UserError
from mythos_dist.ops.cluster import watchdog_server
from mythos_dist.ops.cluster.authentication import Channel, challenge, derive, hello, launch_secret, sign, verify
from mythos_dist.ops.cluster.recorder import CollectiveRecorder
from mythos_dist.ops.cluster.watchdog import Watchdog
from mythos_dist.ops.cluster.watchdog_server import MAX_UNAUTHENTICATED, WatchdogLimits
from mythos_dist.parallel.launcher import RankInfo

pytestmark = pytest.mark.timeout(480)


def watchdog(rank: int = 0, world: int = 2, lost_after: float = 60) -> Watchdog:
    return Watchdog(
        RankInfo(rank, world, rank, world, master_addr="127.0.0.1"),
        WatchdogLimits(600, lost_after),
        CollectiveRecorder(),
    )


@contextmanager
def served(world: int = 2) -> Iterator[tuple[Watchdog, str]]:
    """Rank 0 has opened its port, on loopback, and nobody is there yet; at the end all say goodbye."""
    first = watchdog(0, world)
    try:
        yield first, first.serve([f"node{rank}" for rank in range(world)], "127.0.0.1")
    finally:
        first._leaving = True  # its thread must not end this process


def connect(address: str) -> socket.socket:
    host, port, _ = address.split()
    connection = socket.create_connection((host, int(port)), timeout=240)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def line_of(connection: socket.socket) -> bytes:
    return connection.makefile("rb", buffering=0).readline().strip()


def closed(connection: socket.socket) -> bool:
    """Waits until the other end has closed, reading what comes before that."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def prove(address: str, rank: int, secret: bytes | None = None) -> tuple[socket.socket, Channel]:
    """A rank by hand: what is behind the handshake."""
    connection, key = connect(address), derive(secret or launch_secret(), "watchdog", address.split()[2])
    theirs, ours = line_of(connection).decode(), challenge()
    connection.sendall(hello(key, rank, theirs, ours))
    return connection, Channel(key, rank, theirs, ours, serves=False)


def say(connection: socket.socket, channel: Channel, text: str) -> None:
    connection.sendall(channel.line(text))
    channel.count_sent()


def answers(connection: socket.socket, channel: Channel) -> bool:
    """Whether rank 0 goes on answering this rank."""
    say(connection, channel, '{"phase": "step 1", "age": 0.5}')
    texts: list[str] = []
    while not texts:
        texts = channel.feed(connection.recv(1 << 16))
    return json.loads(texts[0]) == {"ok": 1}


def wait_for(ready, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


ATTACKS = {
    "nesting": b"[" * 1000 + b"\n",
    "objects": b'{"a":' * 1000 + b"\n",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "number": b"5\n",
    "no utf-8": bytes(range(128, 256)) + b"\n",
    "nothing": b"\n\n\n",
    "the old hello": b'{"rank": 0, "token": "x", "phase": "p", "age": 0}\n',
    "a hello of nobody": b"1 " + b"0" * 32 + b" " + b"0" * 64 + b"\n",
    "huge rank": b"9" * 4000 + b" " + b"0" * 32 + b" " + b"0" * 64 + b"\n",
    "endless": b"x" * (1 << 20),
}


def test_whatever_a_stranger_sends_ends_that_connection_only():
    """And an endless line after 4 KB. Two ranks join, are answered and leave as if nobody had been there."""
    with served() as (first, address), ExitStack() as stack:
        for data in ATTACKS.values():
            stranger = stack.enter_context(connect(address))
            try:
                stranger.sendall(data)
            except ConnectionError:
                continue  # closed in the middle
            assert closed(stranger)
        first.start(address)
        rank, channel = prove(address, 1)
        assert len(line_of(rank)) == 64 and answers(rank, channel)
        assert first._hub and not first._hub.signs and first._hub.decide_at is None


def test_a_connection_that_proves_nothing_is_closed_in_time(monkeypatch):
    """A silent one and one that sends a byte now and then."""
    monkeypatch.setattr(watchdog_server, "PROVE_WITHIN", 0.5)
    with served() as (_, address), connect(address) as silent, connect(address) as slow:
        slow.sendall(b"1")
        assert closed(silent) and closed(slow)


def test_no_crowd_of_strangers_keeps_ranks_out_or_fills_the_hub():
    """456 connections ended runs by EMFILE. The oldest make room; when all ranks are there the port is closed."""
    with served() as (first, address), ExitStack() as stack:
        assert first._hub
        for _ in range(456):
            stack.enter_context(connect(address))
        wait_for(lambda: len(first._hub.strangers) <= MAX_UNAUTHENTICATED + 2 if first._hub else False)
        first.start(address)
        second = watchdog(1)
        second.start(address)
        second._leaving = True
        assert first._hub.peers.keys() == {0, 1}
        wait_for(lambda: first._hub and not first._hub.strangers)
        with pytest.raises(ConnectionRefusedError):
            connect(address)


def test_without_file_descriptors_the_hub_waits_and_does_not_spin():
    """accept fails with EMFILE: strangers go, and ranks get in when there are descriptors again."""
    with served() as (first, address), ExitStack() as stack:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        host, port, _ = address.split()
        waiting = [stack.enter_context(socket.socket()) for _ in range(20)]
        used = max(int(name.name) for name in Path("/proc/self/fd").iterdir()) + 1
        begin = time.process_time()
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 3, hard))
            for stranger in waiting:
                stranger.connect((host, int(port)))
            time.sleep(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert time.process_time() - begin < 0.8
        first.start(address)
        rank, channel = prove(address, 1)
        assert len(line_of(rank)) == 64 and answers(rank, channel)


def test_a_recorded_hello_and_a_second_rank_are_refused():
    """Whoever has seen all of rank 1's handshake and lines can neither repeat nor replace it."""
    with served(3) as (first, address):
        connection = connect(address)
        key = derive(launch_secret(), "watchdog", address.split()[2])
        theirs, ours = line_of(connection).decode(), challenge()
        recorded = hello(key, 1, theirs, ours)
        connection.sendall(recorded)
        channel = Channel(key, 1, theirs, ours, serves=False)
        assert len(line_of(connection)) == 64 and answers(connection, channel)
        replay = connect(address)
        assert line_of(replay).decode() != theirs
        replay.sendall(recorded)
        assert closed(replay)
        for rank in (1, 3, 9_999_999):  # it is here; there is none
            other, _ = prove(address, rank)
            assert closed(other)
        assert answers(connection, channel)
        assert first._hub and first._hub.peers.keys() == {1} and not first._hub.signs


def test_lines_that_are_forged_or_repeated_end_the_connection():
    """A line of somebody who has taken over the connection counts for nothing but its loss."""
    with served() as (first, address):
        rank, channel = prove(address, 1)
        assert len(line_of(rank)) == 64
        line = channel.line('{"phase": "a", "age": 0}')
        rank.sendall(line + line)
        assert closed(rank)
        assert first._hub
        wait_for(lambda: first._hub and first._hub.signs)
        assert "not signed by the other end" in first._hub.signs[0][1]


MALFORMED = [
    "5", "[]", "null", '"x"', "{", "[" * 1000, '{"phase": 5, "age": 0}', '{"phase": "x", "age": NaN}',
    '{"phase": "x", "age": -1}', '{"phase": "x", "age": 1e999}', '{"phase": "x", "age": "7"}', '{"bye": "yes"}',
    '{"failed": {}, "cause": true}', '{"failed": "x", "cause": 1}', '{"report": {}}', '{"report": null, "z": 1}',
    '{"report": {"begun": {"g": "1"}, "last": "", "group": "g", "members": [], "at": ""}}',
    '{"report": {"begun": {}, "last": "", "group": "g", "members": [0, 1], "at": ""}}',
    '{"report": {"begun": {"g": 1}, "last": "", "group": "g", "members": [0, 2], "at": ""}}',
    '{"report": {"begun": {"g": 1}, "last": "", "group": "g", "members": [-1], "at": ""}}',
    json.dumps({"phase": "x" * 100_000, "age": 0}), '{"phase": "x", "age": ' + "9" * 5000 + "}",
]  # fmt: skip


def test_a_rank_that_sends_nonsense_is_not_believed_and_does_not_end_the_hub():
    """Wrong types, missing fields, numbers that are none: nothing of it is taken over, and no sign of an end."""
    with served() as (first, address):
        rank, channel = prove(address, 1)
        assert len(line_of(rank)) == 64 and answers(rank, channel)
        for text in MALFORMED:
            say(rank, channel, text)
        assert answers(rank, channel)
        assert first._hub
        peer = first._hub.peers[1]
        assert (peer.phase, peer.age, peer.report, peer.left) == ("step 1", 0.5, None, False)
        assert not first._hub.signs


@pytest.mark.parametrize(
    "answer", [b"", b"\xff\xfe\n", b"[" * 1000 + b"\n", b"x" * 10_000, b"0" * 32 + b"\n" + b"1" * 64]
)
def test_what_is_not_rank_0_is_an_error_with_words_for_a_rank(answer):
    """A program at rank 0's port that says anything: exit code 4 and one line."""

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):  # closed, at the end
            while True:
                with listener.accept()[0] as connection:
                    connection.settimeout(1)
                    connection.sendall(answer)
                    closed(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        rank = watchdog(1, lost_after=3)
        rank.limits = WatchdogLimits(600, 1)
        with pytest.raises(LostRankError, match="cannot connect to rank 0 on") as raised:
            rank.start(f"127.0.0.1 {listener.getsockname()[1]} 00")
        listener.shutdown(socket.SHUT_RDWR)
        server.join()
    assert raised.value.exit_code == 4


@pytest.mark.parametrize("address", ["", "x", "127.0.0.1 x y", "127.0.0.1 99999 00", "127.0.0.1 5 6 7", "\0 1 2"])
def test_an_address_that_is_none_is_an_error_with_words(address):
    rank = watchdog(1, lost_after=3)
    rank.limits = WatchdogLimits(600, 0.3)
    with pytest.raises(LostRankError, match="cannot connect to rank 0"):
        rank.start(address)


@pytest.mark.launch
def test_rank_0_without_the_launchers_secret_is_not_believed(monkeypatch):
    """Whoever can read the store knows the number of the start, and can neither join nor be joined."""
    monkeypatch.setenv("MYTHOS_SECRET", "correct horse")
    with served() as (_, address):
        wrong, _ = prove(address, 1, secret=b"guessed")
        assert closed(wrong)
        monkeypatch.setenv("MYTHOS_SECRET", "another")
        rank = watchdog(1, lost_after=5)  # in which a busy machine ends one handshake
        with pytest.raises(LostRankError, match="MYTHOS_SECRET differs"):
            rank.start(address)
        monkeypatch.setenv("MYTHOS_SECRET", "correct horse")
        right, channel = prove(address, 1)
        assert len(line_of(right)) == 64 and answers(right, channel)


def test_rank_0_listens_at_the_address_it_gives_and_nowhere_else():
    with served() as (first, address):
        assert first._hub and first._hub._listener.getsockname()[0] == "127.0.0.1" == address.split()[0]
        others = socket.gethostbyname_ex(socket.gethostname())[2]
        for other in others:
            if not other.startswith("127."):
                with pytest.raises(OSError):
                    socket.create_connection((other, first._hub.port), timeout=1)


@pytest.mark.launch
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the exit in a thread
@pytest.mark.parametrize("late", [0.0, 4.5])
def test_a_rank_whose_connection_broke_ends_as_lost_however_late_the_cause_is_known(late, monkeypatch, capsys):
    """Two threads slept the same four seconds: the one that ends with 4, and the one that raises and ends with 1."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr("os._exit", leave)
    with served() as (first, address):
        first.start(address)
        rank = watchdog(1)
        rank.rank_info = replace(rank.rank_info, local_rank=0)  # the one that has words
        rank.start(address)
        assert first._hub
        connection = first._hub.peers[1].connection
        first._hub.peers[1].left = True  # its verdict is not what is waited for
        monkeypatch.setattr(rank, "_send", lambda message: None)
        if late:
            threading.Timer(late, connection.shutdown, [socket.SHUT_RDWR]).start()
        else:
            connection.shutdown(socket.SHUT_RDWR)
            wait_for(lambda: rank._rank_0_ended)
        with pytest.raises(SystemExit):
            rank.fail(RuntimeError("Connection closed by peer [127.0.0.1]:39001"))
    assert set(codes) == {4} and not rank._failed
    assert "rank 0 on 127.0.0.1 ended" in capsys.readouterr().err


@pytest.mark.parametrize("unread", [False, True])
def test_rank_0_has_ended_with_or_without_a_reset(unread):
    """The kernel resets the connection of a process that is killed before it has read everything."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as ours:
        theirs, _ = server.accept()
        ours.sendall(b"x" * unread)
        if unread:
            wait_for(lambda: theirs.recv(1, socket.MSG_PEEK))
        theirs.close()
        channel = Channel(derive(b"s", "watchdog", "n"), 1, challenge(), challenge(), serves=False)
        assert watchdog(1)._watch(ours, channel) == ("rank 0 on 127.0.0.1 ended", True)


def test_a_rank_that_never_connects_is_a_sign_of_an_end():
    """It was there at the roll call; without it rank 0 would wait for ten minutes."""
    first = watchdog()
    first.limits = WatchdogLimits(600, 0.1 - watchdog_server._CONNECT_MORE)
    first.serve(["a", "b"], "127.0.0.1")
    assert first._hub
    assert first._hub.finished.wait(60)
    assert "rank 1 on b came to the roll call and did not connect" in first._hub.signs[1][1]


def test_the_secret_of_a_launch_comes_from_whatever_the_launcher_gives(tmp_path):
    """All of it counts, and a file only if nobody else can read it."""
    file = tmp_path / "secret"
    file.write_text("abc\n")
    file.chmod(0o600)
    environments = [
        {}, {"MYTHOS_SECRET": "abc"}, {"TORCHELASTIC_RUN_ID": "abc"}, {"MYTHOS_SECRET_FILE": str(file)},
        {"MYTHOS_SECRET": "abc", "TORCHELASTIC_RUN_ID": "abc"}, {"MYTHOS_SECRET": "abcabc"},
    ]  # fmt: skip
    found = [launch_secret(environment) for environment in environments]
    assert found[0] == b"" and len(set(found)) == len(found)
    assert verify(found[1], "card", sign(found[1], "card", "text")) == "text"
    for secret, purpose in ((found[2], "card"), (found[1], "verdict")):
        with pytest.raises(ValueError):
            verify(secret, purpose, sign(found[1], "card", "text"))
    file.chmod(0o640)
    with pytest.raises(UserError, match="that nobody else can read"):
        launch_secret({"MYTHOS_SECRET_FILE": str(file)})
    with pytest.raises(UserError, match="cannot be read"):
        launch_secret({"MYTHOS_SECRET_FILE": str(tmp_path / "none")})


def test_many_ranks_speak_less_often_and_are_waited_for_longer():
    """500 of them a second, and nobody is lost who has missed no more than two turns."""
    watchdog = Watchdog(RankInfo(world_size=20000), WatchdogLimits(600, 30), CollectiveRecorder())
    assert watchdog.limits.lost_after == 120
    assert Watchdog(RankInfo(world_size=400), WatchdogLimits(600, 30), CollectiveRecorder()).limits.lost_after == 30
