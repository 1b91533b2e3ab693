"""What describes the shards of a store: manifest, index and tokenizer, which come before any shard.

Each rank reads `manifest.json` itself, so that a changed one is noticed. It has the hashes of the others, which are
downloaded once per node into the folder `CACHE/stores/FINGERPRINT` and kept there. That folder has the layout of a
folder of shards; the shards themselves join them as they are needed (shard_cache.py).

Decisions: DATA-28.
"""

import hashlib
import re
from pathlib import Path

from mythos_dist.data.manifest import (
    EMPTY_INDEX,
    ShardManifest,
    file_sha256,
    index_fingerprint,
    parse_shard_manifest,
    read_shard_manifest,
)
from mythos_dist.errors import UserError
from mythos_dist.files import lock_file, user_errors, write_atomically
from mythos_dist.private import default_shard_cache, make_private_folder
from mythos_dist.store.fetch import START_PATIENCE, Unavailable, read_object
from mythos_dist.urls import is_url, join_url

STORES = "stores"  # below data.cache: folders of shards from stores, by fingerprint
MAX_MANIFEST, MAX_INDEX, MAX_TOKENIZER = 1 << 28, 1 << 31, 1 << 28  # bytes


def cache_folder(cache: str | Path | None) -> Path:
    """The folder for shards on this node, created if it does not exist; None: below the system's temporary folder.

    Raises UserError if it cannot be used.
    """
    if cache is None:
        return make_private_folder(default_shard_cache(), "set data.cache to a folder of yours")
    folder = Path(cache)
    with user_errors(folder, "cannot be created (data.cache)"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_remote_manifest(url: str) -> ShardManifest:
    """The manifest of the folder of shards at `url`. Raises UserError, also if there is none."""
    file = join_url(url, "manifest.json")
    try:
        return parse_shard_manifest(read_object(file, MAX_MANIFEST), file)
    except Unavailable as error:
        if error.missing:
            raise UserError(
                "no manifest.json there: not a finished conversion, or not the whole folder was copied, or the URL is "
                f"wrong ({error.problems[0]})",
                url,
            ) from None
        raise


def mirror(url: str, manifest: ShardManifest, cache: Path) -> Path:
    """The folder in `cache` with the index and the tokenizer of `url`, downloaded if they are not there.

    Raises UserError if they cannot be read, or differ from what the manifest says.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", manifest.fingerprint):  # it becomes the name of a folder
        raise UserError(f"manifest.json: fingerprint={manifest.fingerprint!r:.40} is not a sha256; convert again", url)
    folder = cache / STORES / manifest.fingerprint[:16]
    with user_errors(folder, "cannot be written (data.cache)"):
        folder.mkdir(parents=True, exist_ok=True)
        if _is_complete(folder, manifest):
            return folder
        lock = lock_file(folder / ".index.lock", timeout=5 * START_PATIENCE)
        if lock is None:
            raise UserError(
                f"{folder} is locked by another process that downloads the index; run the same command again, or set "
                "another data.cache"
            )
        with lock:
            if not _is_complete(folder, manifest):
                _download_index(url, manifest, folder)
                tokenizer = _read_tokenizer(join_url(url, manifest.tokenizer), manifest.tokenizer_sha256)
                write_atomically(folder / manifest.tokenizer, tokenizer)
    return folder


def read_manifest(name: str) -> ShardManifest:
    """The manifest of a folder of shards, or of the URL of one. Raises UserError."""
    return read_remote_manifest(name) if is_url(name) else read_shard_manifest(name)


def tokenizer_path(given: str | None, folder: str, manifest: ShardManifest, cache: str | Path | None) -> Path:
    """The file of the tokenizer `given` (data.tokenizer), or else of the one in `folder`; each may be a URL, which is
    downloaded. Raises UserError."""
    in_folder = join_url(folder, manifest.tokenizer) if is_url(folder) else str(Path(folder, manifest.tokenizer))
    name = given or in_folder
    return tokenizer_file(name, manifest.tokenizer_sha256, cache_folder(cache)) if is_url(name) else Path(name)


def tokenizer_file(url: str, sha256: str, cache: Path) -> Path:
    """The tokenizer at `url` (data.tokenizer), downloaded to `cache`. Raises UserError if its sha256 is another one."""
    name = re.sub(r"[^\w.-]", "_", url.partition("?")[0].rpartition("/")[2], flags=re.ASCII)
    file = cache / "tokenizers" / f"{hashlib.sha256(sha256.encode()).hexdigest()[:16]}-{name}"
    with user_errors(file, "cannot be written (data.cache)"):
        if not (file.is_file() and file_sha256(file) == sha256):
            content = _read_tokenizer(url, sha256)
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, content)
    return file


def _is_complete(folder: Path, manifest: ShardManifest) -> bool:
    try:
        return (
            index_fingerprint(folder) == manifest.fingerprint
            and file_sha256(folder / manifest.tokenizer) == manifest.tokenizer_sha256
        )
    except OSError:
        return False


def _download_index(url: str, manifest: ShardManifest, folder: Path) -> None:
    """index.json of both splits. An empty held-out split may have none."""
    contents = {"train": read_object(join_url(url, "train", "index.json"), MAX_INDEX)}
    heldout = join_url(url, "heldout", "index.json")
    try:
        contents["heldout"] = read_object(heldout, MAX_INDEX)
    except Unavailable as error:
        if not error.missing or manifest.splits["heldout"].windows:
            raise
        contents["heldout"] = EMPTY_INDEX.encode()
    digest = hashlib.sha256(contents["train"] + contents["heldout"]).hexdigest()
    if digest != manifest.fingerprint:
        raise UserError("the shards changed after the conversion (index.json differs); convert again", url)
    for split, content in contents.items():
        (folder / split).mkdir(exist_ok=True)
        write_atomically(folder / split / "index.json", content)


def _read_tokenizer(url: str, sha256: str) -> bytes:
    content = read_object(url, MAX_TOKENIZER)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"the shards were converted with another tokenizer than {url}; use that one, or convert again")
    return content
