"""Streaming decompression with a limit on the output: a small file may decompress to any size.

The traps: on a truncated file the libraries raise and drop what they had decompressed so far, and compressed files may
be concatenated (`cat a.gz b.gz`, pigz, pzstd): zstd frames or gzip members one after the other.

Decisions: DATA-16.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import IO, Any

import pyarrow as pa

CHUNK_BYTES = 1 << 20  # of output
INPUT_BYTES = 1 << 16
XZ_MEMORY = 256 << 20  # bytes; `xz -9` needs 65 MB. zstd itself refuses windows over 128 MB

_DECODERS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(zlib.MAX_WBITS | 16),
    "bz2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY),
}
_ERRORS = (zlib.error, lzma.LZMAError, OSError, ValueError)  # of the decoders
_ARROW = ("zstd", "brotli")


class TooLarge(OSError):
    """The content is larger than the limit."""


class Damaged(OSError):
    """Some compressed bytes are wrong. `intact`: bytes of content before the damaged gzip member (or the like), whose
    checksums were right."""

    def __init__(self, problem: str, intact: int):
        super().__init__(problem)
        self.intact = intact


def decompress(
    open_compressed: Callable[[], IO[bytes]], codec: str, limit: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[bytes]:
    """Yield the content in chunks of at most `chunk_bytes`, at most `limit` bytes in all.

    `codec`: gzip, bz2, xz, zstd or brotli. Raises TooLarge after `limit` bytes, Damaged, and OSError if the data is
    truncated; then everything readable is yielded first. Damage is often detected late: chunks yielded before may be
    wrong (`decompress_intact`).
    """
    size = 0
    reader = _decompress_arrow if codec in _ARROW else _decompress_members
    for chunk in reader(open_compressed, codec, chunk_bytes):
        size += len(chunk)
        if size > limit:
            if kept := chunk[: limit - size]:
                yield kept
            raise TooLarge(f"decompresses to more than {limit:,} bytes")
        yield chunk


def decompress_intact(
    open_compressed: Callable[[], IO[bytes]], codec: str, limit: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[bytes]:
    """As `decompress`, but yields nothing of what is damaged. Decompresses twice: checksums are at the end."""
    size, problem = 0, None
    try:
        for chunk in decompress(open_compressed, codec, limit, chunk_bytes):
            size += len(chunk)
    except Damaged as error:
        text = f"{error}; what it holds from there on may be wrong, so nothing of it is used"
        size, problem = error.intact, Damaged(text, error.intact)
    except OSError as error:  # truncated, too large, or cannot be read: what precedes is used
        problem = error
    with suppress(OSError) if problem else nullcontext():
        yield from decompress(open_compressed, codec, size, chunk_bytes)
    if problem:
        raise problem


def _decompress_members(open_compressed: Callable[[], IO[bytes]], codec: str, chunk_bytes: int) -> Iterator[bytes]:
    """With Python's decoders, one per member. Zeros after a member are padding, as on tapes."""
    decoder = None  # None: between members
    members = size = intact = 0
    data = b""
    with open_compressed() as compressed:
        while data := data or compressed.read(INPUT_BYTES):
            if decoder is None:
                data = data.lstrip(b"\0") if members else data
                if not data:
                    continue
                decoder = _DECODERS[codec]()
                members += 1
            try:
                for chunk in _decode(decoder, data, chunk_bytes):
                    size += len(chunk)
                    yield chunk
            except _ERRORS as error:
                raise Damaged(f"damaged: {error}", intact) from None
            data = b""
            if decoder.eof:
                data, decoder, intact = decoder.unused_data, None, size
    if decoder is not None:
        raise OSError("truncated: the end of the compressed data is missing")


def _decode(decoder: Any, data: bytes, chunk_bytes: int) -> Iterator[bytes]:
    """All output of `data`, up to the end of the member. Raises one of _ERRORS."""
    while True:
        if chunk := decoder.decompress(data, chunk_bytes):
            yield chunk
        # More output is left: zlib returns the rest of its input, the others keep it.
        data = getattr(decoder, "unconsumed_tail", b"")
        if decoder.eof or not (data or len(chunk) == chunk_bytes):
            return


def _decompress_arrow(open_compressed: Callable[[], IO[bytes]], codec: str, chunk_bytes: int) -> Iterator[bytes]:
    done = 0
    try:
        with open_compressed() as compressed:
            stream = pa.CompressedInputStream(compressed, codec)
            while chunk := stream.read(chunk_bytes):
                done += len(chunk)
                yield chunk
        return
    except (pa.ArrowException, OSError) as error:
        problem, size = str(error), done
    # The failed call dropped the output that it had. Decompress again up to there, and then byte by byte.
    with open_compressed() as compressed:
        stream = pa.CompressedInputStream(compressed, codec)
        while done and (chunk := stream.read(min(done, chunk_bytes))):
            done -= len(chunk)
        rest = bytearray()
        try:
            while len(rest) < chunk_bytes and (chunk := stream.read(1)):
                rest += chunk
        except (pa.ArrowException, OSError):
            pass
    if rest:
        yield bytes(rest)
    if "decompress failed" in problem:
        # Arrow does not tell where a frame ends; at the beginning of one, all frames before it were right.
        raise Damaged(f"damaged: {problem}", size + len(rest) if "Unknown frame descriptor" in problem else 0)
    raise OSError(problem)
