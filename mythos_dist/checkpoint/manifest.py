"""`checkpoint.json`: what a checkpoint holds and where, written last; and which of a run's checkpoints are whole.

A checkpoint is a folder of tensor files. Tensors go by the model's canonical names; each file holds pieces of them
(`pieces.py`), and the manifest says which, so any layout finds what it needs in the files of any other. For a
parameter there are three tensors, `parameter/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME` in fp32; a buffer has one,
`buffer/NAME`. Every byte is covered by a hash, the manifest's own included.
"""

import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mythos_dist import __version__
from mythos_dist.checkpoint.pieces import Index, Piece, real_numbers, shared
from mythos_dist.checkpoint.tensor_file import TensorFile, file_hash
from mythos_dist.errors import UserError

FILE = "checkpoint.json"
FORMAT_VERSION = 1
PARAMETER, MOMENTS, BUFFER = "parameter", ("exp_avg", "exp_avg_sq"), "buffer"


@dataclass(frozen=True)
class Tensor:
    """A whole tensor."""

    shape: Index
    kinds: tuple[str, ...]  # of the tensors that go by its name


@dataclass(frozen=True)
class File:
    bytes: int
    hash: str  # xxh3_128
    pieces: dict[str, Piece]  # by name; the file holds a flat tensor for each of the name's kinds


@dataclass(frozen=True)
class Manifest:
    """What stands in checkpoint.json."""

    step: int
    tokens: int
    start: int  # which start of the run wrote it, from 1
    layout: dict[str, Any]  # that wrote it: ranks and parallel.*
    config: dict[str, dict[str, Any]]
    data: str  # fingerprint of the shards; empty: any
    versions: dict[str, str]
    optimizer: dict[str, Any]  # steps, skipped_steps, loss_scale
    tensors: dict[str, Tensor]
    files: dict[str, File]
    format_version: int = FORMAT_VERSION

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values() if PARAMETER in tensor.kinds)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    def to_text(self) -> str:
        """The content of checkpoint.json."""
        text = json.dumps(asdict(self), sort_keys=True)
        return json.dumps({"xxh3_128": _seal(text)}) + "\n" + text + "\n"


def _seal(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError if `folder` has no manifest, or one that is damaged or of another version."""
    file = folder / FILE
    try:
        seal, text, rest = file.read_text(encoding="utf-8").split("\n")
        if rest or json.loads(seal)["xxh3_128"] != _seal(text):
            raise ValueError("its hash is another")
        raw = json.loads(text)
        if raw["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version={raw['format_version']} is not {FORMAT_VERSION}")
        raw["tensors"] = {name: Tensor(tuple(t["shape"]), tuple(t["kinds"])) for name, t in raw["tensors"].items()}
        raw["files"] = {
            name: File(f["bytes"], f["hash"], {n: _piece(p) for n, p in f["pieces"].items()})
            for name, f in raw["files"].items()
        }
        return Manifest(**raw)
    except FileNotFoundError:
        raise UserError("is missing; this is no checkpoint, or its manifest was lost", str(file)) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"is damaged ({' '.join(str(error).split())})", str(file)) from None


def _piece(raw: Mapping[str, Any]) -> Piece:
    return Piece(tuple(raw["shape"]), tuple(raw["start"]), raw["first"], raw["last"])


def damage(folder: Path, manifest: Manifest, files: Sequence[str], hashes: bool = True) -> list[str]:
    """What is wrong with some of a checkpoint's files, a line each; with `hashes`, every byte of them is read."""

    def look(name: str) -> str | None:
        file, expected = folder / name, manifest.files[name]
        try:
            size = file.stat().st_size
            if size != expected.bytes:
                return f"{file} has {size} bytes instead of {expected.bytes}"
            if hashes and file_hash(file) != expected.hash:
                return f"{file} is damaged: its hash is not the one that was written"
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
        return None

    with ThreadPoolExecutor(2) as pool:
        return [line for line in pool.map(look, files) if line]


class Checkpoint:
    """A checkpoint to read from. Its files are taken to be whole: `damage` says whether they are."""

    def __init__(self, folder: Path, manifest: Manifest | None = None):
        """Raises UserError if there is no manifest that can be read."""
        self.folder = folder
        self.manifest = manifest or read_manifest(folder)
        self._files: dict[str, TensorFile] = {}
        self._holders: dict[str, list[tuple[str, Piece]]] = {}
        for file, entry in self.manifest.files.items():
            for name, piece in entry.pieces.items():
                self._holders.setdefault(name, []).append((file, piece))

    def must_be_whole(self) -> None:
        """Read every byte. Raises UserError that names each file that is damaged."""
        if problems := damage(self.folder, self.manifest, list(self.manifest.files)):
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
                self._file(file).read(f"{kind}/{name}", here, out, there)
                found += math.prod(part.stop - part.start for part in there.where)
        if found != (wanted := real_numbers(piece, tensor.shape)):
            raise UserError(f"holds {found} of {wanted} numbers that are needed of {kind} {name}", str(self.folder))

    def whole(self, kind: str, name: str) -> np.ndarray:
        """A whole tensor, fp32."""
        piece = Piece.whole(self.manifest.tensors[name].shape)
        out = np.empty(piece.last, np.float32)
        self.read(kind, name, piece, out)
        return out.reshape(piece.shape)

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = TensorFile(self.folder / name)
        return self._files[name]


def checkpoints_of(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest first, but first of all the one that `latest` names if it is there."""
    found = sorted((path for path in folder.glob("step-????????") if path.is_dir()), reverse=True)
    try:
        named = folder / (folder / "latest").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return found
    return [named, *(path for path in found if path != named)] if named in found else found


def versions() -> dict[str, str]:
    """The libraries that a run's numbers depend on."""
    # Ours from the code: it may run from a checkout that is not installed.
    names = ("torch", "deepspeed", "mosaicml-streaming")
    return {"mythos_dist": __version__, **{name: importlib.metadata.version(name) for name in names}}
