"""Authenticated messages between the ranks of one launch: HMAC-SHA256 with a secret that the launcher distributes.

In the handshake each side signs a random challenge of the other, which proves that it knows the key without sending it,
so a recorded handshake cannot be replayed. After that every line carries a MAC over a counter and its text, so lines
cannot be forged, replayed, reordered or sent back. Nothing is encrypted: the messages are not confidential.

The trap: anyone who reaches the port of torch's store can read and write it, so a key that is only there gives no
protection from them. `launch_secret` therefore reads the launcher's own secret.
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

LINE_BYTES = 4096  # limit for a connection that is not authenticated
_RANK_LINE_BYTES = 1 << 22  # limit for one that is: a CollectiveState may list all ranks of a run
_DIGEST = re.compile(rb"[0-9a-f]{64}")


def launch_secret(environment: Mapping[str, str] | None = None) -> bytes:
    """The secret of this launch, the same on all ranks; empty if the launcher provides none.

    Derived from MYTHOS_SECRET_FILE (launch/deepspeed.sh), MYTHOS_SECRET (launch/slurm.sbatch, or the user) and
    torchrun's run id, which is random with --standalone. Raises UserError for a file that this user cannot read or that
    other users can.
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
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
                raise _unusable(
                    file,
                    "must be a regular file that belongs to you and that other users cannot read; create it with "
                    "`umask 077; openssl rand -hex 32 >FILE`, or unset MYTHOS_SECRET_FILE",
                )
            secret = stream.read(LINE_BYTES).strip()
            if not secret:
                raise _unusable(file, "is empty; create it with `openssl rand -hex 32`, or unset MYTHOS_SECRET_FILE")
            return secret
    except OSError as error:
        raise _unusable(
            file, f"cannot be read ({error.strerror}); set it to a file that all nodes see, or unset it"
        ) from None


def _unusable(file: Path, problem: str) -> UserError:
    error = UserError(f"MYTHOS_SECRET_FILE={file} {problem}")
    error.only_this_rank = True  # perhaps only on this node
    return error


def derive(secret: bytes, *parts: str) -> bytes:
    """A key or MAC for one purpose. Parts contain no NUL, so different parts never give the same bytes."""
    return hmac.digest(secret, "\0".join(parts).encode(), "sha256")


def sign(secret: bytes, purpose: str, text: str) -> str:
    """`text` after its MAC, to be stored where others can write."""
    return f"{derive(secret, purpose, text).hex()} {text}"


def verify_signature(secret: bytes, purpose: str, signed: bytes | str) -> str:
    """The text that `sign` was given. Raises ValueError if it was changed, or signed with another secret or purpose."""
    try:
        decoded = signed if isinstance(signed, str) else signed.decode()
        mac, _, text = decoded.partition(" ")
        if hmac.compare_digest(mac.encode(), derive(secret, purpose, text).hex().encode()):
            return text
    except UnicodeError:
        pass
    raise ValueError("it is not signed with the secret of this launch (MYTHOS_SECRET, MYTHOS_SECRET_FILE)")


def challenge() -> str:
    """A fresh random number."""
    return secrets.token_hex(16)


def hello(key: bytes, rank: int, server_challenge: str, rank_challenge: str) -> bytes:
    """The line by which `rank` authenticates itself: it answers rank 0's challenge and sends its own."""
    mac = derive(key, "rank", str(rank), server_challenge, rank_challenge).hex()
    return f"{rank} {rank_challenge} {mac}\n".encode()


def read_hello(key: bytes, line: bytes, server_challenge: str) -> tuple[int, str]:
    """(rank, its challenge) of a line from `hello`. Raises ValueError for any other line."""
    match = re.fullmatch(rb"(\d{1,7}) ([0-9a-f]{32}) ([0-9a-f]{64})", line)
    if match:
        rank, rank_challenge, mac = int(match[1]), match[2].decode(), match[3].decode()
        if hmac.compare_digest(mac, derive(key, "rank", str(rank), server_challenge, rank_challenge).hex()):
            return rank, rank_challenge
    raise ValueError("not a rank of this run")


def welcome(key: bytes, rank: int, server_challenge: str, rank_challenge: str) -> bytes:
    """Rank 0's answer to a hello: both challenges, signed for the other direction."""
    return derive(key, "rank 0", str(rank), server_challenge, rank_challenge).hex().encode()


class Channel:
    """Signs the lines that are sent over one connection after the handshake, and checks those received."""

    def __init__(self, key: bytes, rank: int, server_challenge: str, rank_challenge: str, is_rank_0: bool):
        """is_rank_0: whether this is rank 0's end."""
        self._key = derive(key, "lines", str(rank), server_challenge, rank_challenge)
        self._out, self._in = ("0", "1") if is_rank_0 else ("1", "0")
        self._num_sent = self._num_received = 0
        self._unparsed = b""

    def line(self, text: str) -> bytes:
        """The next line to send; call `count_sent` once it was sent."""
        return f"{self._mac(self._out, self._num_sent, text)} {text}\n".encode()

    def count_sent(self) -> None:
        self._num_sent += 1

    def feed(self, data: bytes) -> list[str]:
        """The texts of all lines that are now complete. Raises ValueError if one is forged or too long."""
        *lines, self._unparsed = (self._unparsed + data).split(b"\n")
        if len(self._unparsed) > _RANK_LINE_BYTES or any(len(line) > _RANK_LINE_BYTES for line in lines):
            raise ValueError(f"a line of more than {_RANK_LINE_BYTES} bytes")
        texts = []
        for line in lines:
            mac, _, rest = line.partition(b" ")
            text = rest.decode()  # a UnicodeDecodeError is a ValueError
            expected = self._mac(self._in, self._num_received, text)
            if not _DIGEST.fullmatch(mac) or not hmac.compare_digest(mac.decode(), expected):
                raise ValueError("a line that is not signed by the other end")
            self._num_received += 1
            texts.append(text)
        return texts

    def _mac(self, direction: str, number: int, text: str) -> str:
        return derive(self._key, direction, str(number), text).hex()
