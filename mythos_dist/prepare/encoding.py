"""Detect text files that are not UTF-8. UTF-16 and UTF-32 look like text with NULs next to every character."""

BOM = b"\xef\xbb\xbf"  # of UTF-8; not part of the text
HEAD_BYTES = 1 << 16
_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class WrongEncoding(OSError):
    """A file in another encoding than UTF-8, whose text cannot be restored by replacing invalid bytes."""


def check_encoding(piece: bytes, offset: int = 0) -> None:
    """Raises WrongEncoding if the bytes of a file from `offset` on are UTF-16, UTF-32 or binary."""
    head = piece[-offset % 4 : HEAD_BYTES]
    name = ""
    if offset == 0 and len(head) % 2 == 0:
        name = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "")
    if not name and (nuls := head.count(0)):
        name = _encoding_by_nuls(head, nuls)
    if name:
        remedy = f"iconv -f {name} -t UTF-8 FILE > NEW" if name.startswith("UTF") else "leave it out"
        raise WrongEncoding(f"is {name}, not UTF-8; {remedy}")


def _encoding_by_nuls(head: bytes, nuls: int) -> str:
    """The encoding of bytes without a byte order mark. In UTF-16 all NULs (of spaces and line ends at least) are at odd
    or all at even offsets; in UTF-32 every fourth byte is NUL."""
    odd = head[1::2].count(0)
    many = 5 * nuls > len(head)
    if odd in (0, nuls) and (many or (nuls >= 4 and not _is_utf8(head))):
        return "UTF-16LE" if odd else "UTF-16BE"
    if 2 * nuls >= len(head):
        for name, fourth_bytes in (("UTF-32LE", head[3::4]), ("UTF-32BE", head[::4])):
            if not any(fourth_bytes):
                return name
    return "binary (it contains NUL bytes)" if many else ""


def _is_utf8(head: bytes) -> bool:
    try:
        head[: max(0, len(head) - 3)].decode()
    except UnicodeDecodeError as error:
        return error.start > len(head) - 8  # the last character may be incomplete
    return True
