"""Decompression in pieces, with a bound on the output: a small file may unpack to any size.

The traps: a library that reads a truncated file raises and drops what it had unpacked until then, and compressed files
may be concatenated (`cat a.gz b.gz`, pigz, pzstd), zstd frames and gzip members one after the other.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import pyarrow as pa

PIECE_BYTES = 1 << 20  # of output
INPUT_BYTES = 1 << 16
XZ_MEMORY = 256 << 20  # bytes; `xz -9` needs 65 MB. zstd refuses windows of more than 128 MB by itself

_DECODERS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(zlib.MAX_WBITS | 16),
    "bz2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY),
}
_ARROW = ("zstd", "brotli")


class TooLarge(OSError):
    """The content is larger than the limit."""


def unpack(open_packed: Callable[[], IO[bytes]], codec: str, limit: int, piece_bytes: int = 0) -> Iterator[bytes]:
    """The unpacked content in pieces of at most `piece_bytes` (PIECE_BYTES), at most `limit` bytes in all.

    `codec`: gzip, bz2, xz, zstd or brotli. Raises TooLarge after `limit` bytes, and OSError if the data is damaged or
    truncated, in the latter case after all of it. (What is damaged is often found out later: its content may be wrong.)
    """
    size = 0
    reader = _unpack_arrow if codec in _ARROW else _unpack_members
    for piece in reader(open_packed, codec, piece_bytes or PIECE_BYTES):
        size += len(piece)
        if size > limit:
            if kept := piece[: limit - size]:
                yield kept
            raise TooLarge(f"unpacks to more than {limit:,} bytes")
        yield piece


def _unpack_members(open_packed: Callable[[], IO[bytes]], codec: str, piece_bytes: int) -> Iterator[bytes]:
    """Python's decoders: one for each member; zeros after the last one are padding, as on tapes."""
    new = _DECODERS[codec]
    with open_packed() as packed:
        decoder, fresh, data = new(), True, b""
        first = True
        while data := data or packed.read(INPUT_BYTES):
            if fresh and not first and not (data := data.lstrip(b"\0")):
                continue
            fresh = first = False
            yield from _decode(decoder, data, piece_bytes)
            data = b""
            if decoder.eof:
                data, decoder, fresh = decoder.unused_data, new(), True
        if not fresh:
            raise OSError("truncated: the compressed data has no end")


def _decode(decoder: Any, data: bytes, piece_bytes: int) -> Iterator[bytes]:
    """All output of `data`, or until the member ends."""
    while True:
        try:
            piece = decoder.decompress(data, piece_bytes)
        except (zlib.error, lzma.LZMAError, OSError, ValueError) as error:
            raise OSError(f"damaged: {error}") from None
        if piece:
            yield piece
        # Output that did not fit in: zlib returns the rest of its input, the others keep it.
        data = getattr(decoder, "unconsumed_tail", b"")
        if decoder.eof or not (data or len(piece) == piece_bytes):
            return


def _unpack_arrow(open_packed: Callable[[], IO[bytes]], codec: str, piece_bytes: int) -> Iterator[bytes]:
    done = 0
    try:
        with open_packed() as packed:
            stream = pa.CompressedInputStream(packed, codec)
            while piece := stream.read(piece_bytes):
                done += len(piece)
                yield piece
        return
    except (pa.ArrowException, OSError) as error:
        problem = error
    # The failed call dropped what it had unpacked: again, up to there, and then byte by byte.
    with open_packed() as packed:
        stream = pa.CompressedInputStream(packed, codec)
        while done and (piece := stream.read(min(done, piece_bytes))):
            done -= len(piece)
        rest = bytearray()
        try:
            while len(rest) < piece_bytes and (piece := stream.read(1)):
                rest += piece
        except (pa.ArrowException, OSError):
            pass
    if rest:
        yield bytes(rest)
    raise OSError(str(problem))
