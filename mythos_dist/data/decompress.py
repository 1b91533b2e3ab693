"""Streaming decompression with a limit on the output: a small file may decompress to any size.

The traps: on a truncated file the libraries raise and drop what they had decompressed so far, and compressed files may
be concatenated (`cat a.gz b.gz`, pigz, pzstd): zstd frames or gzip members one after the other.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
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
_ARROW = ("zstd", "brotli")


class TooLarge(OSError):
    """The content is larger than the limit."""


def decompress(
    open_compressed: Callable[[], IO[bytes]], codec: str, limit: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[bytes]:
    """Yield the content in chunks of at most `chunk_bytes`, at most `limit` bytes in all.

    `codec`: gzip, bz2, xz, zstd or brotli. Raises TooLarge after `limit` bytes, and OSError if the data is damaged or
    truncated; of truncated data everything readable is yielded first. Damage is often detected late: chunks yielded
    before may be wrong.
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


def _decompress_members(open_compressed: Callable[[], IO[bytes]], codec: str, chunk_bytes: int) -> Iterator[bytes]:
    """With Python's decoders, one per member. Zeros after a member are padding, as on tapes."""
    decoder = None  # None: between members
    members = 0
    data = b""
    with open_compressed() as compressed:
        while data := data or compressed.read(INPUT_BYTES):
            if decoder is None:
                data = data.lstrip(b"\0") if members else data
                if not data:
                    continue
                decoder = _DECODERS[codec]()
                members += 1
            yield from _decode(decoder, data, chunk_bytes)
            data = b""
            if decoder.eof:
                data, decoder = decoder.unused_data, None
    if decoder is not None:
        raise OSError("truncated: the end of the compressed data is missing")


def _decode(decoder: Any, data: bytes, chunk_bytes: int) -> Iterator[bytes]:
    """All output of `data`, up to the end of the member."""
    while True:
        try:
            chunk = decoder.decompress(data, chunk_bytes)
        except (zlib.error, lzma.LZMAError, OSError, ValueError) as error:
            raise OSError(f"damaged: {error}") from None
        if chunk:
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
        problem = error
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
    raise OSError(str(problem))
