"""A run of two ranks while somebody attacks the port of its watchdog: nothing of it changes."""

import contextlib
import threading
import time
from pathlib import Path

import pytest
from cluster.test_watchdog import ATTACKS, closed, connect
from helpers.launch import launch, train, train_here
from train.test_faults import exact

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]


def attacked(arguments: list[str], folder: str) -> None:
    """Train; rank 0 leaves the address of its port in `folder`, rank 1 connects when a file `go` is there."""
    from mythos_dist.ops.cluster.watchdog import Watchdog

    serve, start = Watchdog.serve, Watchdog.start

    def serve_and_say(self: Watchdog, nodes: list[str], address: str = "") -> str:
        where = serve(self, nodes, address)
        Path(folder, "address.tmp").write_text(where)
        Path(folder, "address.tmp").rename(Path(folder, "address"))
        return where

    def start_late(self: Watchdog, address: str) -> None:
        while self.rank_info.rank and not Path(folder, "go").exists():
            time.sleep(0.02)
        start(self, address)

    Watchdog.serve, Watchdog.start = serve_and_say, start_late
    train_here(arguments)


def attack(folder: Path, stop: threading.Event, said: list[str]) -> None:
    """Everything at once while the port is open, then again and again until the run is done."""
    while not (folder / "address").exists() and not stop.wait(0.05):
        pass
    address = (folder / "address").read_text()
    with contextlib.ExitStack() as stack:
        for _ in range(456):
            with contextlib.suppress(ConnectionError):
                stack.enter_context(connect(address))
        said.append("456 connections")
        for name, data in ATTACKS.items():
            with contextlib.suppress(ConnectionError), connect(address) as stranger:
                stranger.sendall(data)
                assert closed(stranger)
            said.append(name)
        (folder / "go").touch()
        while not stop.wait(0.05):
            for data in ATTACKS.values():
                with contextlib.suppress(OSError), connect(address) as stranger:
                    stranger.sendall(data)
        said.append("until the end")


def test_a_run_under_attack_is_the_run_that_nobody_attacked(settings, tmp_path):
    """Nesting, endless lines, 456 connections, forged hellos: the losses are the same to the last bit."""
    calm, run_dir, stop, said = tmp_path / "calm", tmp_path / "run", threading.Event(), []
    attacker = threading.Thread(target=attack, args=(tmp_path, stop, said))
    attacker.start()
    try:
        result = launch(2, attacked, [*settings, f"run.dir={run_dir}", "faults.lost_after=100"], str(tmp_path))
    finally:
        (tmp_path / "address").touch()
        stop.set()
        attacker.join()
    assert result.codes == [0, 0], result.tails
    assert said == ["456 connections", *ATTACKS, "until the end"]
    assert (run_dir / "COMPLETED").exists() and "Traceback" not in "".join(result.tails)
    assert train(2, *settings, f"run.dir={calm}").codes == [0, 0]
    assert exact(run_dir) == exact(calm)
