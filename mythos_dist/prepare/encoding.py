"""Is a text file UTF-8? UTF-16 and UTF-32 look like text with a NUL beside every character."""

BOM = b"\xef\xbb\xbf"  # of UTF-8; no part of the text
HEAD_BYTES = 1 << 16
_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class WrongEncoding(OSError):
    """A file that is not UTF-8, in a way that repairing single bytes would make nonsense of."""


def check_encoding(piece: bytes, offset: int = 0) -> None:
    """Raises WrongEncoding if what a file holds from `offset` on is UTF-16, UTF-32 or no text."""
    head = piece[-offset % 4 : HEAD_BYTES]
    name = ""
    if offset == 0 and len(head) % 2 == 0:
        name = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "")
    if not name and (nuls := head.count(0)):
        name = _by_nuls(head, nuls)
    if name:
        remedy = f"iconv -f {name} -t UTF-8 FILE > NEW" if name.startswith("UTF") else "leave it out"
        raise WrongEncoding(f"is {name}, not UTF-8; {remedy}")


def _by_nuls(head: bytes, nuls: int) -> str:
    """Without a mark. In UTF-16 all NULs are at odd or all at even places, those of spaces and line ends at least; in
    UTF-32 every fourth byte is one."""
    odd = head[1::2].count(0)
    many = 5 * nuls > len(head)
    if odd in (0, nuls) and (many or (nuls >= 4 and not _is_utf8(head))):
        return "UTF-16LE" if odd else "UTF-16BE"
    if 2 * nuls >= len(head):
        for name, every in (("UTF-32LE", head[3::4]), ("UTF-32BE", head[::4])):
            if not any(every):
                return name
    return "binary (it holds NUL bytes)" if many else ""


def _is_utf8(head: bytes) -> bool:
    try:
        head[: max(0, len(head) - 3)].decode()
    except UnicodeDecodeError as error:
        return error.start > len(head) - 8  # a character that is cut at the end
    return True
