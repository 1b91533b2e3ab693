"""Detect text files that are not UTF-8.

UTF-32, and UTF-16 with a space, a line end or another ASCII character, have NULs. Other UTF-16 text is detected by its
characters, which also the text of an older multi-byte encoding may give: that one must be ruled out.

Decisions: DATA-17.
"""

import codecs

BOM = b"\xef\xbb\xbf"  # of UTF-8; not part of the text
HEAD_BYTES = 1 << 16
# Where the characters of UTF-16 text without ASCII are; arbitrary pairs of bytes are in all of Unicode. Alphabets,
# accents, quotation marks and dashes, kana, Han characters, Hangul, full-width forms, emoji. Without 0x900 to 0xDFF
# (Indic scripts): a line end of text of one byte per character is their high byte.
_TEXT_RANGES = (
    (0xA0, 0x8FF), (0xE00, 0x1FFF), (0x2010, 0x2026), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
    (0xFF00, 0xFFEF), (0x1F300, 0x1FAFF),
)  # fmt: skip
_MULTI_BYTE = ("cp932", "gbk", "big5", "euc_jp", "euc_kr")
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of UTF-8
_MIN_CHARACTERS = 8  # fewer are not enough evidence
_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class WrongEncoding(OSError):
    """A file in another encoding than UTF-8, whose text cannot be restored by replacing invalid bytes."""


def check_encoding(piece: bytes, offset: int = 0) -> None:
    """Raises WrongEncoding if the bytes of a file from `offset` on are UTF-16, UTF-32 or binary."""
    head = piece[-offset % 4 : HEAD_BYTES]
    # At another offset than 0 a character of UTF-8 may have begun before.
    continued = len(head[:3]) - len(head[:3].lstrip(_CONTINUATION_BYTES)) if offset else 0
    is_utf8 = _is_utf8(head[continued:])
    name = ""
    if offset == 0 and len(head) % 2 == 0:
        name = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "")
    if not name and (nuls := head.count(0)):
        name = _encoding_by_nuls(head, nuls, is_utf8)
    if not name and (not is_utf8 or 5 * _num_controls(head) > len(head)):
        name = _encoding_by_characters(head)
    if name:
        remedy = f"iconv -f {name} -t UTF-8 FILE > NEW" if name.startswith("UTF") else "leave it out"
        raise WrongEncoding(f"is {name}, not UTF-8; {remedy}")


def _encoding_by_nuls(head: bytes, nuls: int, is_utf8: bool) -> str:
    """The encoding of bytes without a byte order mark. In UTF-16 all NULs (of spaces and line ends at least) are at odd
    or all at even offsets; in UTF-32 every fourth byte is NUL."""
    odd = head[1::2].count(0)
    many = 5 * nuls > len(head)
    if odd in (0, nuls) and (many or (nuls >= 4 and not is_utf8)):
        return "UTF-16LE" if odd else "UTF-16BE"
    if 2 * nuls >= len(head):
        for name, fourth_bytes in (("UTF-32LE", head[3::4]), ("UTF-32BE", head[::4])):
            if not any(fourth_bytes):
                return name
    return "binary (it contains NUL bytes)" if many else ""


def _encoding_by_characters(head: bytes) -> str:
    """The encoding of UTF-16 text without ASCII characters and byte order mark; empty: it is none."""
    blocks = {}  # encoding -> number of blocks of 256 characters; in the wrong byte order they are many
    for encoding in ("UTF-16LE", "UTF-16BE"):
        text = _decoded(head, encoding)
        inside = sum(any(first <= ord(character) <= last for first, last in _TEXT_RANGES) for character in text)
        if len(text) >= _MIN_CHARACTERS and inside >= 0.95 * len(text):
            blocks[encoding] = len({ord(character) >> 8 for character in text})
    others = (_decoded(head, name) for name in _MULTI_BYTE)
    if not blocks or any(other and not _num_controls(other.encode()) for other in others):
        return ""
    return min(blocks, key=blocks.__getitem__)


def _decoded(head: bytes, encoding: str) -> str:
    """The text, without a last character that is incomplete; empty: these bytes are not in this encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return ""


def _num_controls(head: bytes) -> int:
    """How many bytes are control characters that no text has."""
    return len(head) - len(head.translate(None, bytes({*range(32), 127} - set(b"\t\n\v\f\r\x1a\x1b"))))


def _is_utf8(head: bytes) -> bool:
    try:
        head[: max(0, len(head) - 3)].decode()
    except UnicodeDecodeError as error:
        return error.start > len(head) - 8  # the last character may be incomplete
    return True
