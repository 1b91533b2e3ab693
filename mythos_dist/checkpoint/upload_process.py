"""The process that uploads checkpoints, one per node, and the rank's end of it.

A process and not a thread: sending 1 GB takes seconds of CPU in Python, which would hold the interpreter's lock during
steps. It runs with the lowest priority. The first rank of a node starts it, writes a line to its standard input when a
checkpoint was published, and reads what has happened as JSON lines from its standard output. It ends when the input is
closed, so a rank that is killed takes it along; signals that a terminal or a scheduler sends to all processes of a job
are ignored, because the rank saves once more then. A process that ends by itself is started again.
"""

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mythos_dist.checkpoint.remote import UploadSettings
from mythos_dist.errors import end_with, first_line

log = logging.getLogger(__name__)

RETRY_SECONDS = (5.0, 60.0)  # until a failed upload is tried again: the first time, and at most
RESTART_SECONDS = 30.0  # until a process that has ended is started again
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class UploadProcess:
    """This node's process, as its first rank sees it. No method waits for it, except `close`."""

    def __init__(self, settings: UploadSettings):
        self._settings = settings
        self._log_file = Path(settings.run_dir) / "logs" / f"upload-{settings.node:05d}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._started, self._received = 0.0, b""
        self.ended = False  # for good: another start has taken over
        self._start()

    def notify(self) -> None:
        """A checkpoint was published."""
        self._send(b"\n")

    def poll(self) -> list[dict[str, Any]]:
        """What has happened since the last call."""
        waited = time.monotonic() - self._started > RESTART_SECONDS
        if self._process is None or self._process.stdout is None:
            if waited:
                self._start()
            return []
        with suppress(BlockingIOError):
            while block := os.read(self._process.stdout.fileno(), 1 << 16):
                self._received += block
        *lines, self._received = self._received.split(b"\n")
        events = [json.loads(line) for line in lines]
        self.ended = self.ended or any(event["event"] == "superseded" for event in events)
        if not self.ended and waited and self._process.poll() is not None:
            log.warning(
                "the process that uploads checkpoints ended (code %d); see %s", self._process.returncode, self._log_file
            )
            self._close_pipes()
            self._start()
        return events

    def close(self) -> None:
        """End it, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._close_pipes()
            self._process = None

    def _start(self) -> None:
        self._started, self._received = time.monotonic(), b""
        command = [sys.executable, "-m", "mythos_dist.checkpoint.upload_process", self._settings.to_text()]
        # The working directory need not have the package, and the interpreter must find the same one as here.
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        try:
            with self._log_file.open("ab") as stderr:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment
                )
        except OSError as error:
            log.warning("the process that uploads checkpoints cannot be started (%s)", error)
            return
        assert self._process.stdout
        os.set_blocking(self._process.stdout.fileno(), False)
        self.notify()

    def _send(self, line: bytes) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):  # it has ended; `poll` starts another, which finds the checkpoint by itself
                os.write(self._process.stdin.fileno(), line)

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout) if self._process else ():
            if pipe:
                with suppress(OSError):
                    pipe.close()


def main() -> None:
    """The process."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.nice(19)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    commands: queue.Queue[bytes] = queue.Queue()
    parent = os.getppid()
    threading.Thread(target=_read_commands, args=(commands,), daemon=True).start()
    end_with(parent)  # also while other processes of the rank keep the pipe open
    try:
        serve_uploads(UploadSettings.parse(sys.argv[1]), commands)
    except BaseException:
        log.exception("uploading ended")
        os._exit(1)
    os._exit(0)  # not waiting for threads


def _read_commands(commands: "queue.Queue[bytes]") -> None:
    """In a thread: a line for each published checkpoint, until the rank ends."""
    while line := os.read(0, 1 << 16):
        commands.put(line)
    os._exit(0)


def serve_uploads(settings: UploadSettings, commands: "queue.Queue[bytes]") -> None:
    """Upload after each command, and again after a failure, until another start takes over."""
    # Imported here: by then signals are ignored.
    from mythos_dist.checkpoint.upload import CheckpointUploader, SupersededError
    from mythos_dist.errors import UserError
    from mythos_dist.store.s3 import forget_clients

    uploader, failures = CheckpointUploader(settings, _report), 0
    wait: float | None = None  # None: until a command comes
    while True:
        with suppress(queue.Empty):
            commands.get(timeout=wait)
            while True:  # of several, one pass finds all
                commands.get_nowait()
        try:
            uploader.upload_all()
            _report({"event": "idle"})
            failures, wait = 0, None
        except SupersededError as error:
            _report({"event": "superseded", "reason": first_line(error)})
            return
        except UserError as error:
            log.warning("%s", error)
            # The end of the message is for commands that a user runs.
            _report({"event": "failed", "reason": first_line(error).removesuffix(", and run the same command again")})
            forget_clients()  # credentials may be replaced meanwhile
            failures += 1
            wait = min(RETRY_SECONDS[1], RETRY_SECONDS[0] * 2 ** (failures - 1))


def _report(event: dict[str, Any]) -> None:
    os.write(1, json.dumps(event).encode() + b"\n")


if __name__ == "__main__":
    main()
