"""Opening the folders of shards of a run, checked against each other and the config; all problems are reported at once.

Nothing here opens a shard. The names and sizes of the listed files are compared with those on disk; hashes are checked
when a shard is first read (windows.py).
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

from mythos_dist.data.manifest import (
    SPLITS,
    ShardManifest,
    file_sha256,
    index_fingerprint,
    read_json,
    read_shard_manifest,
)
from mythos_dist.data.mix import Mix, MixChange, integer_weights
from mythos_dist.data.remote import cache_folder, open_remote, tokenizer_file
from mythos_dist.data.sequences import length_problems, num_sequences
from mythos_dist.data.shard import Shard, max_bytes
from mythos_dist.errors import UserError
from mythos_dist.units import count
from mythos_dist.urls import is_url


@dataclass(frozen=True)
class Corpus:
    """One folder of shards in a mix."""

    folder: Path  # of shards from a store: the one in data.cache
    weight: int  # relative to the other corpora's
    manifest: ShardManifest
    shards: dict[str, list[Shard]]  # by split; no held-out ones if they have less than one sequence
    # Of a mix that changes: the weight afterwards, and the positions in which it changes, the same for all corpora.
    end_weight: int = 0
    change: tuple[int, int] | None = None
    url: str = ""  # of the folder, if its shards are in a store

    @property
    def name(self) -> str:
        """The folder or URL as the user gave it."""
        return self.url or str(self.folder)


def open_corpora(
    mix: Mapping[str, float],
    *,
    seq_len: int,
    vocab_size: int,
    tokenizer_path: str | Path | None = None,
    splits: Sequence[str] = SPLITS,
    mix_end: Mapping[str, float] | None = None,
    change: tuple[int, int] | None = None,
    cache: str | Path | None = None,
) -> list[Corpus]:
    """The corpora of `mix` (folder or URL -> weight). Raises UserError with all problems of the folders and conflicts
    with the config.

    `mix_end`: the weights after the positions `change`; a folder may be in one of the mixes only. `splits`: those that
    will be read; a corpus may have no held-out split, see `with_windows`. `cache`: where the index and the tokenizer of
    a URL are kept, see `cache_folder`. Not a collective call.
    """
    problems_by_folder: list[tuple[str, str]] = []  # folder, problem
    corpora: list[Corpus] = []
    names = [*mix, *(name for name in mix_end or {} if name not in mix)]
    weights = integer_weights([mix.get(name, 0) for name in names])
    end_weights = integer_weights([mix_end.get(name, 0) for name in names]) if mix_end else [0] * len(names)
    for name, weight, end_weight in zip(names, weights, end_weights, strict=True):
        try:
            corpus, problems = _open_corpus(name, splits, cache)
            if tokenizer_path and not corpora:
                problems += _tokenizer_problems(corpus.manifest, tokenizer_path, cache)
        except UserError as error:
            text = str(error).removeprefix(f"{name}: ")
            problems_by_folder.append((name, text.removeprefix(f"{name.rstrip('/')}/") if is_url(name) else text))
            continue
        except OSError as error:
            problems_by_folder.append(
                (name, f"{error.filename} cannot be read ({error.strerror}); copy the whole folder, or convert again")
            )
            continue
        conflicts = list(_config_problems(corpus.manifest, seq_len, vocab_size))
        problems += conflicts
        shards = corpus.shards
        if not conflicts and not num_sequences(corpus.manifest, "heldout", seq_len):
            shards = {split: [] if split == "heldout" else shards[split] for split in shards}
        corpora.append(replace(corpus, weight=weight, end_weight=end_weight, change=change, shards=shards))
        problems += _differences(corpora)
        problems_by_folder += [(name, problem) for problem in problems]
    if problems_by_folder and len(names) == 1:
        raise UserError([problem for _, problem in problems_by_folder], names[0])
    if problems_by_folder:
        raise UserError([f"{name}: {problem}" for name, problem in problems_by_folder])
    return corpora


def _open_corpus(name: str, splits: Sequence[str], cache: str | Path | None) -> tuple[Corpus, list[str]]:
    """A folder of shards or its URL, with weight 0, and its problems. Raises UserError and OSError."""
    url = name if is_url(name) else ""
    if url:
        manifest, folder = open_remote(url, cache_folder(cache))
    else:
        folder = Path(name)
        manifest = read_shard_manifest(folder)
    shards, problems = {}, []
    missing = not (folder / "heldout").exists() and manifest.splits["heldout"].windows
    if missing and "heldout" in splits:
        problems.append(
            "heldout/ is missing, but manifest.json lists a held-out split; copy it too, or set "
            "train.eval_samples=0 to train without evaluation"
        )
    elif not url and not missing and index_fingerprint(folder) != manifest.fingerprint:
        problems.append("the shards changed after the conversion (index.json differs); convert again")
    else:
        for split in splits:
            shards[split] = read_index(folder, split, manifest.fingerprint, url)
            problems += _split_problems(split, shards[split], manifest)
    if not url:  # `mirror` has compared the index and the tokenizer with their hashes
        problems += _tokenizer_problems(manifest, folder / manifest.tokenizer, cache)
    return Corpus(folder, 0, manifest, shards, url=url), problems


def with_windows(corpora: Sequence[Corpus], split: str) -> list[Corpus]:
    """The corpora that have sequences in a split. All have some in train/; heldout/ may have none."""
    return [corpus for corpus in corpora if corpus.shards.get(split)]


def mix_of(corpora: Sequence[Corpus], split: str) -> Mix:
    """The mix of these corpora. Only training changes it: held-out samples are read in the mean of both ratios."""
    before, after = [corpus.weight for corpus in corpora], [corpus.end_weight for corpus in corpora]
    change = corpora[0].change
    if change is None:
        return Mix(before)
    if split == "train":
        return Mix(before, MixChange(*change, after))
    # One of the sums is 0 if no corpus of that mix has held-out samples.
    totals = max(1, sum(before)), max(1, sum(after))
    return Mix(
        integer_weights([Fraction(a, totals[0]) + Fraction(b, totals[1]) for a, b in zip(before, after, strict=True)])
    )


def fingerprint(corpora: Sequence[Corpus]) -> str:
    """Identifies what a run reads and in which order: one corpus's fingerprint, or `7 x 0a1b… + 3 x 2c3d…`, followed by
    `; 100-900: 5, 5` if the weights become equal in these positions."""
    if len(corpora) == 1:
        return corpora[0].manifest.fingerprint
    mixed = " + ".join(f"{corpus.weight} x {corpus.manifest.fingerprint}" for corpus in corpora)
    return mixed + _describe_change(corpora)


def _describe_change(corpora: Sequence[Corpus]) -> str:
    change = corpora[0].change
    if change is None:
        return ""
    return f"; {change[0]}-{change[1]}: {', '.join(str(corpus.end_weight) for corpus in corpora)}"


def data_changes(corpora: Sequence[Corpus], before: str) -> list[str]:
    """The differences between `corpora` and those with the fingerprint `before`, one line each; empty if none."""
    if fingerprint(corpora) == before:
        return []
    before, semicolon, change = before.partition(";")
    parts = [part.rpartition(" x ") for part in before.split(" + ")]
    old = {digest: int(weight or 1) for weight, _, digest in parts}
    new = {corpus.manifest.fingerprint: corpus for corpus in corpora}
    changes = [
        f"{corpus.name} has other shards than those that the run was trained on"
        for digest, corpus in new.items()
        if digest not in old
    ]
    changes += [
        f"the shards with fingerprint {digest[:12]}…, weight {weight} of {sum(old.values())}, are no longer in the mix"
        for digest, weight in old.items()
        if digest not in new
    ]
    if not changes:
        total = sum(corpus.weight for corpus in corpora)
        changes = [
            f"{corpus.name} has weight {corpus.weight} of {total}, but the run was trained with {old[digest]} of "
            f"{sum(old.values())}"
            for digest, corpus in new.items()
            if corpus.weight * sum(old.values()) != old[digest] * total
        ]
    if not changes and (now := _describe_change(corpora)) != semicolon + change:
        texts = [text.removeprefix("; ") or "none" for text in (now, semicolon + change)]
        changes = [
            "the change of the mix (data.mix_samples: integer weights in the ratio of data.mix_end) is "
            f"{texts[0]}, but the run was trained with {texts[1]}"
        ]
    if not changes:
        expected = ", ".join(new[digest].name for digest in old)
        changes = [f"the folders of data.mix are in another order; the run was trained with: {expected}"]
    return changes


def read_index(folder: Path, split: str, fingerprint: str, url: str = "") -> list[Shard]:
    """The shards in folder/split/index.json. `url`: where the folder is, if it is in a store. Raises UserError if it is
    not such a list, or OSError."""
    file = folder / split / "index.json"
    if split == "heldout" and not file.parent.exists():
        return []
    try:
        entries = read_json(file.read_bytes())["shards"]
        if not isinstance(entries, list):
            raise TypeError(f"shards={entries!r:.40}")
        for entry in entries:
            entry.setdefault("zip_data", None)
            if problem := _entry_problem(entry):
                raise ValueError(problem)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{split}/index.json is not a list of shards ({type(error).__name__}: {error}); convert again",
            url or str(folder),
        ) from None
    return [Shard(folder / split, fingerprint, entry, url) for entry in entries]


def _entry_problem(entry: dict[str, Any]) -> str:
    """What is wrong with an entry of an index from an untrusted source; "" if nothing. Later code sums and compares
    these values and joins the names to paths; the rest of an entry is checked when its shard is opened."""
    if not _is_count(entry["samples"]):
        return f"{entry['samples']!r:.40} samples"
    files = [entry["raw_data"]]
    if entry["zip_data"]:
        files.append(entry["zip_data"])
    for data in files:
        name, size, hashes = data["basename"], data["bytes"], data["hashes"]
        if not isinstance(name, str) or not name or "\0" in name:
            return f"basename {name!r:.40}"
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"basename {name} is outside the folder"
        if not _is_count(size):
            return f"{name}: {size!r:.40} bytes"
        if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
            return f"{name}: hashes {hashes!r:.40}"
    return ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _split_problems(split: str, shards: list[Shard], manifest: ShardManifest) -> Iterator[str]:
    windows, expected = sum(shard.entry["samples"] for shard in shards), manifest.splits[split].windows
    if windows != expected:
        yield f"{split}/index.json lists {count(windows, 'window')}, but manifest.json says {expected}; convert again"
    if not windows and split == "train":
        yield "train/ has 0 windows; convert more text, or with a smaller --heldout"
    if shards and shards[0].url:  # the rest is checked when a shard is downloaded
        for shard in shards:
            most = max_bytes(shard, manifest.window)
            if shard.entry["raw_data"]["bytes"] > most or shard.stored["bytes"] > most + (1 << 16):
                yield f"{shard.name}: index.json says more bytes than its samples can fill; convert again"
                return
        return
    sizes = _sizes(shards)
    missing = [shard.name for shard in shards if shard.name not in sizes]
    if missing:
        files = count(len(missing), "shard file")
        are = "is" if len(missing) == 1 else "are"
        yield f"{files} {are} missing in {split}/ (first: {missing[0]}); copy them too"
    wrong = [shard for shard in shards if sizes.get(shard.name, shard.stored["bytes"]) != shard.stored["bytes"]]
    if wrong:
        first = wrong[0]
        yield (
            f"{count(len(wrong), 'shard file')} in {split}/ {'differs' if len(wrong) == 1 else 'differ'} in size from "
            f"index.json (first: {first.name} has {sizes[first.name]} bytes instead of {first.stored['bytes']}); "
            "copy again, or convert again"
        )


def _sizes(shards: list[Shard]) -> dict[str, int]:
    """Name -> size in bytes of all files in the shards' folders. Each folder is listed once: a stat per shard takes
    minutes on a cluster's file system."""
    sizes = {}
    for subfolder, shard in {shard.stored["basename"].rpartition("/")[0]: shard for shard in shards}.items():
        prefix = f"{shard.folder.name}/{subfolder}/" if subfolder else f"{shard.folder.name}/"
        with contextlib.suppress(FileNotFoundError), os.scandir(shard.folder / subfolder) as files:
            for file in files:
                with contextlib.suppress(FileNotFoundError):  # a dangling link
                    sizes[prefix + file.name] = file.stat().st_size
    return sizes


def _tokenizer_problems(manifest: ShardManifest, path: str | Path, cache: str | Path | None) -> list[str]:
    if is_url(path):
        try:
            tokenizer_file(str(path), manifest.tokenizer_sha256, cache_folder(cache))
        except UserError as error:
            return [str(error)]
        return []
    file = Path(path)
    if not file.is_file():
        return [f"no tokenizer at {file}; copy it there, or convert again"]
    if file_sha256(file) != manifest.tokenizer_sha256:
        return [f"the shards were converted with another tokenizer than {file}; use that one, or convert again"]
    return []


def _config_problems(manifest: ShardManifest, seq_len: int, vocab_size: int) -> Iterator[str]:
    yield from length_problems(manifest, seq_len)
    if vocab_size < manifest.vocab_size:
        yield (
            f"model.vocab_size={vocab_size} is smaller than the vocabulary of the shards' tokenizer, "
            f"{manifest.vocab_size}; set model.vocab_size to {manifest.vocab_size} or more"
        )


def _differences(corpora: list[Corpus]) -> Iterator[str]:
    """Why the last of `corpora` cannot be mixed with the others."""
    first, last = corpora[0], corpora[-1]
    for key in ("seq_len", "tokenizer_sha256", "eos_id", "targets", "loss_mask"):
        here, there = getattr(last.manifest, key), getattr(first.manifest, key)
        if here != there:
            yield f"{key}={here}, but {first.name} has {there}; convert one of them with the other's value"
    for other in corpora[:-1]:
        if other.manifest.fingerprint == last.manifest.fingerprint:
            yield f"has the same shards as {other.name}; keep one of them, with the sum of their weights"
