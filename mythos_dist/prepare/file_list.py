"""The files that one input (a path, folder, pattern or URL) selects, without those that are not data."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial

from mythos_dist.data.manifest import LeftOut, count_reasons
from mythos_dist.errors import UserError
from mythos_dist.prepare.names import SUPPORTED_NAMES, file_kind, is_documentation, is_metadata, suffix_of
from mythos_dist.prepare.patterns import is_pattern

HIDDEN = "hidden (the name begins with . or _)"
NO_MATCH = "no such file or folder, and as a pattern it matches nothing"


@dataclass(frozen=True)
class ListedFile:
    """A file that an input selects."""

    path: str
    parts: tuple[str, ...]  # its name below the folder that was given
    size: int  # bytes
    identity: Hashable  # the same for every name of the same file
    is_link: bool = False

    @property
    def name(self) -> str:
        return "/".join(self.parts)


@dataclass
class FileList:
    """The files that an input selects, and those that were left out."""

    files: list[ListedFile] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    unreadable: list[LeftOut] = field(default_factory=list)  # folders


def leave_out_non_data(listed: FileList, pattern: list[str]) -> FileList:
    """`listed` without files that only describe the data. Raises UserError if no file remains.

    Files whose name is a component of the pattern, without wildcards, are kept.
    """
    spelled_out = {part for part in pattern if not is_pattern(part)}
    data = [file for file in listed.files if file_kind(file.path) and not _describes_data(file.parts[-1])]
    # All folders with parquet or JSON lines below them.
    record_folders = {file.parts[:i] for file in data if _format(file) != "text" for i in range(len(file.parts))}
    only_markdown = all(suffix_of(file.parts[-1]).startswith(".md") for file in data)
    reason_of = partial(_reason, record_folders=record_folders, only_markdown=only_markdown)
    kept = []
    for file in listed.files:
        if file.parts[-1] not in spelled_out and (reason := reason_of(file)):
            listed.left_out.append(LeftOut(file.name, reason))
        else:
            kept.append(file)
    if not kept and not listed.unreadable:
        if listed.left_out:
            reasons = count_reasons(listed.left_out)
            raise UserError(f"no file there is named {SUPPORTED_NAMES}; left out: {reasons}")
        raise UserError(NO_MATCH if pattern else f"no file there is named {SUPPORTED_NAMES}")
    return FileList(kept, listed.left_out, listed.unreadable)


def _format(file: ListedFile) -> str:
    kind = file_kind(file.path)
    return kind[0] if kind else ""


def _describes_data(name: str) -> bool:
    return is_documentation(name) or is_metadata(name)


def _reason(file: ListedFile, record_folders: set[tuple[str, ...]], only_markdown: bool) -> str:
    """Why a file of a folder is not data; "" if it is.

    `only_markdown`: all data files are Markdown, so README.md may be data, too.
    """
    name, kind = file.parts[-1], _format(file)
    if not kind:
        return f"format not read ({suffix_of(name)})"
    if only_markdown:
        return ""
    if kind == "text" and is_documentation(name):
        return "documentation"
    if kind == "jsonl" and is_metadata(name):
        return "metadata"
    if kind == "text" and file.parts[:-1] in record_folders and suffix_of(name).startswith(".md"):
        return "notes (.md) beside parquet or JSON lines"
    return ""
