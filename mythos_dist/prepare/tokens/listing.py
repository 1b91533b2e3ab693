"""The sources that paths select: the format of each follows from its files.

PREFIX, PREFIX.bin, PREFIX.idx    Megatron         a folder: all PREFIX.idx in it, in order of their names
NAME.ds                           nanoset          a folder: all .ds in it
a folder with state.json          Hugging Face `datasets`, saved with save_to_disk
a folder with index.json          MDS
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from mythos_dist.data.manifest import LeftOut, TokenRules, read_json
from mythos_dist.errors import UserError
from mythos_dist.files import valid_unicode
from mythos_dist.prepare.inputs import Inputs, Source
from mythos_dist.prepare.listing import Listing, manifest_names
from mythos_dist.prepare.names import KIND_NAMES, FileKind
from mythos_dist.prepare.tokens.mds_folder import BYTES_DTYPES

DOCUMENTS = ("auto", "stored", "eos")
LOSS_MASK = "the loss mask of a nanoset, which is not read"


def list_token_sources(inputs: Inputs, rules: TokenRules) -> Listing:
    """The sources that `inputs` select, each once, in the order of the inputs. Raises UserError with all problems."""
    given = [str(one) for one in ([inputs] if isinstance(inputs, (str, Path)) else inputs)]
    problems = _rule_problems(rules) if given else ["no sources; name some"]
    kinds: dict[str, FileKind] = {}  # real path -> format
    left_out: list[LeftOut] = []
    for one in given:
        try:
            for kind, path in _find(one, rules.format if rules.format in FINDERS else "auto"):
                if (real := os.path.realpath(path)) in kinds:
                    left_out.append(LeftOut(valid_unicode(path), "the same source as another"))
                kinds.setdefault(real, kind)
        except UserError as error:
            problems += [f"{one}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(problems)
    sources = []
    for (path, kind), name in zip(kinds.items(), manifest_names(list(kinds)), strict=True):
        sources.append(Source(path, name, kind, None, sum(os.path.getsize(file) for file in _files(kind, path))))
        if kind == "nanoset" and os.path.exists(f"{path}.loss"):
            left_out.append(LeftOut(f"{name}.loss", LOSS_MASK))
    return Listing(sources, left_out, [], all_named=False)


def _rule_problems(rules: TokenRules) -> list[str]:
    choices = {"format": ("auto", *FINDERS), "documents": DOCUMENTS, "bytes_dtype": BYTES_DTYPES}
    return [
        f"{name}={getattr(rules, name)} is not supported; set it to {', '.join(allowed)}"
        for name, allowed in choices.items()
        if getattr(rules, name) not in allowed
    ]


def _find(given: str, wanted: str) -> list[tuple[FileKind, str]]:
    """(format, path) of the sources that a path selects. Raises UserError if there is none."""
    path = os.path.expanduser(given.rstrip("/") or given)
    inputs: list[tuple[FileKind, str]] = []
    for kind, find in FINDERS.items():
        if wanted in ("auto", kind):
            inputs.extend((kind, one) for one in find(path))
    formats = sorted({KIND_NAMES[kind] for kind, _ in inputs})
    if len(formats) > 1:
        raise UserError(f"holds {' and '.join(formats)}; choose one with --format")
    if not inputs:
        raise UserError(_why_nothing(path, wanted))
    return inputs


def _megatron(path: str) -> Iterable[str]:
    if os.path.isdir(path):
        return sorted(str(one).removesuffix(".idx") for one in Path(path).glob("*.idx"))
    prefix = path.removesuffix(".idx").removesuffix(".bin")
    if not os.path.isfile(f"{prefix}.idx"):
        if path.endswith(".bin") and os.path.isfile(path):
            raise UserError(f"its index {prefix}.idx is missing; copy it, too")
        return []
    if not os.path.isfile(f"{prefix}.bin"):
        raise UserError(f"its tokens {prefix}.bin are missing; copy them, too")
    return [prefix]


def _nanoset(path: str) -> Iterable[str]:
    files = sorted(map(str, Path(path).glob("*.ds"))) if os.path.isdir(path) else [path] * path.endswith(".ds")
    files = [file for file in files if os.path.isfile(file)]
    for file in files:
        if not os.path.isfile(f"{file}.index"):
            raise UserError(f"the index {file}.index is missing; copy it, too")
    return files


def _saved_dataset(path: str) -> Iterable[str]:
    splits = Path(path, "dataset_dict.json")
    if splits.is_file():
        try:
            names = ", ".join(str(Path(path, str(name))) for name in read_json(splits.read_bytes())["splits"])
        except (ValueError, KeyError, TypeError):
            names = "one of its folders"
        raise UserError(f"holds several splits; name one of them: {names}")
    return [path] if os.path.isfile(os.path.join(path, "state.json")) else []


def _mds(path: str) -> Iterable[str]:
    if not os.path.isfile(os.path.join(path, "index.json")):
        return []
    manifest = Path(path, "..", "manifest.json")
    if manifest.is_file() and b'"format_version"' in manifest.read_bytes():
        raise UserError("is a folder of shards of mythos_dist; train on them, or convert their text again")
    return [path]


def _why_nothing(path: str, wanted: str) -> str:
    if not os.path.exists(path):
        return "no such file, folder or prefix"
    what = KIND_NAMES.get(wanted, "token files that are read")
    if os.path.isdir(path):
        if any(Path(path).glob("*.arrow")) and wanted in ("auto", "datasets"):
            return "has Arrow files, but no state.json: a cache of `datasets`; write it with Dataset.save_to_disk"
        markers = ("index.json", "state.json", "dataset_dict.json")
        below = [str(one.parent) for marker in markers for one in sorted(Path(path).glob(f"*/{marker}"))]
        below += sorted({str(one.parent) for end in ("idx", "ds") for one in Path(path).glob(f"*/*.{end}")})
        if below:
            return f"has no {what} itself; name {', '.join(below[:4])}{' …' if len(below) > 4 else ''}"
    return f"no {what} here: Megatron .bin/.idx, nanoset .ds, a saved Hugging Face data set, or a folder of MDS"


def _files(kind: FileKind, path: str) -> list[str]:
    """The files whose sizes add up to that of a source."""
    if kind == "megatron":
        return [f"{path}.bin", f"{path}.idx"]
    if kind == "nanoset":
        return [path, f"{path}.index"]
    ends = ".arrow" if kind == "datasets" else (".mds", ".zstd", ".gz", ".bz2", ".br", ".snappy")
    return sorted(str(one) for one in Path(path).rglob("*") if one.name.endswith(ends) and one.is_file())


FINDERS: dict[FileKind, Callable[[str], Iterable[str]]] = {
    "megatron": _megatron,
    "nanoset": _nanoset,
    "datasets": _saved_dataset,
    "mds": _mds,
}
