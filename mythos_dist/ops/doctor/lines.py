"""A line of the report, and the rule that no check may end it: one that fails becomes a line."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from mythos_dist.errors import first_line


@dataclass(frozen=True)
class Line:
    """What was found about a subject; a note does not stop training, a problem does or makes it wrong."""

    topic: str  # a setting's name where it is about one
    status: Literal["ok", "note", "problem"]
    text: str
    remedy: str = ""  # what to do; only what is in order has none


def ok(topic: str, text: str) -> Line:
    return Line(topic, "ok", text)


def note(topic: str, text: str, remedy: str) -> Line:
    return Line(topic, "note", text, remedy)


def problem(topic: str, text: str, remedy: str) -> Line:
    return Line(topic, "problem", text, remedy)


def examine(topic: str, check: Callable[[], Iterable[Line]]) -> list[Line]:
    """The lines of a check. Whatever it raises is a problem by itself: something here is not as anybody expected."""
    try:
        return list(check())
    except Exception as error:
        return [
            problem(
                topic,
                f"this could not be looked at ({type(error).__name__}: {first_line(error)})",
                "mend what the message names; if training starts all the same, the doctor is wrong: report this line",
            )
        ]


def gigabytes(size: float) -> str:
    """Bytes for a person: 0.073 GB, 79 GB, 1,200 GB."""
    size /= 1e9
    return f"{size:,.0f} GB" if size >= 10 else f"{size:.2g} GB"
