"""Results of requests on disk, so that an evaluation that was stopped computes only what is missing.

A line per request in a file per number of loops, in a folder that names the weights: the hash of their files, the
dtype and the version of this package. Results are appended batch by batch. A kill truncates at most the last line,
which is not read.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

from mythos_dist import __version__
from mythos_dist.checkpoint.exported import ExportedWeights
from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.errors import UserError
from mythos_dist.evaluate.requests import TokenScores
from mythos_dist.files import lock_file, make_folders, read_json_lines, user_errors

LOCK = "evaluate.lock"
Result = TokenScores | list[int]  # of a ScoreRequest; new tokens of a Prompt


class Cache:
    """Results by number of loops and key. Without a folder, in memory only."""

    def __init__(self, folder: Path | None = None):
        """folder: of one set of weights; other processes must not write to it (see `lock`)."""
        self._folder = folder
        self._results: dict[int, dict[str, Result]] = {}
        self._files: dict[int, FileIO] = {}

    def get(self, n_loops: int, key: str) -> Result | None:
        """The result of a request; None: unknown."""
        return self._of(n_loops).get(key)

    def add(self, n_loops: int, results: Iterable[tuple[str, Result]]) -> None:
        """Record results of a batch. Raises UserError if they cannot be written.

        They are kept as they are read from the file, so that an evaluation that was stopped has the same scores.
        """
        new = {key: _as_stored(result) for key, result in results}
        self._of(n_loops).update(new)
        if self._folder is None:
            return
        file = self._file(n_loops)
        with user_errors(file):
            if n_loops not in self._files:
                self._files[n_loops] = _open(file)
            lines = [json.dumps({"key": key, **_to_json(result)}) + "\n" for key, result in new.items()]
            self._files[n_loops].write("".join(lines).encode())

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _of(self, n_loops: int) -> dict[str, Result]:
        if n_loops not in self._results:
            lines = read_json_lines(self._file(n_loops)) if self._folder else []
            read = ((line.get("key"), _from_json(line)) for line in lines)
            self._results[n_loops] = {
                key: result for key, result in read if isinstance(key, str) and result is not None
            }
        return self._results[n_loops]

    def _file(self, n_loops: int) -> Path:
        assert self._folder
        return self._folder / f"loops-{n_loops}.jsonl"


def _open(file: Path) -> FileIO:
    """Open a file to append lines to; a line that a kill has truncated gets its end."""
    make_folders(file.parent)
    stream = file.open("ab+", buffering=0)
    size = stream.seek(0, os.SEEK_END)
    if size:
        stream.seek(size - 1)
        if stream.read(1) != b"\n":
            stream.write(b"\n")
    return stream


def _as_stored(result: Result) -> Result:
    return _from_json(_to_json(result)) or result


def _to_json(result: Result) -> dict[str, Any]:
    if not isinstance(result, TokenScores):
        return {"tokens": result}
    # Nine digits are enough to read the same fp32 value again.
    logprobs = [float(f"{value:.9g}") for value in result.logprobs]
    return {"logprobs": logprobs, "correct": "".join("01"[flag] for flag in result.correct)}


def _from_json(line: dict[str, Any]) -> Result | None:
    """None for a line of another form."""
    logprobs, correct, tokens = line.get("logprobs"), line.get("correct"), line.get("tokens")
    if isinstance(tokens, list) and all(type(token) is int for token in tokens):
        return tokens
    if not (isinstance(logprobs, list) and isinstance(correct, str) and len(logprobs) == len(correct)):
        return None
    if not all(isinstance(value, float) for value in logprobs):
        return None
    return TokenScores(logprobs, [flag == "1" for flag in correct])


def weights_id(checkpoint: Checkpoint, dtype: str) -> str:
    """Identifies the weights of a checkpoint or an export, whatever its folder is called. Raises UserError if a store
    fails."""
    digest = hashlib.sha256(f"{__version__} {dtype}\n".encode())
    if isinstance(checkpoint, ExportedWeights):
        digest.update(json.dumps(checkpoint.manifest.config, sort_keys=True).encode())
        for name, version in checkpoint.versions().items():
            digest.update(f"{name} {version}\n".encode())
    else:
        digest.update(checkpoint.manifest.to_text().encode())  # has the hash of every file
    return digest.hexdigest()[:16]


def lock(folder: Path) -> TextIO:
    """Claim a folder of evaluations for this process while the returned file is open. Raises UserError if another
    evaluation writes to it, or if it cannot be written."""
    try:
        make_folders(folder)
        handle = lock_file(folder / LOCK)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror}); give another place with --out", str(folder)) from None
    if handle is None:
        raise UserError(f"another evaluation writes to {folder}; wait for it, or give another folder with --out")
    return handle
