"""The files that the inputs select, and those left out with the reason: one rule for folders, patterns and URLs.

A folder selects all data below it, a pattern the files and folders that it matches. Links are followed; each file and
folder is read once. Left out are hidden names, formats that are not supported, files that only describe the data, and
shards. A file that is given by name, or named in a pattern without wildcards, is not left out for its name; if its
format is not supported, that is an error.

Decisions: DATA-13.
"""

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mythos_dist.data.manifest import LeftOut
from mythos_dist.errors import UserError, redact
from mythos_dist.files import valid_unicode
from mythos_dist.prepare.file_list import FileList, ListedFile
from mythos_dist.prepare.inputs import MAX_RATIO, Inputs, Source
from mythos_dist.prepare.local_files import list_local
from mythos_dist.prepare.names import KIND_NAMES, SUPPORTED_NAMES, escape_control_characters, file_kind
from mythos_dist.prepare.remote_files import list_url
from mythos_dist.units import count as count_of
from mythos_dist.urls import is_url

MAX_REASONS = 8  # a line each, on the console


@dataclass(frozen=True)
class Listing:
    """The files to read, the files that were left out, and the folders that cannot be read."""

    sources: list[Source]
    left_out: list[LeftOut]
    unreadable: list[LeftOut]  # folders
    all_named: bool  # whether every input is a single file

    def unreadable_problems(self) -> list[str]:
        """A problem, for a UserError, for each folder that cannot be read."""
        return [f"{one.name}: {one.reason} ({one.detail})" for one in self.unreadable]

    def lines(self) -> list[str]:
        """A summary for the console; empty if every input is a file and all are read."""
        if self.all_named and not self.left_out:
            return []
        kinds = Counter(KIND_NAMES[source.kind] for source in self.sources)
        by_kind = ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common())
        total = sum(source.size for source in self.sources)
        lines = [f"inputs: {count_of(len(self.sources), 'file')} ({by_kind}), {total / 1e6:,.1f} MB"]
        texts = [source.name for source in self.sources if source.kind == "text"]
        if texts and len(kinds) > 1:
            lines.append(
                f"note: plain text is converted too: {_first_names(texts)}; to leave it out, give a pattern as input"
            )
        reasons = Counter(one.reason for one in self.left_out).most_common()
        for reason, number in reasons[:MAX_REASONS]:
            names = [one.name for one in self.left_out if one.reason == reason]
            lines.append(f"left out: {number:,} {reason}: {_first_names(names)}")
        if len(reasons) > MAX_REASONS:
            lines.append(f"left out for {len(reasons) - MAX_REASONS} other reasons")
        return lines


def list_inputs(inputs: Inputs, out: str | Path | None = None, max_ratio: float = MAX_RATIO) -> Listing:
    """The files that paths, folders (recursively), patterns and URLs select: each once, in the order of the inputs.

    The files of a folder or pattern are sorted by name. `out`: a folder that is not read. Raises UserError with every
    input that selects no file.
    """
    given = [str(one) for one in ([inputs] if isinstance(inputs, (str, Path)) else inputs)]
    listed, problems = _list_all(given, None if out is None else str(out))
    if not given:
        problems = ["no input files; name some"]
    if not max_ratio >= 1:
        problems.insert(0, f"max_unpack_ratio={max_ratio} must be at least 1; inf allows everything")
    kinds = [file_kind(file.path) for file in listed.files]
    problems += [
        f"{file.path}: its name does not show its format; rename it to {SUPPORTED_NAMES}"
        for file, kind in zip(listed.files, kinds, strict=True)
        if kind is None
    ]
    if problems:
        raise UserError(problems)
    sources = []
    for file, kind, name in zip(listed.files, kinds, manifest_names([f.path for f in listed.files]), strict=True):
        assert kind is not None
        sources.append(Source(file.path, name, kind[0], kind[1], file.size, max_ratio))
    all_named = len(listed.files) == len(given) and all(len(file.parts) == 1 for file in listed.files)
    return Listing(sources, [_redacted(one) for one in listed.left_out], listed.unreadable, all_named)


def find_sources(inputs: Inputs) -> list[Source]:
    """The files of `list_inputs`. Raises UserError also for a folder that cannot be read."""
    listing = list_inputs(inputs)
    if listing.unreadable:
        raise UserError(listing.unreadable_problems())
    return listing.sources


def _list_all(inputs: Iterable[str], out: str | None) -> tuple[FileList, list[str]]:
    """The files of all inputs, each once, in order; and all problems."""
    result, problems = FileList(), []
    taken: dict[Hashable, ListedFile] = {}
    for given in inputs:
        try:
            local = given.removeprefix("file://")
            listed = list_url(given) if is_url(local) else list_local(local, out)
        except UserError as error:
            problems += [f"{given}: {problem}" for problem in error.problems]
            continue
        result.left_out += listed.left_out
        result.unreadable += listed.unreadable
        new_files = []
        for file in sorted(listed.files, key=lambda file: file.is_link):  # a real name is preferred to a link's
            if file.identity in taken:
                result.left_out.append(LeftOut(file.name, "the same file as another", taken[file.identity].name))
            else:
                taken[file.identity] = file
                new_files.append(file)
        result.files += sorted(new_files, key=lambda file: file.path)
    return result, problems


def _first_names(names: list[str]) -> str:
    shown = ", ".join(escape_control_characters(name) for name in names[:3])
    return redact(f"{shown} …" if len(names) > 3 else shown)


def _redacted(one: LeftOut) -> LeftOut:
    return LeftOut(valid_unicode(redact(one.name)), one.reason, valid_unicode(redact(one.detail)))


def manifest_names(paths: list[str]) -> list[str]:
    """Paths below the common parent folder, so that a corpus keeps its names when it is moved; URLs without query and
    user, which may contain secrets."""
    parts = [_plain_url(path).split("/") if is_url(path) else path.split("/") for path in paths]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return [valid_unicode("/".join(part[shared:])) for part in parts]


def _plain_url(url: str) -> str:
    parts = urlsplit(url)
    return redact(parts._replace(query="", fragment="").geturl()).replace("***@", "")
