"""What a check yields, and the rule that a check that raises becomes a finding: it never ends the report."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from mythos_dist.errors import first_line


@dataclass(frozen=True)
class Finding:
    """A note does not stop training; a problem stops it or makes its results wrong."""

    topic: str  # the setting, where the finding is about one
    status: Literal["ok", "note", "problem"]
    text: str
    remedy: str = ""  # empty only for "ok"


def ok(topic: str, text: str) -> Finding:
    return Finding(topic, "ok", text)


def note(topic: str, text: str, remedy: str) -> Finding:
    return Finding(topic, "note", text, remedy)


def problem(topic: str, text: str, remedy: str) -> Finding:
    return Finding(topic, "problem", text, remedy)


def split_remedy(topic: str, message: str, default: str = "") -> Finding:
    """The problem that a message "what is wrong; what to do" describes."""
    text, separator, remedy = message.rpartition("; ")
    return problem(topic, text, remedy) if separator else problem(topic, message, default)


def run_check(topic: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check; a problem if it raises."""
    try:
        return list(check())
    except Exception as error:
        text = f"this check failed ({type(error).__name__}: {first_line(error)})"
        return [problem(topic, text, "fix what the error names; if training starts anyway, report this as a bug")]


def gigabytes(size: float) -> str:
    """Bytes as text: 0.073 GB, 79 GB, 1,200 GB."""
    size /= 1e9
    return f"{size:,.0f} GB" if size >= 10 else f"{size:.2g} GB"
