"""Read a checkpoint, local or in a store: the pieces that a rank needs, from whichever files hold them; and find damage
in its files."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mythos_dist.checkpoint.manifest import CheckpointManifest, FileEntry, read_checkpoint_manifest
from mythos_dist.checkpoint.names import LATEST, MANIFEST_FILE, step_of
from mythos_dist.checkpoint.pieces import Piece, overlaps, size_without_padding
from mythos_dist.checkpoint.range_plan import Copy
from mythos_dist.checkpoint.signature import Key, SignatureError
from mythos_dist.checkpoint.sources import LocalSource, RemoteSource, TensorSource
from mythos_dist.checkpoint.strict_json import read_regular_file, shorten
from mythos_dist.checkpoint.tensor_file import TensorHeader
from mythos_dist.errors import UserError
from mythos_dist.files import reason
from mythos_dist.progress import Progress
from mythos_dist.store.fetch import Unavailable
from mythos_dist.store.folder import list_folder
from mythos_dist.urls import AnyPath, RemotePath


class Wanted(NamedTuple):
    """A piece of a tensor to read into `out`, flat fp32; elements that are padding keep their values."""

    kind: str
    name: str
    piece: Piece
    out: np.ndarray
    done: Callable[[], object] = lambda: None  # called when it has been read


class Checkpoint:
    """A checkpoint to read from. Its files are taken to be intact: call `find_damage` first."""

    def __init__(self, folder: AnyPath, manifest: CheckpointManifest | None = None, key: Key | None = None):
        """Raises UserError if the manifest cannot be read, or with a `key` if it was not signed with that key."""
        self.folder, self.key = folder, key
        self.manifest = manifest or read_checkpoint_manifest(folder, key)
        self._files: TensorSource = _source_of(folder, self.manifest)
        self._pieces: dict[str, list[tuple[str, Piece]]] = {}  # tensor name -> (file, the piece in it)
        for file, entry in self.manifest.files.items():
            for name, piece in entry.pieces.items():
                self._pieces.setdefault(name, []).append((file, piece))

    @property
    def is_remote(self) -> bool:
        """Whether it is in a store."""
        return isinstance(self.folder, RemotePath)

    def read(self, kind: str, name: str, piece: Piece, out: np.ndarray) -> None:
        """Fill `out`, flat fp32, with a piece of a tensor; elements that are padding keep their values.

        Raises UserError if the checkpoint does not hold all of it.
        """
        self._copy([Wanted(kind, name, piece, out)], lambda size: None)

    def read_all(self, wanted: Iterable[Wanted], progress: Progress = lambda size: None) -> None:
        """Read many pieces; `progress` is called with the bytes read since the last call. Raises as `read`.

        Of a checkpoint in a store, all are requested together, and `wanted` is consumed before the first is read.
        """
        if self.is_remote:
            every = list(wanted)
            self._copy(every, progress)
            for one in every:
                one.done()
            return
        for one in wanted:
            self.read(*one[:4])
            one.done()
            progress(one.out.nbytes)

    def _copy(self, wanted: Iterable[Wanted], progress: Progress) -> None:
        """What `read` and `read_all` do; subclasses replace it."""
        copies: dict[str, list[Copy]] = {}
        for one in wanted:
            for file, copy in self._copies(one):
                copies.setdefault(file, []).append(copy)
        self._files.copy(copies, progress)

    def _copies(self, wanted: Wanted) -> Iterator[tuple[str, Copy]]:
        """What the files hold of a piece. Raises UserError, at the end, if that is not all of it."""
        kind, name, piece, out, _ = wanted
        tensor = self.manifest.tensors.get(name)
        if tensor is None or kind not in tensor.kinds:
            raise UserError(f"holds no {kind} {name}; is it of another model?", str(self.folder))
        elements = 0
        for file, piece_in_file in self._pieces.get(name, ()):
            for source, target in overlaps(piece_in_file, piece, tensor.shape):
                yield file, Copy(f"{kind}/{name}", source, out, target)
                elements += target.elements
        needed = size_without_padding(piece, tensor.shape)
        if elements != needed:
            raise UserError(f"holds {elements} of {needed} elements needed of {kind} {name}", str(self.folder))

    def full_tensor(self, kind: str, name: str) -> np.ndarray:
        """An unsharded tensor, fp32."""
        piece = Piece.full(self.manifest.tensors[name].shape)
        out = np.empty(piece.last, np.float32)
        self.read(kind, name, piece, out)
        return out.reshape(piece.shape)

    def find_damage(
        self, files: Sequence[str] | None = None, hashes: bool = True, progress: Progress = lambda size: None
    ) -> list[str]:
        """What is wrong with `files`, or with all files if None: a line per damaged file.

        `hashes`: read every byte; else only sizes are checked. With a key every byte is read in any case, and a file
        that has the right hash but not the signed SHA-256 raises SignatureError: that is not an accident. Raises
        UserError if a store fails. `progress` is called with the bytes of each file.
        """
        names = sorted(self.manifest.files if files is None else files)
        problems = []
        with ThreadPoolExecutor(2) as pool:
            for name, problem in zip(
                names, pool.map(lambda name: self._file_problem(name, hashes), names), strict=True
            ):
                progress(self.manifest.files[name].bytes)
                problems += [problem] if problem else []
        return problems

    def _file_problem(self, name: str, hashes: bool) -> str:
        """What is wrong with a file; empty: nothing."""
        file, expected = self.folder / name, self.manifest.files[name]
        try:
            size = self._files.size(name)
            if size != expected.bytes:
                return f"{file} has {size} bytes instead of {expected.bytes}"
            if hashes or self.key:
                digests = self._files.hashes(name, sha256=bool(self.key))
                if digests.xxh3 != expected.hash:
                    return f"{file} is damaged: its hash is not the one in {MANIFEST_FILE}"
                if self.key and digests.sha256 != expected.sha256:
                    raise SignatureError("was changed after the checkpoint was signed", str(file))
                self._check_header(self._files.header(name), expected)
        except FileNotFoundError:
            return f"{file} is missing"
        except UserError:
            raise
        except OSError as error:
            return f"{file} cannot be read ({reason(error)})"
        except ValueError as error:
            return f"{file} is damaged ({error})"
        return ""

    def _check_header(self, header: TensorHeader, expected: FileEntry) -> None:
        """Raises ValueError unless a file holds as many elements of each tensor as the manifest says."""
        sizes = {}
        for name, piece in expected.pieces.items():
            for kind in self.manifest.tensors[name].kinds:
                sizes[f"{kind}/{name}"] = piece.last - piece.first
        if header.sizes != sizes:
            differing = sorted(header.sizes.items() ^ sizes.items())
            raise ValueError(f"its header and {MANIFEST_FILE} disagree about {shorten(differing[0][0])}")

    def raise_if_replaced(self) -> None:
        """Raises UserError if a checkpoint in a store has another manifest than when it was opened: a run that went
        back saves its steps again, and what was read may be of both. Call it after reading."""
        if not self.is_remote or not self.manifest.files:
            return
        try:
            if read_checkpoint_manifest(self.folder) == self.manifest:
                return
        except Unavailable:
            raise
        except UserError:
            pass
        raise UserError("was replaced or removed while it was read; run the same command again", str(self.folder))

    def raise_if_damaged(self, hashes: bool = True, progress: Progress = lambda size: None) -> None:
        """Raises UserError that names each damaged file; `hashes` and `progress` as in `find_damage`."""
        if problems := self.find_damage(hashes=hashes, progress=progress):
            raise UserError([*problems, "give another checkpoint of the run"], str(self.folder))


def _source_of(folder: AnyPath, manifest: CheckpointManifest) -> TensorSource:
    if isinstance(folder, Path):
        return LocalSource(folder)
    expected = {name: (entry.bytes, entry.hash) for name, entry in manifest.files.items()}
    headers = {name: _header_bytes(entry, manifest) for name, entry in manifest.files.items()}
    return RemoteSource(folder, expected, headers)


def _header_bytes(file: FileEntry, manifest: CheckpointManifest) -> int:
    """An upper bound of the length of a file's header (`tensor_file.py`), so that one request reads it."""
    about = len('"/":{"dtype":"F32","shape":[],"data_offsets":[,]},') + 3 * len(str(file.bytes))
    names = ((kind, name) for name in file.pieces for kind in manifest.tensors[name].kinds)
    return 24 + sum(about + len(kind) + len(name) for kind, name in names)


def remote_checkpoints_of(folder: RemotePath) -> list[RemotePath]:
    """A run's checkpoints in a store from the newest, those that are being uploaded included. Raises UserError."""
    by_step = sorted((step, name) for name in list_folder(folder).folders if (step := step_of(name)) is not None)
    return [folder / name for _, name in reversed(by_step)]


def checkpoints_of(folder: Path) -> list[Path]:
    """A run's checkpoints: the one that `latest` names, if it exists, then the others from the newest.

    Links are followed; a dangling link is in the list, so that it is reported. Raises UserError if `folder` exists but
    cannot be listed: the run would start from scratch otherwise.
    """
    try:
        with os.scandir(folder) as entries:
            steps = {entry.name: step_of(entry.name) for entry in entries if entry.is_symlink() or entry.is_dir()}
    except FileNotFoundError:
        if folder.is_symlink():
            raise UserError("is a dangling link; is a file system not mounted?", str(folder)) from None
        return []
    except NotADirectoryError:
        raise UserError("is not a folder; move it away, or give another run.dir", str(folder)) from None
    except OSError as error:
        raise UserError(f"cannot be listed ({reason(error)})", str(folder)) from None
    by_step = sorted(((step, name) for name, step in steps.items() if step is not None), reverse=True)
    names = [name for _, name in by_step if not (folder / name).is_file()]
    latest = latest_of(folder)
    if latest in names:
        names.remove(latest)
        names.insert(0, latest)
    return [folder / name for name in names]


def latest_of(folder: Path) -> str:
    """The name of the checkpoint that the file `latest` holds, or that a link `latest` points to; empty: none."""
    file = folder / LATEST
    try:
        if file.is_symlink() and file.is_dir():
            name = os.readlink(file).rstrip("/")
        else:
            name = read_regular_file(file, 4096).strip()
    except (OSError, ValueError):
        return ""
    return name if step_of(name) is not None and os.path.lexists(folder / name) else ""
