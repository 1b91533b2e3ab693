"""Read a checkpoint: the piece that a rank needs, from whichever files hold it; and find damage in its files."""

import hashlib
import math
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mythos_dist.checkpoint.manifest import CheckpointManifest, FileEntry, read_checkpoint_manifest
from mythos_dist.checkpoint.names import LATEST, MANIFEST_FILE, step_of
from mythos_dist.checkpoint.pieces import Piece, Region, overlaps, size_without_padding
from mythos_dist.checkpoint.signature import Key, SignatureError
from mythos_dist.checkpoint.strict_json import read_regular_file, shorten
from mythos_dist.checkpoint.tensor_file import TensorFile, file_hash
from mythos_dist.errors import UserError
from mythos_dist.files import reason


class Checkpoint:
    """A checkpoint to read from. Its files are taken to be intact: call `find_damage` first."""

    def __init__(self, folder: Path, manifest: CheckpointManifest | None = None, key: Key | None = None):
        """Raises UserError if the manifest cannot be read, or with a `key` if it was not signed with that key."""
        self.folder, self.key = folder, key
        self.manifest = manifest or read_checkpoint_manifest(folder, key)
        self._tensor_files: dict[str, TensorFile] = {}
        self._pieces: dict[str, list[tuple[str, Piece]]] = {}  # tensor name -> (file, the piece in it)
        for file, entry in self.manifest.files.items():
            for name, piece in entry.pieces.items():
                self._pieces.setdefault(name, []).append((file, piece))

    def read(self, kind: str, name: str, piece: Piece, out: np.ndarray) -> None:
        """Fill `out`, flat fp32, with a piece of a tensor; elements that are padding keep their values.

        Raises UserError if the checkpoint does not hold all of it.
        """
        tensor = self.manifest.tensors.get(name)
        if tensor is None or kind not in tensor.kinds:
            raise UserError(f"holds no {kind} {name}; is it of another model?", str(self.folder))
        elements_read = 0
        for file, piece_in_file in self._pieces.get(name, ()):
            for source, target in overlaps(piece_in_file, piece, tensor.shape):
                self._read_region(file, f"{kind}/{name}", source, out, target)
                elements_read += math.prod(part.stop - part.start for part in target.slices)
        needed = size_without_padding(piece, tensor.shape)
        if elements_read != needed:
            raise UserError(f"holds {elements_read} of {needed} elements needed of {kind} {name}", str(self.folder))

    def full_tensor(self, kind: str, name: str) -> np.ndarray:
        """An unsharded tensor, fp32."""
        piece = Piece.full(self.manifest.tensors[name].shape)
        out = np.empty(piece.last, np.float32)
        self.read(kind, name, piece, out)
        return out.reshape(piece.shape)

    def _read_region(self, name: str, tensor: str, source: Region, out: np.ndarray, target: Region) -> None:
        file = self.folder / name
        try:
            if name not in self._tensor_files:
                self._tensor_files[name] = TensorFile(file)
            self._tensor_files[name].read(tensor, source, out, target)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot be read ({reason(error)})", str(file)) from None

    def find_damage(self, files: Sequence[str] | None = None, hashes: bool = True) -> list[str]:
        """What is wrong with `files`, or with all files if None: a line per damaged file.

        `hashes`: read every byte; else only sizes are checked. With a key every byte is read in any case, and a file
        that has the right hash but not the signed SHA-256 raises SignatureError: that is no accident.
        """
        names = sorted(self.manifest.files if files is None else files)
        with ThreadPoolExecutor(2) as pool:
            problems = pool.map(lambda name: self._file_problem(name, hashes), names)
            return [problem for problem in problems if problem]

    def _file_problem(self, name: str, hashes: bool) -> str:
        """What is wrong with a file; empty: nothing."""
        file, expected = self.folder / name, self.manifest.files[name]
        try:
            status = file.stat()
            if not stat.S_ISREG(status.st_mode):
                return f"{file} is not a regular file"
            if status.st_size != expected.bytes:
                return f"{file} has {status.st_size} bytes instead of {expected.bytes}"
            if hashes or self.key:
                sha256 = hashlib.sha256() if self.key else None
                if file_hash(file, sha256) != expected.hash:
                    return f"{file} is damaged: its hash is not the one in {MANIFEST_FILE}"
                if sha256 and sha256.hexdigest() != expected.sha256:
                    raise SignatureError("was changed after the checkpoint was signed", str(file))
                self._check_header(TensorFile(file), expected)
        except FileNotFoundError:
            return f"{file} is missing"
        except UserError:
            raise
        except OSError as error:
            return f"{file} cannot be read ({reason(error)})"
        except ValueError as error:
            return f"{file} is damaged ({error})"
        return ""

    def _check_header(self, opened: TensorFile, expected: FileEntry) -> None:
        """Raises ValueError unless a file holds as many elements of each tensor as the manifest says."""
        sizes = {}
        for name, piece in expected.pieces.items():
            for kind in self.manifest.tensors[name].kinds:
                sizes[f"{kind}/{name}"] = piece.last - piece.first
        if opened.sizes != sizes:
            differing = sorted(opened.sizes.items() ^ sizes.items())
            raise ValueError(f"its header and {MANIFEST_FILE} disagree about {shorten(differing[0][0])}")

    def raise_if_damaged(self, hashes: bool = True) -> None:
        """Raises UserError that names each damaged file; `hashes` as in `find_damage`."""
        if problems := self.find_damage(hashes=hashes):
            raise UserError([*problems, "give another checkpoint of the run"], str(self.folder))


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
