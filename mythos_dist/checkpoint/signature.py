"""Signed checkpoints: HMAC-SHA256 with a secret key.

The hashes in `checkpoint.json` (xxh3_128) detect accidents, but anyone who can write the folder can also write new
hashes. With a key, the manifest gets a signature over its text and the SHA-256 of every file, and checkpoints that are
not signed with this key are refused. The signature is on the manifest's first line, beside the hash; readers without a
key ignore it.

The key is the content of a file, named by `checkpoint.key_file` or by the variable MYTHOS_CHECKPOINT_KEY_FILE. It is
never part of a config, a log or a message.

Decisions: CHECKPOINT-10.
"""

import hashlib
import hmac
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from mythos_dist.checkpoint.strict_json import open_nonblocking
from mythos_dist.errors import UserError

VARIABLE = "MYTHOS_CHECKPOINT_KEY_FILE"
MIN_BYTES, MAX_BYTES = 16, 4096
_CREATE_ONE = "create one with (umask 077; openssl rand -hex 32 > FILE)"
_PURPOSE = b"mythos_dist checkpoint, signature 1\n"  # keeps other messages signed with this key from being valid here

Sha256 = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")]


class SignatureError(UserError):
    """The checkpoint is not signed with the configured key. Never skipped in favor of an older checkpoint."""


@dataclass(frozen=True)
class Signature:
    """On the first line of checkpoint.json, beside the hash."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    algorithm: Literal["HMAC-SHA256"]
    files_sha256: dict[str, Sha256]  # by file name
    mac: Sha256


class Key:
    """A secret that signs and verifies manifests; its repr does not show it."""

    def __init__(self, secret: bytes):
        self._secret = secret

    def __repr__(self) -> str:
        return "Key(secret)"

    def sign(self, text: str, files_sha256: Mapping[str, str]) -> Signature:
        """Sign the manifest's text and the SHA-256 of each of its files."""
        return Signature("HMAC-SHA256", dict(files_sha256), self._mac(text, files_sha256))

    def verify(self, text: str, signature: Signature) -> bool:
        """Whether this key has signed this text and these files."""
        return hmac.compare_digest(self._mac(text, signature.files_sha256), signature.mac)

    @property
    def name(self) -> str:
        """Equal for equal keys; does not reveal the secret."""
        return hmac.new(self._secret, _PURPOSE + b"name", hashlib.sha256).hexdigest()[:16]

    def _mac(self, text: str, files_sha256: Mapping[str, str]) -> str:
        files = json.dumps(dict(files_sha256), sort_keys=True)  # one line: JSON escapes line ends
        return hmac.new(self._secret, _PURPOSE + f"{files}\n{text}".encode(), hashlib.sha256).hexdigest()


def signing_key(key_file: str | None = None) -> Key | None:
    """The key in `key_file`, or in the file that MYTHOS_CHECKPOINT_KEY_FILE names; None if neither is set.

    Raises UserError if that file does not hold a key, or if others than its owner can read it.
    """
    setting = VARIABLE if key_file is None else "checkpoint.key_file"
    name = os.environ.get(VARIABLE) if key_file is None else key_file
    if name is None:
        return None
    return Key(read_secret(name, setting))


def read_secret(name: str, setting: str) -> bytes:
    """The key in the file `name`, without line breaks at its end. `setting` names it in messages.

    Raises UserError if it does not hold a key, or if others than its owner can read it.
    """
    where = f"{setting}={name}"
    if not name.strip():
        raise UserError(f"{setting} is empty; unset it, or name a key file")
    try:
        secret = _read(Path(name).expanduser(), where)
    except FileNotFoundError:
        raise UserError(f"{where}: there is no such file; {_CREATE_ONE}") from None
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # a NUL in the name, an unknown home
        raise UserError(f"{where}: the key cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(secret) < MIN_BYTES:
        raise UserError(f"{where}: holds {len(secret)} bytes; a key needs at least {MIN_BYTES}; {_CREATE_ONE}")
    return secret


def _read(file: Path, where: str) -> bytes:
    with open(file, "rb", opener=open_nonblocking) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{where}: is not a regular file; name a key file")
        if status.st_mode & 0o077:
            raise UserError(
                f"{where}: its mode {stat.S_IMODE(status.st_mode):04o} gives others than its owner access; "
                f"chmod 600 {file}, and create a new key if others may have read it"
            )
        if status.st_uid not in (os.geteuid(), 0):
            raise UserError(f"{where}: is owned by user {status.st_uid}, not by you; copy it to a file of your own")
        secret = stream.read(MAX_BYTES + 1).rstrip(b"\r\n")
    if len(secret) > MAX_BYTES:
        raise UserError(f"{where}: holds more than {MAX_BYTES} bytes; is this a key? {_CREATE_ONE}")
    return secret
