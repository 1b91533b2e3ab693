"""`checkpoint.json`: what a checkpoint holds and where, written last; and which of a run's checkpoints are whole.

A checkpoint is a folder of tensor files. Tensors go by the model's canonical names; each file holds pieces of them
(`pieces.py`), and the manifest says which, so any layout finds what it needs in the files of any other. For a
parameter there are three tensors, `parameter/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME` in fp32; a buffer has one,
`buffer/NAME`. Every byte is covered by a hash, the manifest's own included.
"""

import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import xxhash
from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import NotRequired, TypedDict

from mythos_dist import __version__
from mythos_dist.checkpoint.consistency import contradictions
from mythos_dist.checkpoint.names import LATEST, MANIFEST, step_of
from mythos_dist.checkpoint.pieces import Index, Piece, Region, Size, real_numbers, shared
from mythos_dist.checkpoint.signature import VARIABLE, Key, Signature, SignatureError
from mythos_dist.checkpoint.strict_json import MAX_PROBLEMS, depth_problem, joined, parse, read_text, shorten, validate
from mythos_dist.checkpoint.tensor_file import TensorFile, file_hash
from mythos_dist.errors import UserError
from mythos_dist.files import reason

FILE = MANIFEST
FORMAT_VERSION = 1
PARAMETER, MOMENTS, BUFFER = "parameter", ("exp_avg", "exp_avg_sq"), "buffer"
MAX_BYTES = 512 << 20  # of a manifest; one of 4,096 ranks has about 40 MB
MAX_DEPTH = 8  # of its settings

_CLOSED = ConfigDict(extra="forbid")
_Name = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.]{0,499}$")]
_Text = Annotated[str, Field(strict=True)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class VersionError(UserError):
    """A checkpoint in a format that this version does not read. It is never passed over for an older one."""


@dataclass(frozen=True)
class TensorEntry:
    """A whole tensor."""

    __pydantic_config__ = _CLOSED

    shape: Index
    kinds: tuple[_Text, ...]  # of the tensors that go by its name


@dataclass(frozen=True)
class FileEntry:
    __pydantic_config__ = _CLOSED

    bytes: Size
    hash: Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{32}$")]  # xxh3_128
    pieces: dict[_Name, Piece]  # by name; the file holds a flat tensor for each of the name's kinds
    sha256: str | None = None  # if it is signed; it is written with the signature, on the first line


@dataclass(frozen=True)
class CheckpointManifest:
    """What stands in checkpoint.json."""

    __pydantic_config__ = _CLOSED

    step: Annotated[int, Field(strict=True, ge=0, lt=10**15)]
    tokens: Annotated[int, Field(strict=True, ge=0, lt=1 << 80)]
    start: Annotated[int, Field(strict=True, ge=0, lt=10**9)]  # which start of the run wrote it, from 1; 0: a tool
    layout: dict[_Text, Any]  # that wrote it: ranks and parallel.*
    config: dict[_Text, dict[_Text, Any]]
    data: _Text  # fingerprint of the shards; empty: any
    versions: dict[_Text, _Text]
    optimizer: dict[str, Any]  # _Optimizer
    tensors: dict[_Name, TensorEntry]
    files: dict[_Text, FileEntry]
    format_version: int = FORMAT_VERSION

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values() if PARAMETER in tensor.kinds)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    def to_text(self, key: Key | None = None) -> str:
        """The content of checkpoint.json: a line with the hash of the next, which is the manifest. With a `key` the
        first line also has a signature; the files need their sha256 then."""
        raw = asdict(self)
        files_sha256 = {name: file.pop("sha256") for name, file in raw["files"].items()}
        text = json.dumps(raw, sort_keys=True)
        seal: dict[str, Any] = {_HASH: _hash(text)}
        if key:
            assert all(files_sha256.values()), "every rank that writes needs the key"
            seal["signature"] = asdict(key.sign(text, files_sha256))
        return json.dumps(seal) + "\n" + text + "\n"


@with_config(_CLOSED)
class _Optimizer(TypedDict):
    """What `CheckpointManifest.optimizer` holds; deepspeed_seam.optimizer_state and the loop write it."""

    steps: Size
    skipped_steps: Size
    loss_scale: dict[Literal["cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"], _Number]
    recent_grad_norms: NotRequired[list[_Number]]


_HASH = "xxh3_128"
_MANIFEST, _OPTIMIZER, _SIGNATURE = TypeAdapter(CheckpointManifest), TypeAdapter(_Optimizer), TypeAdapter(Signature)


def _hash(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def read_checkpoint_manifest(folder: Path, key: Key | None = None) -> CheckpointManifest:
    """Raises UserError if `folder` has no manifest or a damaged one, VersionError if it is of another format, and with
    a `key` SignatureError if it was not signed with it."""
    file = folder / FILE
    try:
        text, raw, signature = _sealed(read_text(file, MAX_BYTES), file)
        if key:
            _check_signature(text, signature, key, folder)
        manifest = _checked(raw)
        if (step := step_of(folder.name)) not in (None, manifest.step):
            raise ValueError(f"it is of step {manifest.step}, and the folder's name says {step}")
        return _with_sha256(manifest, signature) if signature else manifest
    except FileNotFoundError:
        raise UserError("is missing; this is no checkpoint, or its manifest was lost", str(file)) from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot be read ({reason(error)})", str(file)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"is damaged ({' '.join(str(error).split())})", str(file)) from None


def _sealed(content: str, file: Path) -> tuple[str, dict[str, Any], Signature | None]:
    """The manifest's text, whose hash is right, its value, and its signature if it has one. ValueError if it is
    damaged, VersionError if it is of another format."""
    first, *lines = content.split("\n")
    seal = parse(first)
    if not isinstance(seal, dict):
        raise ValueError("its first line is not an object")
    if _HASH not in seal:
        # Damage does not leave valid JSON without the hash: another version may seal its manifests in another way.
        _check_version(seal if "format_version" in seal else parse("\n".join(lines)), file)
    if len(lines) != 2 or lines[1] or seal.get(_HASH) != _hash(lines[0]):
        raise ValueError("its hash is another")
    text, signature = lines[0], seal.get("signature")
    raw = parse(text)
    _check_version(raw, file)
    return text, raw, validate(_SIGNATURE, signature) if signature is not None else None


def _check_version(raw: Any, file: Path) -> None:
    """Raises VersionError unless `raw` is of this program's version of the format."""
    if not isinstance(raw, dict):
        raise ValueError("it is not an object")
    version = raw.get("format_version")
    if type(version) is int and version == FORMAT_VERSION:  # True and 1.0 are equal to 1, too
        return
    written = f"format_version={shorten(version)}" if "format_version" in raw else "no format_version"
    newer = type(version) is int and version > FORMAT_VERSION
    remedy = "install the newer mythos_dist that wrote it" if newer else "use the mythos_dist that wrote it"
    raise VersionError(
        f"has {written}, and mythos_dist {__version__} reads format_version={FORMAT_VERSION}; {remedy}, or move the "
        "checkpoint out of this folder",
        str(file),
    )


def _check_signature(text: str, signature: Signature | None, key: Key, folder: Path) -> None:
    if signature is None:
        raise SignatureError(
            f"is not signed, and a key is set (checkpoint.key_file or {VARIABLE}); if you trust it, make a "
            "signed copy with tools/reshape_checkpoint.py --ignore-signature",
            str(folder),
        )
    if not key.has_signed(text, signature):
        raise SignatureError(
            "its signature is wrong: it was signed with another key, or changed since; set the right key "
            f"(checkpoint.key_file or {VARIABLE}), or give another checkpoint",
            str(folder),
        )


def _checked(raw: dict[str, Any]) -> CheckpointManifest:
    """The manifest. ValueError with all that is wrong with it."""
    for part in ("layout", "config", "optimizer"):
        if problem := depth_problem(raw.get(part), MAX_DEPTH):
            raise ValueError(f"{part} {problem}")
    manifest = validate(_MANIFEST, raw)
    validate(_OPTIMIZER, manifest.optimizer)
    if any(file.sha256 for file in manifest.files.values()):
        raise ValueError("files: a sha256 belongs into the signature")
    if problems := list(itertools.islice(contradictions(manifest), MAX_PROBLEMS)):
        raise ValueError(joined(problems, len(problems)))
    return manifest


def _with_sha256(manifest: CheckpointManifest, signature: Signature) -> CheckpointManifest:
    if signature.files_sha256.keys() != manifest.files.keys():
        raise ValueError("its signature is of other files")
    files = {name: replace(file, sha256=signature.files_sha256[name]) for name, file in manifest.files.items()}
    return replace(manifest, files=files)


def damage(
    folder: Path, manifest: CheckpointManifest, files: Sequence[str], hashes: bool = True, key: Key | None = None
) -> list[str]:
    """What is wrong with some of a checkpoint's files, a line each; with `hashes`, every byte of them is read.

    With a `key` every byte is read in any case, and a file that has its hash but not the signed SHA-256 raises
    SignatureError: no accident does that.
    """

    def look(name: str) -> str | None:
        file, expected = folder / name, manifest.files[name]
        try:
            about = file.stat()
            if not stat.S_ISREG(about.st_mode):
                return f"{file} is not a regular file"
            if about.st_size != expected.bytes:
                return f"{file} has {about.st_size} bytes instead of {expected.bytes}"
            if hashes or key:
                sha256 = hashlib.sha256() if key else None
                if file_hash(file, sha256) != expected.hash:
                    return f"{file} is damaged: its hash is not the one that was written"
                if sha256 and sha256.hexdigest() != expected.sha256:
                    raise SignatureError("was changed since the checkpoint was signed", str(file))
                _check_header(TensorFile(file), expected, manifest)
        except FileNotFoundError:
            return f"{file} is missing"
        except UserError:
            raise
        except OSError as error:
            return f"{file} cannot be read ({reason(error)})"
        except ValueError as error:
            return f"{file} is damaged ({error})"
        return None

    with ThreadPoolExecutor(2) as pool:
        return [line for line in pool.map(look, files) if line]


def _check_header(opened: TensorFile, expected: FileEntry, manifest: CheckpointManifest) -> None:
    """ValueError unless a file holds, in fp32, as many elements of each tensor as the manifest says."""
    wanted = {
        f"{kind}/{name}": piece.last - piece.first
        for name, piece in expected.pieces.items()
        for kind in manifest.tensors[name].kinds
    }
    if opened.sizes != wanted:
        other = sorted(opened.sizes.items() ^ wanted.items())
        raise ValueError(f"its header and {FILE} disagree about {shorten(other[0][0])}")


class Checkpoint:
    """A checkpoint to read from. Its files are taken to be whole: `damage` says whether they are."""

    def __init__(self, folder: Path, manifest: CheckpointManifest | None = None, key: Key | None = None):
        """Raises UserError if there is no manifest that can be read, or with a `key` if it was not signed with it."""
        self.folder, self.key = folder, key
        self.manifest = manifest or read_checkpoint_manifest(folder, key)
        self._files: dict[str, TensorFile] = {}
        self._holders: dict[str, list[tuple[str, Piece]]] = {}
        for file, entry in self.manifest.files.items():
            for name, piece in entry.pieces.items():
                self._holders.setdefault(name, []).append((file, piece))

    def damage(self, files: Sequence[str] | None = None, hashes: bool = True) -> list[str]:
        """What is wrong with some of its files, or all; see `damage`."""
        return damage(self.folder, self.manifest, sorted(files or self.manifest.files), hashes, self.key)

    def raise_if_damaged(self, hashes: bool = True) -> None:
        """Read every byte, without `hashes` sizes and headers only. Raises UserError that names each damaged file."""
        if problems := self.damage(hashes=hashes):
            raise UserError([*problems, "give another checkpoint of the run"], str(self.folder))

    def read(self, kind: str, name: str, piece: Piece, out: np.ndarray) -> None:
        """Fill `out`, flat fp32, with a piece of a tensor; numbers outside of the whole tensor are left as they are.

        Raises UserError if the checkpoint does not hold all of it.
        """
        tensor = self.manifest.tensors.get(name)
        if tensor is None or kind not in tensor.kinds:
            raise UserError(f"holds no {kind} {name}; is it of another model?", str(self.folder))
        found = 0
        for file, source in self._holders.get(name, ()):
            for here, there in shared(source, piece, tensor.shape):
                self._read(file, f"{kind}/{name}", here, out, there)
                found += math.prod(part.stop - part.start for part in there.where)
        if found != (wanted := real_numbers(piece, tensor.shape)):
            raise UserError(f"holds {found} of {wanted} numbers that are needed of {kind} {name}", str(self.folder))

    def whole(self, kind: str, name: str) -> np.ndarray:
        """A whole tensor, fp32."""
        piece = Piece.whole(self.manifest.tensors[name].shape)
        out = np.empty(piece.last, np.float32)
        self.read(kind, name, piece, out)
        return out.reshape(piece.shape)

    def _read(self, name: str, tensor: str, source: Region, out: np.ndarray, target: Region) -> None:
        file = self.folder / name
        try:
            if name not in self._files:
                self._files[name] = TensorFile(file)
            self._files[name].read(tensor, source, out, target)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot be read ({reason(error)})", str(file)) from None


def checkpoints_of(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest first, but first of all the one that `latest` names if it is there.

    A link is taken for its target; one without a target is in the list, so that it is reported. Raises UserError if
    `folder` is there and cannot be listed: a run would begin anew then.
    """
    try:
        with os.scandir(folder) as entries:
            steps = {entry.name: step_of(entry.name) for entry in entries if entry.is_symlink() or entry.is_dir()}
    except FileNotFoundError:
        if folder.is_symlink():
            raise UserError("is a link to a folder that is not there; is a disk not mounted?", str(folder)) from None
        return []
    except NotADirectoryError:
        raise UserError("is not a folder; move it away, or give another run.dir", str(folder)) from None
    except OSError as error:
        raise UserError(f"cannot be listed ({reason(error)})", str(folder)) from None
    found = sorted((step, name) for name, step in steps.items() if step is not None)
    names = [name for _, name in reversed(found) if not (folder / name).is_file()]
    if (latest := latest_of(folder)) in names:
        names = [latest, *(name for name in names if name != latest)]
    return [folder / name for name in names]


def latest_of(folder: Path) -> str:
    """The name of a checkpoint that `latest` holds, or of the one that it links to; empty if there is none."""
    file = folder / LATEST
    try:
        name = os.readlink(file).rstrip("/") if file.is_symlink() and file.is_dir() else read_text(file, 4096).strip()
    except (OSError, ValueError):
        return ""
    return name if step_of(name) is not None else ""


def versions() -> dict[str, str]:
    """The libraries that a run's numbers depend on."""
    # Ours from the code: it may run from a checkout that is not installed.
    names = ("torch", "deepspeed", "mosaicml-streaming")
    return {"mythos_dist": __version__, **{name: importlib.metadata.version(name) for name in names}}
