"""Both sides of the watchdog without a run, and attacks on rank 0's port. Runs with a watchdog are in
`tests/train/test_faults.py`, `test_port_attack.py` and `test_drills.py`."""

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
from mythos_dist.ops.cluster import rank_connections, watchdog_server
from mythos_dist.ops.cluster.authentication import (
    Channel,
    challenge,
    derive,
    hello,
    launch_secret,
    sign,
    verify_signature,
)
from mythos_dist.ops.cluster.rank_connections import MAX_UNAUTHENTICATED
from mythos_dist.ops.cluster.recorder import CollectiveRecorder
from mythos_dist.ops.cluster.watchdog import Watchdog
from mythos_dist.ops.cluster.watchdog_protocol import WatchdogLimits
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
    """Rank 0's watchdog, listening on loopback, before any rank has connected; and its address."""
    first = watchdog(0, world)
    try:
        yield first, first.serve([f"node{rank}" for rank in range(world)], "127.0.0.1")
    finally:
        first._done = True  # its thread must not exit this process


def connect(address: str) -> socket.socket:
    host, port, _ = address.split()
    connection = socket.create_connection((host, int(port)), timeout=240)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def read_line(connection: socket.socket) -> bytes:
    return connection.makefile("rb", buffering=0).readline().strip()


def wait_closed(connection: socket.socket) -> bool:
    """Whether the other end closes the connection; reads and drops what it sends before."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def authenticate(address: str, rank: int, secret: bytes | None = None) -> tuple[socket.socket, Channel]:
    """Connect as `rank` does, up to its hello line."""
    connection, key = connect(address), derive(secret or launch_secret(), "watchdog", address.split()[2])
    server_challenge, rank_challenge = read_line(connection).decode(), challenge()
    connection.sendall(hello(key, rank, server_challenge, rank_challenge))
    return connection, Channel(key, rank, server_challenge, rank_challenge, is_rank_0=False)


def send(connection: socket.socket, channel: Channel, text: str) -> None:
    connection.sendall(channel.line(text))
    channel.count_sent()


def is_answered(connection: socket.socket, channel: Channel) -> bool:
    """Whether rank 0 replies to a message of this rank."""
    send(connection, channel, '{"phase": "step 1", "age": 0.5}')
    texts: list[str] = []
    while not texts:
        texts = channel.feed(connection.recv(1 << 16))
    return json.loads(texts[0]) == {"ok": 1}


def wait_for(ready, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


ATTACKS = {
    "nesting": b"[" * 1000 + b"\n",
    "objects": b'{"a":' * 1000 + b"\n",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "number": b"5\n",
    "not UTF-8": bytes(range(128, 256)) + b"\n",
    "empty lines": b"\n\n\n",
    "hello of an earlier version": b'{"rank": 0, "token": "x", "phase": "p", "age": 0}\n',
    "unsigned hello": b"1 " + b"0" * 32 + b" " + b"0" * 64 + b"\n",
    "huge rank": b"9" * 4000 + b" " + b"0" * 32 + b" " + b"0" * 64 + b"\n",
    "endless": b"x" * (1 << 20),
}


def test_invalid_data_closes_only_its_own_connection():
    """An endless line after 4 KB. Two ranks then connect and get replies; no failure is recorded."""
    with served() as (first, address), ExitStack() as stack:
        for data in ATTACKS.values():
            connection = stack.enter_context(connect(address))
            try:
                connection.sendall(data)
            except ConnectionError:
                continue  # closed in the middle
            assert wait_closed(connection)
        first.start(address)
        rank, channel = authenticate(address, 1)
        assert len(read_line(rank)) == 64 and is_answered(rank, channel)
        assert first._server and not first._server.failures and first._server.decide_at is None


def test_a_connection_that_does_not_authenticate_itself_is_closed_in_time(monkeypatch):
    """One that sends nothing, and one that sends an incomplete line."""
    monkeypatch.setattr(rank_connections, "AUTHENTICATE_WITHIN", 0.5)
    with served() as (_, address), connect(address) as silent, connect(address) as slow:
        slow.sendall(b"1")
        assert wait_closed(silent) and wait_closed(slow)


def test_many_unauthenticated_connections_do_not_keep_ranks_out():
    """The oldest of 456 are closed before file descriptors run out. With all ranks connected, the port is closed."""
    with served() as (first, address), ExitStack() as stack:
        assert first._server
        for _ in range(456):
            stack.enter_context(connect(address))
        wait_for(
            lambda: (
                len(first._server.connections.unauthenticated) <= MAX_UNAUTHENTICATED + 2 if first._server else False
            )
        )
        first.start(address)
        second = watchdog(1)
        second.start(address)
        second._done = True
        assert first._server.connections.ranks.keys() == {0, 1}
        wait_for(lambda: first._server and not first._server.connections.unauthenticated)
        with pytest.raises(ConnectionRefusedError):
            connect(address)


def test_without_file_descriptors_the_server_pauses():
    """accept fails with EMFILE: unauthenticated connections are closed, and ranks connect once descriptors are free."""
    with served() as (first, address), ExitStack() as stack:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        host, port, _ = address.split()
        waiting = [stack.enter_context(socket.socket()) for _ in range(20)]
        used = max(int(name.name) for name in Path("/proc/self/fd").iterdir()) + 1
        begin = time.process_time()
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 3, hard))
            for connection in waiting:
                connection.connect((host, int(port)))
            time.sleep(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert time.process_time() - begin < 0.8
        first.start(address)
        rank, channel = authenticate(address, 1)
        assert len(read_line(rank)) == 64 and is_answered(rank, channel)


def test_a_replayed_hello_and_a_second_connection_of_a_rank_are_refused():
    """A process that has recorded the handshake of rank 1 can neither replay it nor replace its connection."""
    with served(3) as (first, address):
        connection = connect(address)
        key = derive(launch_secret(), "watchdog", address.split()[2])
        server_challenge, rank_challenge = read_line(connection).decode(), challenge()
        recorded = hello(key, 1, server_challenge, rank_challenge)
        connection.sendall(recorded)
        channel = Channel(key, 1, server_challenge, rank_challenge, is_rank_0=False)
        assert len(read_line(connection)) == 64 and is_answered(connection, channel)
        replay = connect(address)
        assert read_line(replay).decode() != server_challenge
        replay.sendall(recorded)
        assert wait_closed(replay)
        for rank in (1, 3, 9_999_999):  # connected already; no such rank
            other, _ = authenticate(address, rank)
            assert wait_closed(other)
        assert is_answered(connection, channel)
        assert first._server and first._server.connections.ranks.keys() == {1} and not first._server.failures


def test_a_replayed_line_closes_the_connection():
    """As if the rank had exited; the failure's message is that a line was not signed."""
    with served() as (first, address):
        rank, channel = authenticate(address, 1)
        assert len(read_line(rank)) == 64
        line = channel.line('{"phase": "a", "age": 0}')
        rank.sendall(line + line)
        assert wait_closed(rank)
        assert first._server
        wait_for(lambda: first._server and first._server.failures)
        assert "not signed by the other end" in first._server.failures[0][1]


MALFORMED = [
    "5", "[]", "null", '"x"', "{", "[" * 1000, '{"phase": 5, "age": 0}', '{"phase": "x", "age": NaN}',
    '{"phase": "x", "age": -1}', '{"phase": "x", "age": 1e999}', '{"phase": "x", "age": "7"}', '{"bye": "yes"}',
    '{"failed": {}, "cause": true}', '{"failed": "x", "cause": 1}', '{"report": {}}', '{"report": null, "z": 1}',
    '{"report": {"calls": {"g": "1"}, "last": "", "group": "g", "members": [], "at": ""}}',
    '{"report": {"calls": {}, "last": "", "group": "g", "members": [0, 1], "at": ""}}',
    '{"report": {"calls": {"g": 1}, "last": "", "group": "g", "members": [0, 2], "at": ""}}',
    '{"report": {"calls": {"g": 1}, "last": "", "group": "g", "members": [-1], "at": ""}}',
    json.dumps({"phase": "x" * 100_000, "age": 0}), '{"phase": "x", "age": ' + "9" * 5000 + "}",
]  # fmt: skip


def test_malformed_messages_of_a_rank_are_ignored():
    """Wrong types, missing fields, NaN: the rank's state stays as it was, and no failure is recorded."""
    with served() as (first, address):
        rank, channel = authenticate(address, 1)
        assert len(read_line(rank)) == 64 and is_answered(rank, channel)
        for text in MALFORMED:
            send(rank, channel, text)
        assert is_answered(rank, channel)
        assert first._server
        one = first._server.connections.ranks[1]
        assert (one.phase, one.age, one.collectives, one.done) == ("step 1", 0.5, None, False)
        assert not first._server.failures


@pytest.mark.parametrize(
    "answer", [b"", b"\xff\xfe\n", b"[" * 1000 + b"\n", b"x" * 10_000, b"0" * 32 + b"\n" + b"1" * 64]
)
def test_a_program_that_is_not_rank_0_is_reported(answer):
    """Whatever it sends at rank 0's address: exit code 4 and one line."""

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):  # the listener is closed at the end
            while True:
                with listener.accept()[0] as connection:
                    connection.settimeout(1)
                    connection.sendall(answer)
                    wait_closed(connection)

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
def test_an_invalid_address_is_reported(address):
    rank = watchdog(1, lost_after=3)
    rank.limits = WatchdogLimits(600, 0.3)
    with pytest.raises(LostRankError, match="cannot connect to rank 0"):
        rank.start(address)


@pytest.mark.launch
def test_a_rank_and_rank_0_with_different_secrets_refuse_each_other(monkeypatch):
    """The nonce can be read from the store; without the secret no process can connect, or be accepted as rank 0."""
    monkeypatch.setenv("MYTHOS_SECRET", "correct horse")
    with served() as (_, address):
        wrong, _ = authenticate(address, 1, secret=b"guessed")
        assert wait_closed(wrong)
        monkeypatch.setenv("MYTHOS_SECRET", "another")
        rank = watchdog(1, lost_after=5)  # long enough for one handshake on a busy machine
        with pytest.raises(LostRankError, match="MYTHOS_SECRET differs"):
            rank.start(address)
        monkeypatch.setenv("MYTHOS_SECRET", "correct horse")
        right, channel = authenticate(address, 1)
        assert len(read_line(right)) == 64 and is_answered(right, channel)


def test_rank_0_listens_only_at_the_address_that_it_returns():
    with served() as (first, address):
        assert (
            first._server and first._server.connections._listener.getsockname()[0] == "127.0.0.1" == address.split()[0]
        )
        others = socket.gethostbyname_ex(socket.gethostname())[2]
        for other in others:
            if not other.startswith("127."):
                with pytest.raises(OSError):
                    socket.create_connection((other, first._server.connections.port), timeout=1)


@pytest.mark.launch
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # SystemExit in a thread
@pytest.mark.parametrize("late", [0.0, 4.5])
def test_a_broken_connection_ends_a_rank_with_code_4_however_late_rank_0_exits(late, monkeypatch, capsys):
    """The main thread must not end first, with a traceback and code 1, while the watchdog's thread waits for it."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr("os._exit", leave)
    with served() as (first, address):
        first.start(address)
        rank = watchdog(1)
        rank.rank_info = replace(rank.rank_info, local_rank=0)  # the one that prints the reason
        rank.start(address)
        assert first._server
        connection = first._server.connections.ranks[1].socket
        first._server.connections.ranks[1].done = True  # so that the server reports no failure of rank 1
        monkeypatch.setattr(rank, "_send", lambda message: None)
        if late:
            threading.Timer(late, connection.shutdown, [socket.SHUT_RDWR]).start()
        else:
            connection.shutdown(socket.SHUT_RDWR)
            wait_for(lambda: rank._rank_0_exited)
        with pytest.raises(SystemExit):
            rank.fail(RuntimeError("Connection closed by peer [127.0.0.1]:39001"))
    assert set(codes) == {4} and not rank._failed
    assert "rank 0 on 127.0.0.1 exited" in capsys.readouterr().err


@pytest.mark.parametrize("unread", [False, True])
def test_an_exit_of_rank_0_is_detected_with_or_without_a_reset(unread):
    """The kernel resets the connection of a process that is killed with unread data."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as ours:
        theirs, _ = server.accept()
        ours.sendall(b"x" * unread)
        if unread:
            wait_for(lambda: theirs.recv(1, socket.MSG_PEEK))
        theirs.close()
        channel = Channel(derive(b"s", "watchdog", "n"), 1, challenge(), challenge(), is_rank_0=False)
        assert watchdog(1)._monitor(ours, channel) == ("rank 0 on 127.0.0.1 exited", True)


def test_a_rank_that_never_connects_is_a_failure():
    """It completed the rendezvous; without this check rank 0 would wait for ten minutes."""
    first = watchdog()
    first.limits = WatchdogLimits(600, 0.1 - watchdog_server._CONNECT_MORE)
    first.serve(["a", "b"], "127.0.0.1")
    assert first._server
    assert first._server.finished.wait(60)
    assert "rank 1 on b did not connect to the watchdog after the rendezvous" in first._server.failures[1][1]


def test_the_launch_secret_is_derived_from_all_that_the_launcher_provides(tmp_path):
    """A file that other users can read is refused."""
    file = tmp_path / "secret"
    file.write_text("abc\n")
    file.chmod(0o600)
    environments = [
        {}, {"MYTHOS_SECRET": "abc"}, {"TORCHELASTIC_RUN_ID": "abc"}, {"MYTHOS_SECRET_FILE": str(file)},
        {"MYTHOS_SECRET": "abc", "TORCHELASTIC_RUN_ID": "abc"}, {"MYTHOS_SECRET": "abcabc"},
    ]  # fmt: skip
    derived = [launch_secret(environment) for environment in environments]
    assert derived[0] == b"" and len(set(derived)) == len(derived)
    assert verify_signature(derived[1], "report", sign(derived[1], "report", "text")) == "text"
    for secret, purpose in ((derived[2], "report"), (derived[1], "result")):
        with pytest.raises(ValueError):
            verify_signature(secret, purpose, sign(derived[1], "report", "text"))
    file.chmod(0o640)
    with pytest.raises(UserError, match="that other users cannot read"):
        launch_secret({"MYTHOS_SECRET_FILE": str(file)})
    with pytest.raises(UserError, match="cannot be read"):
        launch_secret({"MYTHOS_SECRET_FILE": str(tmp_path / "none")})


def test_many_ranks_send_less_often_and_lost_after_grows():
    """At most 500 messages per second in total; `lost_after` is at least three times the interval of a rank."""
    watchdog = Watchdog(RankInfo(world_size=20000), WatchdogLimits(600, 30), CollectiveRecorder())
    assert watchdog.limits.lost_after == 120
    assert Watchdog(RankInfo(world_size=400), WatchdogLimits(600, 30), CollectiveRecorder()).limits.lost_after == 30
