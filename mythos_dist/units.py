"""Format numbers for messages; sizes and intervals."""

import re

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(|[kKMGTP]i?)B?", re.ASCII)
_UNITS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


def bytes_of(text: str) -> int:
    """A size in bytes: "400kB" is 400,000, "1.5 GiB" is 1.5 x 1024^3, "512" is 512. Raises ValueError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r:.40} is not a size, such as 400kB or 200GB")
    base = 1024 if match[2].endswith("i") else 1000
    return int(float(match[1]) * base ** _UNITS[match[2][:1]])


def short(number: float) -> str:
    """Three significant digits and a unit: 1234567 -> "1.23M", 999.6 -> "1k"."""
    number = float(f"{number:.3g}")
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def short_bytes(size: float) -> str:
    """As `short`: 1234567 -> "1.23MB", 2e9 -> "2GB"."""
    return short(size).replace("B", "G") + "B"


def count(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: "1 rank", "1,024 ranks"; `plural`: if it is not `noun` with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def format_duration(seconds: float) -> str:
    """42 s, 3 min 10 s, 5 h 12 min, 3 d 4 h."""
    rounded = max(0, round(seconds))
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if rounded >= size:
            return f"{rounded // size} {unit} {rounded % size // part} {smaller}"
    return f"{rounded} s"


def is_multiple(step: int, every: int) -> bool:
    """Whether what happens every N steps, 0: never, is due at `step`."""
    return every > 0 and step % every == 0
