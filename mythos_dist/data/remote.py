"""What describes the shards of a store: manifest, index and tokenizer, which come before any shard.

Each rank reads `manifest.json` itself, so that a changed one is noticed. It has the hashes of the others, which are
downloaded once per node into the folder `CACHE/stores/FINGERPRINT` and kept there. That folder has the layout of a
folder of shards; the shards themselves join them as they are needed (shard_cache.py).

A node that has not read a URL before requests all of them at once: one after the other, they would cost four times the
store's latency. What it has read is noted in `CACHE/stores/urls`.

Decisions: DATA-28, DATA-32.
"""

import contextlib
import hashlib
import io
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
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
from mythos_dist.store import s3
from mythos_dist.store.backends import read_into
from mythos_dist.store.fetch import START_PATIENCE, Unavailable, read_object
from mythos_dist.urls import is_url, join_url, scheme_of

STORES = "stores"  # below data.cache: folders of shards from stores, by fingerprint
URLS = "urls"  # below STORES: the fingerprint that each URL had
MAX_MANIFEST, MAX_INDEX, MAX_TOKENIZER = 1 << 28, 1 << 31, 1 << 28  # bytes
INDEXES = ("train/index.json", "heldout/index.json")
# What is requested before the manifest has arrived, which names the tokenizer, and the most bytes of each.
GUESSES = {**dict.fromkeys(INDEXES, MAX_INDEX), **dict.fromkeys(("tokenizer.model", "tokenizer.json"), MAX_TOKENIZER)}
Read = Callable[[str, int], bytes]  # a file below the URL, at most as many bytes


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


def open_remote(url: str, cache: Path) -> tuple[ShardManifest, Path]:
    """The manifest of the folder of shards at `url`, and the folder in `cache` with its index and tokenizer, which are
    downloaded if they are not there. Raises UserError if they cannot be read, or differ from what the manifest says."""
    note = cache / STORES / URLS / hashlib.sha256(url.encode()).hexdigest()[:16]
    with user_errors(note, "cannot be written (data.cache)"):
        note.parent.mkdir(parents=True, exist_ok=True)
        with _locked(note.with_name(f"{note.name}.lock")) if not _is_cached(note) else contextlib.nullcontext():
            if _is_cached(note):  # by another rank of this node, in the meantime
                manifest = read_remote_manifest(url)
                return manifest, mirror(url, manifest, cache)
            if scheme_of(url) == "s3":
                with contextlib.suppress(Exception):  # the first request reports it
                    s3.client()  # 0.1 s of CPU: once, and not in each thread
            requested = {name: _start(lambda name=name: _read_once(url, name)) for name in GUESSES}
            manifest = read_remote_manifest(url)
            requested = {name: one for name, one in requested.items() if name in (*INDEXES, manifest.tokenizer)}

            def read(name: str, limit: int) -> bytes:
                if name in requested:
                    with contextlib.suppress(Exception):  # each library has its own; the next attempt reports it
                        return requested.pop(name).result()
                return read_object(join_url(url, name), limit)

            folder = mirror(url, manifest, cache, read)
            write_atomically(note, manifest.fingerprint[:16])
            return manifest, folder


def mirror(url: str, manifest: ShardManifest, cache: Path, read: Read | None = None) -> Path:
    """The folder in `cache` with the index and the tokenizer of `url`, downloaded if they are not there.

    Raises UserError if they cannot be read, or differ from what the manifest says.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", manifest.fingerprint):  # it becomes the name of a folder
        raise UserError(f"manifest.json: fingerprint={manifest.fingerprint!r:.40} is not a sha256; convert again", url)
    read = read or (lambda name, limit: read_object(join_url(url, name), limit))
    folder = cache / STORES / manifest.fingerprint[:16]
    with user_errors(folder, "cannot be written (data.cache)"):
        folder.mkdir(parents=True, exist_ok=True)
        if _is_complete(folder, manifest):
            return folder
        with _locked(folder / ".index.lock"):
            if not _is_complete(folder, manifest):
                for name, content in read_indexes(url, manifest, read).items():
                    (folder / name).parent.mkdir(exist_ok=True)
                    write_atomically(folder / name, content)
                content, source = read(manifest.tokenizer, MAX_TOKENIZER), join_url(url, manifest.tokenizer)
                tokenizer = _checked_tokenizer(content, source, manifest.tokenizer_sha256)
                write_atomically(folder / manifest.tokenizer, tokenizer)
    return folder


def read_indexes(url: str, manifest: ShardManifest, read: Read | None = None) -> dict[str, bytes]:
    """index.json of both splits, by name. An empty held-out split may have none. UserError if they have changed."""
    read = read or (lambda name, limit: read_object(join_url(url, name), limit))
    contents = {}
    for name in INDEXES:
        try:
            contents[name] = read(name, MAX_INDEX)
        except Unavailable as error:
            if not error.missing or name != INDEXES[1] or manifest.splits["heldout"].windows:
                raise
            contents[name] = EMPTY_INDEX.encode()
    if hashlib.sha256(b"".join(contents.values())).hexdigest() != manifest.fingerprint:
        raise UserError("the shards changed after the conversion (index.json differs); convert again", url)
    return contents


def _is_cached(note: Path) -> bool:
    """Whether what the URL had, when it was read last, is in the cache."""
    try:
        return (note.parents[1] / note.read_text() / "train" / "index.json").is_file()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    lock = lock_file(file, timeout=5 * START_PATIENCE)
    if lock is None:
        raise UserError(
            f"{file} is locked by another process that downloads the index; run the same command again, or set "
            "another data.cache"
        )
    with lock:
        yield


def _start(run: Callable[[], bytes]) -> "Future[bytes]":
    """`run()` in a thread that does not delay the end of the process."""
    future: Future[bytes] = Future()

    def work() -> None:
        try:
            future.set_result(run())
        except Exception as error:  # each library has its own
            future.set_exception(error)

    threading.Thread(target=work, name="index", daemon=True).start()
    return future


def _read_once(url: str, name: str) -> bytes:
    content = io.BytesIO()
    read_into(join_url(url, name), content, GUESSES[name])
    return content.getvalue()


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
            content = _checked_tokenizer(read_object(url, MAX_TOKENIZER), url, sha256)
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


def _checked_tokenizer(content: bytes, url: str, sha256: str) -> bytes:
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"the shards were converted with another tokenizer than {url}; use that one, or convert again")
    return content
