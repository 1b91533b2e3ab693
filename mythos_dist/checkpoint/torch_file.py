"""Read a file of `torch.save` that is not trusted: nothing in it is run, and its size bounds the memory.

Such a file is a zip archive of a pickle and the bytes of tensors. torch's `weights_only` builds tensors, numbers, texts
and containers, and refuses everything else. With `placeholders`, objects of other classes become `Placeholder`s, which
hold their attributes: training programs put objects of their own beside tensors. Tensors are mapped, not read, and an
archive with compressed members is refused, so that nothing unpacks to more than the file has.
"""

import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import torch

from mythos_dist.errors import UserError, first_line

MAX_PICKLE_BYTES = 64 << 20  # names, shapes and settings; the bytes of tensors are not part of the pickle


class Placeholder:
    """In place of an object whose class is not loaded: its attributes."""

    def __new__(cls, *arguments: Any, **named: Any) -> "Placeholder":
        return object.__new__(cls)

    def __init__(self, *arguments: Any, **named: Any):
        pass


def read_torch_file(file: Path, *, placeholders: bool = False) -> Any:
    """The content of `file`, tensors on the CPU. Raises UserError if it cannot be read, or holds objects of other
    classes (unless `placeholders`)."""
    try:
        _check_archive(file)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(file)) if placeholders else []
        with torch.serialization.safe_globals([(Placeholder, name) for name in unknown]):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch and zipfile raise many types
        raise UserError(f"cannot be read as a file of torch.save ({first_line(error)[:300]})", str(file)) from None


def _check_archive(file: Path) -> None:
    """Raises ValueError or OSError unless a file is a zip archive of members that are stored as they are."""
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if not zipfile.is_zipfile(file):
        raise ValueError("it is not a zip archive, or truncated")
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > status.st_size:
                raise ValueError("it has compressed members")
            if member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"its pickle has {member.file_size} bytes; at most {MAX_PICKLE_BYTES} are allowed")
