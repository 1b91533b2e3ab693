"""Is a text file UTF-8? UTF-16 and UTF-32 look like text with a NUL beside every character."""

BOM = b"\xef\xbb\xbf"  # of UTF-8; no part of the text
HEAD_BYTES = 1 << 16
_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class WrongEncoding(OSError):
    """A file that is not UTF-8, in a way that repairing single bytes would make nonsense of."""


def check_encoding(piece: bytes) -> None:
    """Raises WrongEncoding if the beginning of a file, or of a range of it, is UTF-16, UTF-32 or no text."""
    head = piece[:HEAD_BYTES]
    name = next((name for mark, name in _MARKS.items() if head.startswith(mark) and len(head) % 2 == 0), "")
    if not name and (nuls := head.count(0)):
        name = _by_nuls(head, nuls)
    if name:
        remedy = f"iconv -f {name} -t UTF-8 FILE > NEW" if name.startswith("UTF") else "leave it out"
        raise WrongEncoding(f"is {name}, not UTF-8; {remedy}")


def _by_nuls(head: bytes, nuls: int) -> str:
    """Without a mark: ASCII characters, at least spaces and line ends, have their NULs all at odd, or all at even
    places in UTF-16, and three in a row in UTF-32."""
    one_side = head[::2].count(0) in (0, nuls)
    if 2 * nuls > len(head):
        return "UTF-32" if 10 * nuls > 6 * len(head) else "binary (it holds NUL bytes)"
    if 5 * nuls > len(head):
        return ("UTF-16LE" if head[1::2].count(0) else "UTF-16BE") if one_side else "binary (it holds NUL bytes)"
    if nuls >= 4 and one_side and not _is_utf8(head):
        return "UTF-16LE" if head[1::2].count(0) else "UTF-16BE"
    return ""


def _is_utf8(head: bytes) -> bool:
    try:
        head[: max(0, len(head) - 3)].decode()
    except UnicodeDecodeError as error:
        return error.start > len(head) - 8  # a character that is cut at the end
    return True
