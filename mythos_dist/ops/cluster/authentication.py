"""Authenticated messages between the ranks of one launch: HMAC-SHA256 with a secret that the launcher hands out.

Two ranks prove to each other that they know the key without sending it: each signs the other's fresh random number, so
a recorded handshake is of no use later. After that every line carries a MAC over a counter and its text, so lines
cannot be forged, replayed, reordered or sent back. Nothing is encrypted: what ranks tell each other is no secret.

The trap: torch's store is open to whoever reaches its port, so a key that lies only there protects against programs
that cannot reach it, not against those that can. `launch_secret` therefore reads the launcher's own secret.
"""

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from mythos_dist.errors import UserError

LINE_BYTES = 4096  # at most, of a connection that has not proved itself
_PEER_LINE_BYTES = 1 << 22  # at most, of one that has: a report names up to all ranks of a run
_DIGEST = re.compile(rb"[0-9a-f]{64}")


def launch_secret(environment: Mapping[str, str] | None = None) -> bytes:
    """What only processes of this launch know, the same on all ranks; empty where the launcher gives nothing.

    From MYTHOS_SECRET_FILE (launch/deepspeed.sh), MYTHOS_SECRET (launch/slurm.sbatch, or the user) and torchrun's run
    id, which is random with --standalone. Raises UserError for a file that cannot be read or that others can.
    """
    env = os.environ if environment is None else environment
    digest = hashlib.sha256()
    parts = {name: env.get(name, "").encode() for name in ("MYTHOS_SECRET", "TORCHELASTIC_RUN_ID")}
    if file := env.get("MYTHOS_SECRET_FILE"):
        parts["MYTHOS_SECRET_FILE"] = _read_secret(Path(file))
    if not any(parts.values()):
        return b""
    for name, value in sorted(parts.items()):
        digest.update(f"{name} {len(value)} ".encode() + value)
    return digest.digest()


def _read_secret(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            about = os.fstat(stream.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
                raise _unusable(
                    file,
                    "must be a file of yours that nobody else can read; make it with "
                    "`umask 077; openssl rand -hex 32 >FILE`, or unset MYTHOS_SECRET_FILE",
                )
            if not (secret := stream.read(LINE_BYTES).strip()):
                raise _unusable(file, "is empty; make it with `openssl rand -hex 32`, or unset MYTHOS_SECRET_FILE")
            return secret
    except OSError as error:
        raise _unusable(
            file, f"cannot be read ({error.strerror}); give a file that all nodes see, or unset it"
        ) from None


def _unusable(file: Path, why: str) -> UserError:
    error = UserError(f"MYTHOS_SECRET_FILE={file} {why}")
    error.only_this_rank = True  # perhaps only on this node
    return error


def derive(secret: bytes, *parts: str) -> bytes:
    """A key or MAC for one purpose. Parts hold no NUL, so different parts never give the same bytes."""
    return hmac.digest(secret, "\0".join(parts).encode(), "sha256")


def sign(secret: bytes, purpose: str, text: str) -> str:
    """`text` with its MAC, for a place where others can write."""
    return f"{derive(secret, purpose, text).hex()} {text}"


def verify(secret: bytes, purpose: str, sealed: bytes | str) -> str:
    """What `sign` was given. Raises ValueError if it was changed, or was sealed with another secret or purpose."""
    try:
        text = sealed if isinstance(sealed, str) else sealed.decode()
        mac, _, text = text.partition(" ")
        if hmac.compare_digest(mac.encode(), derive(secret, purpose, text).hex().encode()):
            return text
    except UnicodeError:
        pass
    raise ValueError("it is not signed with the secret of this launch (MYTHOS_SECRET, MYTHOS_SECRET_FILE)")


def challenge() -> str:
    """A random number that was never used before."""
    return secrets.token_hex(16)


def hello(key: bytes, rank: int, theirs: str, ours: str) -> bytes:
    """The line by which `rank` proves itself: `theirs` is rank 0's challenge, `ours` the one for rank 0 to sign."""
    return f"{rank} {ours} {derive(key, 'rank', str(rank), theirs, ours).hex()}\n".encode()


def read_hello(key: bytes, line: bytes, challenge: str) -> tuple[int, str]:
    """(rank, its challenge) of a line made by `hello`. Raises ValueError for any other."""
    found = re.fullmatch(rb"(\d{1,7}) ([0-9a-f]{32}) ([0-9a-f]{64})", line)
    if found:
        rank, ours, mac = int(found[1]), found[2].decode(), found[3].decode()
        if hmac.compare_digest(mac, derive(key, "rank", str(rank), challenge, ours).hex()):
            return rank, ours
    raise ValueError("no rank of this run")


def welcome(key: bytes, rank: int, theirs: str, ours: str) -> bytes:
    """Rank 0's answer to a hello: the same two numbers, signed for the other direction."""
    return derive(key, "rank 0", str(rank), theirs, ours).hex().encode()


class Channel:
    """Both directions of one connection after the handshake: lines with a MAC each."""

    def __init__(self, key: bytes, rank: int, theirs: str, ours: str, serves: bool):
        """`serves`: this is rank 0's end. `theirs`, `ours`: the two challenges, in the order of `hello`."""
        self._key = derive(key, "lines", str(rank), theirs, ours)
        self._out, self._in = ("0", "1") if serves else ("1", "0")
        self._sent = self._read = 0
        self._received = b""

    def line(self, text: str) -> bytes:
        """The next line to send; call `count_sent` once it is on its way."""
        return f"{self._mac(self._out, self._sent, text)} {text}\n".encode()

    def count_sent(self) -> None:
        self._sent += 1

    def feed(self, data: bytes) -> list[str]:
        """The texts of all lines that are now complete. Raises ValueError if one is forged or too long."""
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > _PEER_LINE_BYTES or any(len(line) > _PEER_LINE_BYTES for line in lines):
            raise ValueError(f"a line of more than {_PEER_LINE_BYTES} bytes")
        texts = []
        for line in lines:
            mac, _, rest = line.partition(b" ")
            text = rest.decode()  # a UnicodeDecodeError is a ValueError
            if not _DIGEST.fullmatch(mac) or not hmac.compare_digest(
                mac.decode(), self._mac(self._in, self._read, text)
            ):
                raise ValueError("a line that is not signed by the other end")
            self._read += 1
            texts.append(text)
        return texts

    def _mac(self, direction: str, number: int, text: str) -> str:
        return derive(self._key, direction, str(number), text).hex()
