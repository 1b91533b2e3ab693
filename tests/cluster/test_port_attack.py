"""A run of two ranks gives the same losses while its watchdog's port is attacked."""

import contextlib
import threading
import time
from pathlib import Path

import pytest
from cluster.test_watchdog import ATTACKS, connect, wait_closed
from helpers.launch import launch, train, train_here
from train.test_faults import exact

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]


def attacked(arguments: list[str], folder: str) -> None:
    """Train; rank 0 writes its address into `folder`, rank 1 connects once a file `go` is there."""
    from mythos_dist.ops.cluster.watchdog import Watchdog

    serve, start = Watchdog.serve, Watchdog.start

    def serve_and_publish(self: Watchdog, nodes: list[str], address: str = "") -> str:
        published = serve(self, nodes, address)
        Path(folder, "address.tmp").write_text(published)
        Path(folder, "address.tmp").rename(Path(folder, "address"))
        return published

    def start_late(self: Watchdog, address: str) -> None:
        while self.rank_info.rank and not Path(folder, "go").exists():
            time.sleep(0.02)
        start(self, address)

    Watchdog.serve, Watchdog.start = serve_and_publish, start_late
    train_here(arguments)


def attack(folder: Path, stop: threading.Event, done: list[str]) -> None:
    """All attacks while the port is open, then repeatedly until the run is done. `done` gets what was carried out."""
    while not (folder / "address").exists() and not stop.wait(0.05):
        pass
    address = (folder / "address").read_text()
    with contextlib.ExitStack() as stack:
        for _ in range(456):
            with contextlib.suppress(ConnectionError):
                stack.enter_context(connect(address))
        done.append("456 connections")
        for name, data in ATTACKS.items():
            with contextlib.suppress(ConnectionError), connect(address) as connection:
                connection.sendall(data)
                assert wait_closed(connection)
            done.append(name)
        (folder / "go").touch()
        while not stop.wait(0.05):
            for data in ATTACKS.values():
                with contextlib.suppress(OSError), connect(address) as connection:
                    connection.sendall(data)
        done.append("until the end")


def test_a_run_under_attack_gives_the_same_losses(settings, tmp_path):
    """Nesting, endless lines, 456 connections, forged hellos: losses are bit-identical."""
    calm, run_dir, stop, done = tmp_path / "calm", tmp_path / "run", threading.Event(), []
    attacker = threading.Thread(target=attack, args=(tmp_path, stop, done))
    attacker.start()
    try:
        result = launch(2, attacked, [*settings, f"run.dir={run_dir}", "faults.lost_after=100"], str(tmp_path))
    finally:
        (tmp_path / "address").touch()
        stop.set()
        attacker.join()
    assert result.codes == [0, 0], result.tails
    assert done == ["456 connections", *ATTACKS, "until the end"]
    assert (run_dir / "COMPLETED").exists() and "Traceback" not in "".join(result.tails)
    assert train(2, *settings, f"run.dir={calm}").codes == [0, 0]
    assert exact(run_dir) == exact(calm)
