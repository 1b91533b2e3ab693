"""The folders that a run reads: read, checked against each other and the config, all problems at once.

Nothing here opens a shard. What a folder lists is compared with what is there, names and sizes; the shards' hashes are
checked when they are first read (windows.py).
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from mythos_dist.data.mix import integer_weights
from mythos_dist.data.windows import Shard
from mythos_dist.errors import UserError
from mythos_dist.units import count


@dataclass(frozen=True)
class Corpus:
    """One folder of a mix."""

    folder: Path
    weight: int  # relative to the other corpora's
    manifest: ShardManifest
    shards: dict[str, list[Shard]]  # by split


def open_corpora(
    mix: Mapping[str, float],
    *,
    seq_len: int,
    vocab_size: int,
    tokenizer_path: str | Path | None = None,
    splits: Sequence[str] = SPLITS,
) -> list[Corpus]:
    """The corpora of `mix` (folder -> weight), or UserError with all that is wrong with them or their fit to the
    config.

    `splits` are those that will be read; a corpus may be without a held-out split, see `with_windows`. It waits for no
    other rank, so ranks can check first and then agree.
    """
    found: list[tuple[str, str]] = []  # folder, problem
    corpora = []
    for (name, _), weight in zip(mix.items(), integer_weights(list(mix.values())), strict=True):
        folder = Path(name)
        try:
            manifest = read_shard_manifest(folder)
            shards = {}
            problems = []
            lost = not (folder / "heldout").exists() and manifest.splits["heldout"].windows
            if lost and "heldout" in splits:
                problems.append(
                    "heldout/ is missing, and the manifest says that it holds a held-out split; copy it too, or set "
                    "train.eval_samples=0 to train without evaluation"
                )
            elif not lost and index_fingerprint(folder) != manifest.fingerprint:
                problems.append("the shards changed after the conversion (index.json is another); convert again")
            else:
                for split in splits:
                    shards[split] = read_index(folder, split, manifest.fingerprint)
                    problems += _split_problems(split, shards[split], manifest)
        except UserError as error:
            found.append((name, str(error).removeprefix(f"{name}: ")))
            continue
        except OSError as error:
            found.append(
                (name, f"{error.filename} cannot be read ({error.strerror}); copy the whole folder, or convert again")
            )
            continue
        tokenizers = [folder / manifest.tokenizer, *([tokenizer_path] if tokenizer_path and not corpora else [])]
        problems += _tokenizer_problems(manifest, tokenizers)
        problems += _config_problems(manifest, seq_len, vocab_size)
        corpora.append(Corpus(folder, weight, manifest, shards))
        problems += _differences(corpora)
        found += [(name, problem) for problem in problems]
    if found and len(mix) == 1:
        raise UserError([problem for _, problem in found], next(iter(mix)))
    if found:
        raise UserError([f"{name}: {problem}" for name, problem in found])
    return corpora


def with_windows(corpora: Sequence[Corpus], split: str) -> list[Corpus]:
    """Those of `corpora` that have windows in a split. All have some in train/; heldout/ may be empty."""
    return [corpus for corpus in corpora if corpus.shards.get(split)]


def fingerprint(corpora: Sequence[Corpus]) -> str:
    """Of what a run reads in which order: one corpus's own, or `7 x 0a1b… + 3 x 2c3d…`."""
    if len(corpora) == 1:
        return corpora[0].manifest.fingerprint
    return " + ".join(f"{corpus.weight} x {corpus.manifest.fingerprint}" for corpus in corpora)


def changes(corpora: Sequence[Corpus], before: str) -> list[str]:
    """How `corpora` differ from those with the fingerprint `before`, a line each; empty if nothing does."""
    if fingerprint(corpora) == before:
        return []
    parts = [part.rpartition(" x ") for part in before.split(" + ")]
    old = {digest: int(weight or 1) for weight, _, digest in parts}
    new = {corpus.manifest.fingerprint: corpus for corpus in corpora}
    found = [
        f"{corpus.folder} holds other shards than those that the run was trained on"
        for digest, corpus in new.items()
        if digest not in old
    ]
    found += [
        f"the shards of fingerprint {digest[:12]}…, with weight {weight} of {sum(old.values())}, are not given any more"
        for digest, weight in old.items()
        if digest not in new
    ]
    if not found:
        total = sum(corpus.weight for corpus in corpora)
        found = [
            f"{corpus.folder} has weight {corpus.weight} of {total}, but the run was trained with {old[digest]} of "
            f"{sum(old.values())}"
            for digest, corpus in new.items()
            if corpus.weight * sum(old.values()) != old[digest] * total
        ]
    if not found:
        right = ", ".join(str(new[digest].folder) for digest in old)
        found = [f"the folders of data.mix stand in another order than the run was trained with: {right}"]
    return found


def read_index(folder: Path, split: str, fingerprint: str) -> list[Shard]:
    """The shards that folder/split/index.json lists. Raises UserError if they are not such a list, or OSError."""
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
            f"{split}/index.json lists no shards ({type(error).__name__}: {error}); convert again", str(folder)
        ) from None
    return [Shard(folder / split, fingerprint, entry) for entry in entries]


def _entry_problem(entry: dict[str, Any]) -> str:
    """What cannot be in an entry of an index that may come from anywhere. What is used later compares and sums these
    values and joins the names to paths; the rest of an entry is checked when its shard is opened."""
    if not _is_count(entry["samples"]):
        return f"{entry['samples']!r:.40} samples"
    for data in [entry["raw_data"], *([entry["zip_data"]] if entry["zip_data"] else [])]:
        name, size, hashes = data["basename"], data["bytes"], data["hashes"]
        if not isinstance(name, str) or not name or "\0" in name:
            return f"basename {name!r:.40}"
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"basename {name} is outside of the folder"
        if not _is_count(size):
            return f"{name}: {size!r:.40} bytes"
        if not isinstance(hashes, dict) or not all(isinstance(one, str) for one in hashes.values()):
            return f"{name}: hashes {hashes!r:.40}"
    return ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _split_problems(split: str, shards: list[Shard], manifest: ShardManifest) -> Iterator[str]:
    windows, expected = sum(shard.entry["samples"] for shard in shards), manifest.splits[split].windows
    if windows != expected:
        yield f"{split}/index.json lists {count(windows, 'window')}, but the manifest says {expected}; convert again"
    if not windows and split == "train":
        yield "train/ has 0 windows; convert more text, or with a smaller share of held-out text"
    sizes = _sizes(shards)
    missing = [shard.name for shard in shards if shard.name not in sizes]
    if missing:
        files = count(len(missing), "shard file")
        are = "is" if len(missing) == 1 else "are"
        yield f"{files} {are} missing in {split}/, the first is {missing[0]}; copy them too"
    wrong = [shard for shard in shards if sizes.get(shard.name, shard.stored["bytes"]) != shard.stored["bytes"]]
    if wrong:
        first = wrong[0]
        yield (
            f"{count(len(wrong), 'shard file')} in {split}/ {'has' if len(wrong) == 1 else 'have'} another size than "
            f"index.json says, the first is {first.name} with {sizes[first.name]} bytes instead of "
            f"{first.stored['bytes']}; copy again, or convert again"
        )


def _sizes(shards: list[Shard]) -> dict[str, int]:
    """Name -> bytes of every file beside the shards. One listing per folder: looking for each name by itself takes a
    cluster's file system minutes."""
    found = {}
    for inside, shard in {shard.stored["basename"].rpartition("/")[0]: shard for shard in shards}.items():
        prefix = f"{shard.folder.name}/{inside}/" if inside else f"{shard.folder.name}/"
        with contextlib.suppress(FileNotFoundError), os.scandir(shard.folder / inside) as files:
            for file in files:
                with contextlib.suppress(FileNotFoundError):  # a link to nothing
                    found[prefix + file.name] = file.stat().st_size
    return found


def _tokenizer_problems(manifest: ShardManifest, files: Sequence[str | Path]) -> Iterator[str]:
    for file in map(Path, files):
        if not file.is_file():
            yield f"no tokenizer at {file}; copy it there, or convert again"
        elif file_sha256(file) != manifest.tokenizer_sha256:
            yield f"these shards were made with another tokenizer than {file}; use that one, or convert again"


def _config_problems(manifest: ShardManifest, seq_len: int, vocab_size: int) -> Iterator[str]:
    if seq_len != manifest.seq_len:
        yield (
            f"train.seq_len={seq_len}, but these shards hold windows of seq_len={manifest.seq_len}; "
            f"set train.seq_len to {manifest.seq_len}, or make shards of {seq_len} with tools/make_shards.py"
        )
    if vocab_size < manifest.vocab_size:
        yield (
            f"model.vocab_size={vocab_size} is smaller than the tokenizer of these shards, which has "
            f"{manifest.vocab_size} pieces; set model.vocab_size to {manifest.vocab_size} or more"
        )


def _differences(corpora: list[Corpus]) -> Iterator[str]:
    """Why the last of `corpora` cannot be mixed with the first."""
    first, last = corpora[0], corpora[-1]
    for key in ("seq_len", "tokenizer_sha256", "eos_id", "targets"):
        here, there = getattr(last.manifest, key), getattr(first.manifest, key)
        if here != there:
            yield f"{key}={here}, but {first.folder} has {there}; convert one of them like the other"
    for other in corpora[:-1]:
        if other.manifest.fingerprint == last.manifest.fingerprint:
            yield f"holds the same shards as {other.folder}; give one of them, with the sum of their weights"
