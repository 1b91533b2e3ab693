"""Types and ranges of settings: conversion from text, checks, messages.

Rule: the annotation of a field defines both. `Annotated[int, Range(1, 512)]` is checked whenever a section is
constructed, from Python or YAML. The trap: YAML would read the folder `007` as 7 and `12:30:45` as 45045, so text is
converted only when its type is known.
"""

import functools
import math
import os
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from typing_extensions import Self

from mythos_dist.config.tree import NULLS, Node, Scalar, show_node
from mythos_dist.errors import UserError
from mythos_dist.units import bytes_of


@dataclass(frozen=True)
class Range:
    """Bounds of a number, of every number of a list, or of every weight of a mix."""

    least: float
    most: float = math.inf
    above: bool = False  # exclude `least` itself
    words: str = ""  # message for a value outside; "": the bound that it breaks
    advice: str = ""  # appended to the message

    def problem(self, value: float) -> str | None:
        """Text to follow `section.key=value`; None for a value inside."""
        if self.least < value <= self.most or (value == self.least and not self.above):
            return None
        if self.words:
            return self.words + self.advice
        if value > self.most:
            return f"must be at most {self.most:,}{self.advice}"
        if self.above:
            return f"must be above {self.least}{self.advice}"
        return ("must not be negative" if self.least == 0 else f"must be at least {self.least}") + self.advice


@dataclass(frozen=True)
class Words:
    """Text that is one of `words`, or `prefix` and a whole number in `range`, such as `every:4`."""

    words: tuple[str, ...]
    prefix: str
    range: Range
    advice: tuple[tuple[str, str], ...] = ()  # (a value that is refused, appended to its message)

    def problem(self, value: str) -> str | None:
        """Text to follow `section.key=value`; None for a valid value."""
        number = value.removeprefix(self.prefix)
        if value in self.words:
            return None
        if number != value and _PLAIN.fullmatch(number) and self.range.problem(int(number)) is None:
            return None
        words = ", ".join(map(repr, self.words))
        least, most = self.range.least, self.range.most
        return f": expected {words} or '{self.prefix}N' with N from {least} to {most}{dict(self.advice).get(value, '')}"


class _PathText:
    """Marks a text as a path: a leading `~/` is expanded."""


class _SizeText:
    """Marks a text as a number of bytes: 400kB, 1.5GB, 2GiB."""


PATH, SIZE = _PathText(), _SizeText()
PAIRS = "a list of pairs of whole numbers, such as [[8, 100], [16, 200]]"
MIX = "folders with their weights, such as {shards/web: 0.7, shards/code: 0.3}"
_EXPECTED = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: MIX}
_WHOLE = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_PLAIN = re.compile(r"[1-9][0-9]{0,8}")
_BASED = re.compile(r"[-+]?0(x[0-9a-f]+|o[0-7]+|b[01]+)", re.IGNORECASE)
_REAL = re.compile(r"[-+]?([0-9]+(_[0-9]+)*)?(\.[0-9]*)?(e[-+]?[0-9]+)?", re.IGNORECASE)
_SPECIAL = re.compile(r"([-+]?)\.?(inf|nan)", re.IGNORECASE)
_MAX_DIGITS = 40  # of a whole number: Python refuses 4,301, and takes quadratic time
_HUGE = 10**_MAX_DIGITS  # replaces whole numbers with more digits; every range refuses it
_MAX_TEXT = 4096  # characters: the longest path on Linux
_YES, _NO = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
_WRONG = object()  # the value of text that does not fit the type


@dataclass(frozen=True)
class Kind:
    """The type and range of a field."""

    type: type  # int, float, bool, str, tuple (of item) or dict (of item by folder)
    length: int | None = None  # of a tuple; None: any
    optional: bool = False  # None is allowed
    by_mode: bool = False  # None stands for the default of model.mode
    choices: tuple = ()  # Literal's
    range: Range | None = None
    words: Words | None = None  # of text
    item: "Kind | None" = None
    path: bool = False
    size: bool = False  # text that is a number of bytes

    @property
    def section(self) -> "type[Section] | None":
        """The class of a setting that has settings of its own."""
        return self.type if issubclass(self.type, Section) else None

    @property
    def expected(self) -> str:
        """Text after "expected ", such as "a whole number"."""
        if self.section:
            text = f"settings, such as {self.section.example}"
        elif self.choices:
            *others, last = map(repr, self.choices)
            text = f"{', '.join(others)} or {last}"
        elif self.type is tuple:
            text = PAIRS if self.item and self.item.type is tuple else "a list of whole numbers, such as [1, 2, 4]"
            text = "two whole numbers, such as [1000, 2000]" if self.length else text
            text = "a list of texts, such as [a.yaml, b.yaml]" if self.item and self.item.type is str else text
        elif self.size:
            text = "a size in bytes, such as 400kB or 200GB"
        else:
            text = _EXPECTED[self.type]
        return f"{text}, or null" if self.optional and self.type is not dict else text

    def read(self, node: Node) -> Any:
        """The value of a node. Raises ValueError(`expected`) for another type."""
        value = self._read(node)
        if value is _WRONG:
            raise ValueError(self.expected)
        return value

    def _read(self, node: Node) -> Any:
        if isinstance(node, Scalar):
            if node.plain and node.text in NULLS:
                return self._null()
            return _WRONG if self.type in (tuple, dict) or self.section else self._scalar(node)
        if self.item is not None and isinstance(node, list) and self.type is tuple:
            values = tuple(self.item._read(one) for one in node)
            return _WRONG if _WRONG in values or len(values) != (self.length or len(values)) else values
        if self.item is not None and isinstance(node, dict) and self.type is dict:
            weights = {folder: self.item._read(one) for folder, one in node.items()}
            return _WRONG if _WRONG in weights.values() else weights
        return _WRONG

    def _null(self) -> Any:
        if self.optional or self.by_mode:
            return None
        if self.type is tuple:
            return ()
        return "" if self.type is str and not self.choices else _WRONG  # data.path=null unsets it, for data.mix

    def _scalar(self, node: Scalar) -> Any:
        text = node.text
        if self.type is str:
            if node.plain and text.lower() in ("true", "false") and text not in self.choices:
                return _WRONG  # a folder of that name needs quotes
            return text
        if self.type is bool:
            return text.lower() in _YES if text.lower() in _YES | _NO else _WRONG
        number = number_of(text)
        if number is None or isinstance(number, float):
            return number if number is not None and self.type is float else _WRONG
        if self.type is int:
            return number
        return float(number) if abs(number) < _HUGE else math.copysign(math.inf, number)

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, to follow `section.key=value`; None if it is valid."""
        if value is None:
            return None if self.optional or self.by_mode else f": expected {self.expected}"
        if not self._is_of_type(value):
            return f": expected {self.expected}"
        if self.choices:
            return None if value in self.choices else f": expected {self.expected}"
        if self.type is float and not math.isfinite(value):
            return ": expected a finite number"
        if self.type is str:
            if self.words:
                return self.words.problem(value)
            return _unprintable(value) or (self._size_problem(value) if self.size else None)
        if self.type is tuple and self.item and self.item.type is str:
            return next(filter(None, map(_unprintable, value)), None)
        if self.type is tuple and self.item:
            members = [one for pair in value for one in pair] if self.item.type is tuple else value
            bounds = (self.item.item or self.item).range
            wrong = {one: words for one in members if bounds and (words := bounds.problem(one))}
            return next((f" contains {list(wrong)}; each {words}" for words in wrong.values()), None)
        if self.range and self.type in (int, float) and (words := self.range.problem(value)):
            return f" {words}"
        return None

    def _size_problem(self, value: str) -> str | None:
        try:
            return None if bytes_of(value) > 0 else " must be above 0"
        except ValueError:
            return f": expected {self.expected}"

    def _is_of_type(self, value: Any) -> bool:
        if self.item is not None and isinstance(value, self.type):
            if len(value) != (self.length or len(value)):
                return False
            members = value.values() if isinstance(value, dict) else value
            named = all(isinstance(folder, str) for folder in value) if isinstance(value, dict) else True
            return named and all(self.item._is_of_type(one) for one in members)
        if isinstance(value, bool):
            return self.type is bool
        return isinstance(value, int | float if self.type is float else self.type)


def number_of(text: str) -> int | float | None:
    """Text as a number, a whole one as int even if written 1e3 or 8.0; None if it is not a number.

    A whole number with more digits than any setting takes becomes one that every range refuses.
    """
    if special := _SPECIAL.fullmatch(text):
        return float(special[1] + special[2])
    if _BASED.fullmatch(text):
        return int(text, 0) if len(text) <= _MAX_DIGITS else _huge(text)
    if _WHOLE.fullmatch(text):
        digits = text.lstrip("+-")
        if len(digits) > 1 and digits[0] == "0":
            return None  # YAML 1.1 reads 010 as 8, YAML 1.2 as 10
        return int(text) if len(text) <= _MAX_DIGITS else _huge(text)
    if not _REAL.fullmatch(text) or not any(character.isdigit() for character in text.lower().partition("e")[0]):
        return None
    if len(text) > 20 * _MAX_DIGITS:
        return None
    try:
        value = Decimal(text)
    except InvalidOperation:  # an exponent beyond what even Decimal has
        return None
    if value.is_zero():
        return 0
    if value.adjusted() >= _MAX_DIGITS:
        return float(value)
    return int(value) if value == value.to_integral_value() else float(value)


def _huge(text: str) -> int:
    return -_HUGE if text.startswith("-") else _HUGE


def _unprintable(text: str) -> str | None:
    """Refuse control characters and invalid UTF-8, which break logs, YAML and file system calls."""
    if len(text) > _MAX_TEXT:
        return f": longer than {_MAX_TEXT:,} characters"
    for character in text:
        if ord(character) < 32 or 127 <= ord(character) < 160:
            return f": contains the control character {character!r}; leave it out"
        if 0xD800 <= ord(character) < 0xE000:
            return ": contains bytes that are not UTF-8; rename it"
    return None


def show(value: Any, most: int = 80) -> str:
    """A value for a message, in YAML's notation, shortened to a line."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, Scalar):
        text = show_node(value)
    elif isinstance(value, int) and abs(value) >= _HUGE:
        return f"{'-' if value < 0 else ''}(a number with over {_MAX_DIGITS} digits)"
    elif isinstance(value, Section | dict):
        text = repr({key: each for key, each in as_lists(value).items() if each is not None})
    else:
        text = "null" if value is None else repr(as_lists(value))
    return text if len(text) <= most else f"{text[: most - 20]}...{text[-15:]}"


def as_lists(value: Any) -> Any:
    """A value with lists instead of tuples and dicts instead of sections, as JSON and YAML return it."""
    if isinstance(value, Section):
        return {key: as_lists(one) for key, one in asdict(value).items()}  # pyright: ignore[reportArgumentType]
    return [as_lists(one) for one in value] if isinstance(value, tuple | list) else value


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(one) for one in value) if isinstance(value, tuple | list) else value


@functools.cache
def kinds_of(section: type) -> dict[str, Kind]:
    """{field: its Kind} of a section."""
    hints = get_type_hints(section, include_extras=True)
    return {one.name: _kind(hints[one.name], bool(one.metadata)) for one in fields(section)}


def _kind(hint: Any, by_mode: bool = False) -> Kind:
    """The Kind of an annotation."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        inner = _kind(args[0], by_mode)
        bounds = next((one for one in args[1:] if isinstance(one, Range)), inner.range)
        words = next((one for one in args[1:] if isinstance(one, Words)), None)
        marks = {type(one) for one in args[1:]}
        return _with(inner, range=bounds, words=words, path=_PathText in marks, size=_SizeText in marks)
    if origin in (Union, types.UnionType):
        (member,) = [one for one in args if one is not type(None)]
        return _with(_kind(member, by_mode), optional=True)
    if origin is Literal:
        return Kind(type(args[0]), by_mode=by_mode, choices=args)
    if origin is tuple:
        return Kind(tuple, item=_kind(args[0]), length=None if args[-1] is Ellipsis else len(args))
    if origin is dict:
        return Kind(dict, item=_kind(args[1]), path=True)
    return Kind(hint, by_mode=by_mode)


def _with(kind: Kind, **changes: Any) -> Kind:
    return Kind(**{**vars(kind), **changes})


class Section:
    """Base of all sections of a config: constructing one checks the type and range of every value."""

    section: ClassVar[str] = ""
    example: ClassVar[str] = ""  # of a section inside a section, in YAML

    def __init_subclass__(cls, section: str, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.section = section

    def __post_init__(self) -> None:
        """Raises UserError with all problems."""
        self.complete()
        problems = []
        for key, kind in kinds_of(type(self)).items():
            problems += [f"{self.section}.{key}{words}" for words in value_problems(kind, getattr(self, key))]
        problems = problems or self.contradictions()
        if problems:
            raise UserError(problems)

    @classmethod
    def from_checked_values(cls, **values: Any) -> Self:
        """A section that is not checked again: `load_config` reports the problems of all sections together."""
        one = object.__new__(cls)
        for each in fields(cls):  # type: ignore[arg-type]  # every section is a dataclass
            object.__setattr__(one, each.name, values.get(each.name, each.default))
        one.complete()
        return one

    @classmethod
    def required(cls) -> set[str]:
        """Settings without a default."""
        return {one.name for one in fields(cls) if one.default is MISSING}  # type: ignore[arg-type]

    def complete(self) -> None:
        """Expand `~/` in paths; convert lists to tuples, which JSON does not have."""
        for key, kind in kinds_of(type(self)).items():
            value = getattr(self, key)
            if kind.path and value is not None:
                object.__setattr__(self, key, _expanded(value))
            elif kind.type is tuple:
                object.__setattr__(self, key, _as_tuples(value))

    def contradictions(self) -> list[str]:
        """Broken rules between settings of this section, a line each. In a section inside another one each line begins
        with `section`, such as run.profile: `load_config` removes and adds that."""
        return []


def value_problems(kind: Kind, value: Any) -> Iterator[str]:
    """What is wrong with a value, each text to follow the field's name."""
    if problem := kind.problem(value):
        yield f"={show(value)}{problem}"
    elif kind.type is dict and isinstance(value, dict) and kind.item and kind.item.range:
        for folder, weight in value.items():
            if problem := _unprintable(folder) or (None if folder else " names no folder"):
                yield f"[{show(folder)}]{problem}"
            if problem := kind.item.range.problem(weight):
                yield f"[{folder}]={weight} {problem}"


def _expanded(value: Any) -> Any:
    """Expand `~/x` and `~user/x` as a shell does, also in the keys of a mix."""
    if isinstance(value, dict):
        return {_expanded(folder): weight for folder, weight in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") and "/" in value else value
