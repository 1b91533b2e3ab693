"""`checkpoint.json`, the manifest: which tensors a checkpoint has, and which piece of each is in which file.

A checkpoint is a folder of tensor files and this manifest, which is written last. Tensors have the model's canonical
names. A parameter is stored as fp32 tensors, `parameter/NAME` and its moments, which are `exp_avg/NAME` and
`exp_avg_sq/NAME`, or with Muon `momentum_buffer/NAME`; a buffer as `buffer/NAME`. With `average.kind` each has an
`average/NAME`, too (`train/average.py`). Each file holds pieces of tensors (`pieces.py`). The manifest lists them, so a
rank of any layout finds its elements in the files of any other. Every byte is covered by a hash, the manifest's own
bytes included.

Decisions: CHECKPOINT-1, CHECKPOINT-9.
"""

import functools
import importlib.metadata
import itertools
import json
import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import xxhash
from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import NotRequired, TypedDict

from mythos_dist import __version__
from mythos_dist.checkpoint.consistency import contradictions
from mythos_dist.checkpoint.names import MANIFEST_FILE, step_of
from mythos_dist.checkpoint.pieces import Index, Piece, Size
from mythos_dist.checkpoint.signature import VARIABLE, Key, Signature, SignatureError
from mythos_dist.checkpoint.sources import read_text
from mythos_dist.checkpoint.strict_json import (
    MAX_PROBLEMS,
    depth_problem,
    parse_json,
    shorten,
    validate,
)
from mythos_dist.errors import UserError
from mythos_dist.files import reason
from mythos_dist.urls import AnyPath, RemotePath

if TYPE_CHECKING:  # reading a manifest needs no torch
    from torch import Tensor

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # version 1 has no lineage
PARAMETER, MOMENTS, BUFFER = "parameter", ("exp_avg", "exp_avg_sq", "momentum_buffer"), "buffer"
AVERAGE = "average"  # of a parameter or a buffer
MAX_BYTES = 512 << 20  # of a manifest; that of 4,096 ranks has about 40 MB
MAX_DEPTH = 8  # of nested settings

_CLOSED = ConfigDict(extra="forbid")
_Name = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.]{0,499}$")]
_Text = Annotated[str, Field(strict=True)]
_Tokens = Annotated[int, Field(strict=True, ge=0, lt=1 << 80)]
_Offset = Annotated[int, Field(strict=True, gt=-(1 << 80), lt=1 << 80)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class VersionError(UserError):
    """The checkpoint's format is not one that this version reads. Never skipped in favor of an older checkpoint."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the model, unsharded."""

    __pydantic_config__ = _CLOSED

    shape: Index
    kinds: tuple[_Text, ...]  # stored under its name: parameter and moments, or buffer; and its average

    @property
    def weights(self) -> str:
        """The kind of its current values: PARAMETER or BUFFER."""
        return PARAMETER if PARAMETER in self.kinds else BUFFER


@dataclass(frozen=True)
class LocalShard:
    """A rank's piece of a named tensor: for each kind a flat fp32 view of `piece.last - piece.first` elements."""

    piece: Piece
    full_shape: Index  # of the unsharded tensor
    values: "dict[str, Tensor]"  # by kind: parameter and moments, or buffer; and its average
    writes: bool  # whether this rank saves it: of the ranks that hold the same piece, one does

    @property
    def weights(self) -> "Tensor":
        """The current values of the parameter (its fp32 master copy) or of the buffer."""
        return self.values[PARAMETER if PARAMETER in self.values else BUFFER]


LocalShards = dict[str, LocalShard]  # what a rank holds of a run, by canonical name: views into model and optimizer


@dataclass(frozen=True)
class FileEntry:
    """A file of tensors: for each name in `pieces`, a flat tensor per kind."""

    __pydantic_config__ = _CLOSED

    bytes: Size
    hash: Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{32}$")]  # xxh3_128
    pieces: dict[_Name, Piece]  # by tensor name
    sha256: str | None = None  # of signed checkpoints; stored with the signature, on the first line of checkpoint.json


@dataclass(frozen=True)
class Ancestor:
    """A checkpoint or an export that a run began with (`start_from`)."""

    __pydantic_config__ = _CLOSED

    path: _Text  # of its folder, absolute
    step: Size
    tokens: _Tokens  # trained until then, its own ancestors' included
    state: _Text  # what the run took from it: start_from_state
    config: dict[_Text, dict[_Text, Any]]


@dataclass(frozen=True)
class Lineage:
    """Where a run comes from, and how far it is in its data; the defaults: a run with new weights, before step 1."""

    __pydantic_config__ = _CLOSED

    parents: tuple[Ancestor, ...] = ()  # the nearest one first
    # Where the current stage begins. Step s of the run is step first_step + s of schedule, loops and random numbers: a
    # negative number where a later stage counts from its own beginning.
    first_step: _Offset = 0
    first_sample: Size = 0  # position in the data order of its first batch
    first_tokens: _Tokens = 0  # of the run itself until then
    next_sample: Size = 0  # position in the data order of the step after the checkpoint
    tokens: _Tokens = 0  # trained so far, the ancestors' included

    @property
    def tokens_before(self) -> int:
        """Tokens that the run's ancestors were trained on."""
        return self.parents[0].tokens if self.parents else 0


@dataclass(frozen=True)
class CheckpointManifest:
    """The content of checkpoint.json."""

    __pydantic_config__ = _CLOSED

    step: Annotated[int, Field(strict=True, ge=0, lt=10**15)]
    tokens: _Tokens  # of the run itself
    start: Annotated[int, Field(strict=True, ge=0, lt=10**9)]  # the start of the run that wrote it, from 1; 0: a tool
    layout: dict[_Text, Any]  # of the writer: ranks and parallel.*
    config: dict[_Text, dict[_Text, Any]]
    data: _Text  # fingerprint of the shards; empty: any
    versions: dict[_Text, _Text]
    optimizer: dict[str, Any]  # see _Optimizer
    tensors: dict[_Name, TensorEntry]
    files: dict[_Text, FileEntry]
    lineage: Lineage = Lineage()
    format_version: int = FORMAT_VERSION

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values() if PARAMETER in tensor.kinds)

    def tensor_bytes(self, kinds: Collection[str] | None = None) -> int:
        """Bytes of the unsharded fp32 tensors of these kinds; None: of all."""
        return sum(
            4 * math.prod(tensor.shape)
            for tensor in self.tensors.values()
            for kind in tensor.kinds
            if kinds is None or kind in kinds
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the unsharded fp32 parameters and buffers."""
        return self.tensor_bytes((PARAMETER, BUFFER))

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    def to_text(self, key: Key | None = None) -> str:
        """The content of checkpoint.json: a line with the hash of the next line, which is the manifest.

        With a `key` the first line also has a signature, and every file needs its sha256.
        """
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
    """What `CheckpointManifest.optimizer` holds; zero_state.optimizer_state and the loop write it."""

    steps: Size
    skipped_steps: Size
    loss_scale: dict[Literal["cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"], _Number]
    recent_grad_norms: NotRequired[list[_Number]]
    average_samples: NotRequired[Size]  # in the average of the weights; see train/average.py


_HASH = "xxh3_128"
_MANIFEST, _OPTIMIZER, _SIGNATURE = TypeAdapter(CheckpointManifest), TypeAdapter(_Optimizer), TypeAdapter(Signature)


def _hash(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def read_checkpoint_manifest(folder: AnyPath, key: Key | None = None) -> CheckpointManifest:
    """Raises UserError if `folder` has no manifest or a damaged one, or if its store fails, VersionError if its format
    is another, and with a `key` SignatureError if it was not signed with that key."""
    return parse_checkpoint_manifest(lambda: read_text(folder / MANIFEST_FILE, MAX_BYTES), folder, key)


def parse_checkpoint_manifest(read: Callable[[], str], folder: AnyPath, key: Key | None = None) -> CheckpointManifest:
    """The manifest of `folder`, whose content `read` returns. Raises as `read_checkpoint_manifest`."""
    file = folder / MANIFEST_FILE
    try:
        text, raw, signature = _unseal(read(), file)
        if key:
            _check_signature(text, signature, key, folder)
        manifest = _validate(raw)
        step_in_name = step_of(folder.name)
        if step_in_name not in (None, manifest.step):
            raise ValueError(f"it is of step {manifest.step}, but the folder's name says {step_in_name}")
        return _with_sha256(manifest, signature) if signature else manifest
    except FileNotFoundError:
        upload = ", or it is still being uploaded" if isinstance(folder, RemotePath) else ""
        problem = f"is missing: the folder is not a checkpoint, or its manifest was lost{upload}"
        raise UserError(problem, str(file)) from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot be read ({reason(error)})", str(file)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"is damaged ({' '.join(str(error).split())})", str(file)) from None


def _unseal(content: str, file: AnyPath) -> tuple[str, dict[str, Any], Signature | None]:
    """The manifest as text, after a check of its hash; as JSON values; and its signature if it has one.

    Raises ValueError if it is damaged, VersionError if its format is another.
    """
    first, *lines = content.split("\n")
    seal = parse_json(first)
    if not isinstance(seal, dict):
        raise ValueError("its first line is not an object")
    if _HASH not in seal:
        # Damage does not leave valid JSON without the hash; another version may use another hash.
        _check_version(seal if "format_version" in seal else parse_json("\n".join(lines)), file)
    if len(lines) != 2 or lines[1] or seal.get(_HASH) != _hash(lines[0]):
        raise ValueError("its hash does not match")
    text, signature = lines[0], seal.get("signature")
    raw = parse_json(text)
    _check_version(raw, file)
    return text, raw, validate(_SIGNATURE, signature) if signature is not None else None


def _check_version(raw: Any, file: AnyPath) -> None:
    """Raises VersionError unless `raw` is of this program's version of the format."""
    if not isinstance(raw, dict):
        raise ValueError("it is not an object")
    version = raw.get("format_version")
    if type(version) is int and version in READABLE_VERSIONS:  # True and 1.0 are equal to 1, too
        return
    version_text = f"format_version={shorten(version)}" if "format_version" in raw else "no format_version"
    newer = type(version) is int and version > FORMAT_VERSION
    readable = " and ".join(map(str, READABLE_VERSIONS))
    remedy = "install the newer mythos_dist that wrote it" if newer else "use the mythos_dist that wrote it"
    raise VersionError(
        f"has {version_text}, but mythos_dist {__version__} reads format_version={readable}; {remedy}, or move the "
        "checkpoint out of this folder",
        str(file),
    )


def _check_signature(text: str, signature: Signature | None, key: Key, folder: AnyPath) -> None:
    if signature is None:
        raise SignatureError(
            f"is not signed, but a key is set (checkpoint.key_file or {VARIABLE}); if you trust it, write a "
            "signed copy with `mythos reshape --ignore-signature`",
            str(folder),
        )
    if not key.verify(text, signature):
        raise SignatureError(
            "its signature is wrong: it was signed with another key, or changed after it was signed; set the right "
            f"key (checkpoint.key_file or {VARIABLE}), or give another checkpoint",
            str(folder),
        )


def _validate(raw: dict[str, Any]) -> CheckpointManifest:
    """Raises ValueError with all problems."""
    for section in ("layout", "config", "optimizer", "lineage"):
        if problem := depth_problem(raw.get(section), MAX_DEPTH):
            raise ValueError(f"{section} {problem}")
    manifest = validate(_MANIFEST, raw)
    if "lineage" not in raw:  # version 1: the run began with new weights, and left out no batches
        samples = manifest.step * _global_batch(manifest)
        manifest = replace(manifest, lineage=Lineage(tokens=manifest.tokens, next_sample=samples))
    validate(_OPTIMIZER, manifest.optimizer)
    if any(file.sha256 for file in manifest.files.values()):
        raise ValueError("files: a sha256 belongs in the signature")
    if problems := list(itertools.islice(contradictions(manifest), MAX_PROBLEMS)):
        raise ValueError("; ".join(problems))
    return manifest


def _global_batch(manifest: CheckpointManifest) -> int:
    """As in its settings; 0 for imported weights, which have none."""
    size = manifest.config.get("train", {}).get("global_batch", 0)
    return size if isinstance(size, int) else 0


def _with_sha256(manifest: CheckpointManifest, signature: Signature) -> CheckpointManifest:
    if signature.files_sha256.keys() != manifest.files.keys():
        raise ValueError("its signature covers other files")
    files = {name: replace(file, sha256=signature.files_sha256[name]) for name, file in manifest.files.items()}
    return replace(manifest, files=files)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a run's results depend on."""
    # Ours from the code: it may run from a checkout that is not installed.
    names = ("torch", "deepspeed", "mosaicml-streaming")
    return {"mythos_dist": __version__, **{name: _version(name) for name in names}}


_version = functools.cache(importlib.metadata.version)  # it parses a file, three for each checkpoint
