"""Format numbers for messages; intervals."""


def short(number: float) -> str:
    """Three significant digits and a unit: 1234567 -> "1.23M", 999.6 -> "1k"."""
    number = float(f"{number:.3g}")
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


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
