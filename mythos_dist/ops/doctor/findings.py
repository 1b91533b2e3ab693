"""What a check yields, and the rule that no check ends the report: what it raises becomes a finding."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

from mythos_dist.errors import UserError, first_line


class Finding(NamedTuple):
    """A note does not stop training; a problem stops it or makes its results wrong."""

    status: Literal["ok", "note", "problem"]
    text: str
    remedy: str = ""  # empty only for "ok"
    topic: str = ""  # the setting, where it is about one; empty: the topic of its check


ok, note, problem = partial(Finding, "ok"), partial(Finding, "note"), partial(Finding, "problem")


class FactError(Exception):
    """A fact about the machine cannot be read."""

    def __init__(self, fact: str, error: Exception):
        super().__init__(f"cannot be read ({type(error).__name__}: {first_line(error)})")
        self.fact = fact


class Check(NamedTuple):
    """A function that yields findings about a topic."""

    topic: str
    function: Callable[..., Iterable[Finding] | None]
    remedy: str = ""  # for a refusal that names none

    def run(self, *arguments: Any) -> Iterator[Finding]:
        """The findings of `function(*arguments)`. What it refuses (UserError) and any other error are problems."""
        try:
            for finding in self.function(*arguments) or ():
                yield finding._replace(topic=finding.topic or self.topic)
        except UserError as error:
            for message in error.problems:
                text, separator, remedy = message.rpartition("; ")
                text, remedy = (text, remedy) if separator else (message, self.remedy)
                yield problem(f"{error.source}: {text}" if error.source else text, remedy, self.topic)
        except Exception as error:
            topic, text = self.topic, f"this check failed ({type(error).__name__}: {first_line(error)})"
            if isinstance(error, FactError):  # the same finding for all checks that need this fact
                topic, text = error.fact, str(error)
            yield problem(text, "fix what the error names; if training starts anyway, report this as a bug", topic)


def gigabytes(size: float) -> str:
    """Bytes as text: 0.073 GB, 79 GB, 1,200 GB."""
    size /= 1e9
    return f"{size:,.0f} GB" if size >= 10 else f"{size:.2g} GB"
