"""Types and ranges of settings: what a field may hold, how text becomes its value, and the message for a wrong one.

Rule: a field's annotation says all there is to say. `Annotated[int, Range(1, 512)]` is checked when a section is built,
in Python as from YAML. The trap: the text of a setting is kept until its type is known, because YAML would read
the folder `007` as 7 and `12:30:45` as 45045.
"""

import functools
import math
import os
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from typing_extensions import Self

from mythos_dist.config.tree import NULLS, Node, Scalar, show_node
from mythos_dist.errors import UserError


@dataclass(frozen=True)
class Range:
    """Bounds of a number, of each number of a list, or of each weight of a mix."""

    least: float
    most: float = math.inf
    above: bool = False  # `least` itself is outside
    words: str = ""  # what is said of a value outside; "": which bound it breaks
    advice: str = ""  # appended to the message

    def problem(self, value: float) -> str | None:
        """The end of a sentence that begins with the setting; None for a value inside."""
        if self.least < value <= self.most or (value == self.least and not self.above):
            return None
        if self.words:
            return self.words + self.advice
        if value > self.most:
            return f"must be at most {self.most:,}{self.advice}"
        if self.above:
            return f"must be above {self.least}{self.advice}"
        return ("must not be negative" if self.least == 0 else f"must be at least {self.least}") + self.advice


class _PathText:
    """Marks a text as the path of a file or folder: a leading `~/` is expanded."""


PATH = _PathText()
MIX = "folders with their weights, such as {shards/web: 0.7, shards/code: 0.3}"
_EXPECTED = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: MIX}
_WHOLE = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_BASED = re.compile(r"[-+]?0(x[0-9a-f]+|o[0-7]+|b[01]+)", re.IGNORECASE)
_REAL = re.compile(r"[-+]?([0-9]+(_[0-9]+)*)?(\.[0-9]*)?(e[-+]?[0-9]+)?", re.IGNORECASE)
_SPECIAL = re.compile(r"([-+]?)\.?(inf|nan)", re.IGNORECASE)
_MOST_DIGITS = 40  # of a whole number: Python refuses 4,301, and takes time that grows with their square
_HUGE = 10**_MOST_DIGITS  # stands for every whole number of more digits; each range refuses it
_MOST_TEXT = 4096  # characters: the longest path of Linux
_YES, _NO = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
_WRONG = object()  # text that is no value of the type


@dataclass(frozen=True)
class Kind:
    """What one field may hold."""

    type: type  # int, float, bool, str, tuple (of item) or dict (of item by folder)
    optional: bool = False  # None is a value
    by_mode: bool = False  # None is replaced by the default of model.mode
    choices: tuple = ()  # Literal's
    range: Range | None = None
    item: "Kind | None" = None
    path: bool = False

    @property
    def expected(self) -> str:
        """Words for "expected ...", such as `a whole number`."""
        if self.choices:
            *others, last = map(repr, self.choices)
            words = f"{', '.join(others)} or {last}"
        elif self.type is tuple:
            words = "a list of whole numbers, such as [1, 2, 4]"
        else:
            words = _EXPECTED[self.type]
        return words + ", or null" * (self.optional and self.type is not dict)

    def read(self, node: Node) -> Any:
        """The value that YAML or the command line gives. Raises ValueError with `expected` for another type."""
        value = self._read(node)
        if value is _WRONG:
            raise ValueError(self.expected)
        return value

    def _read(self, node: Node) -> Any:
        if isinstance(node, Scalar):
            if node.plain and node.text in NULLS:
                empty = {str: "", tuple: ()}  # such as data.path=null, which leaves it to data.mix
                return (
                    None if self.optional or self.by_mode else empty.get(self.type if not self.choices else int, _WRONG)
                )
            return _WRONG if self.type in (tuple, dict) else self._scalar(node)
        if self.item is not None and isinstance(node, list) and self.type is tuple:
            values = tuple(self.item._read(one) for one in node)
            return _WRONG if _WRONG in values else values
        if self.item is not None and isinstance(node, dict) and self.type is dict:
            weights = {folder: self.item._read(one) for folder, one in node.items()}
            return _WRONG if _WRONG in weights.values() else weights
        return _WRONG

    def _scalar(self, node: Scalar) -> Any:
        text = node.text
        if self.type is str:
            if node.plain and text.lower() in ("true", "false") and text not in self.choices:
                return _WRONG  # a folder of that name is given in quotes
            return text
        if self.type is bool:
            return text.lower() in _YES if text.lower() in _YES | _NO else _WRONG
        found = number_of(text)
        if found is None or isinstance(found, float):
            return found if found is not None and self.type is float else _WRONG
        if self.type is int:
            return found
        return float(found) if abs(found) < _HUGE else math.copysign(math.inf, found)

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, to stand after `section.key=value`; None if it is right."""
        if value is None:
            return None if self.optional or self.by_mode else f": expected {self.expected}"
        if not self._is_of_type(value):
            return f": expected {self.expected}"
        if self.choices:
            return None if value in self.choices else f": expected {self.expected}"
        if self.type is float and not math.isfinite(value):
            return ": expected a finite number"
        if self.type is str:
            return _unprintable(value)
        if self.type is tuple and self.item and self.item.range:
            wrong = {one: words for one in value if (words := self.item.range.problem(one))}
            return next((f" holds {list(wrong)}; each {words}" for words in wrong.values()), None)
        if self.range and self.type in (int, float) and (words := self.range.problem(value)):
            return f" {words}"
        return None

    def _is_of_type(self, value: Any) -> bool:
        if self.item is not None and isinstance(value, self.type):
            members = value.values() if isinstance(value, dict) else value
            named = all(isinstance(folder, str) for folder in value) if isinstance(value, dict) else True
            return named and all(self.item._is_of_type(one) for one in members)
        if isinstance(value, bool):
            return self.type is bool
        return isinstance(value, int | float if self.type is float else self.type)


def number_of(text: str) -> int | float | None:
    """The number that a text is, a whole one as int also where it is written 1e3 or 8.0; None if it is none.

    Whole numbers of more digits than any setting takes become one that every range refuses.
    """
    if special := _SPECIAL.fullmatch(text):
        return float(special[1] + special[2])
    if _BASED.fullmatch(text):
        return int(text, 0) if len(text) <= _MOST_DIGITS else _huge(text)
    if _WHOLE.fullmatch(text):
        digits = text.lstrip("+-")
        if len(digits) > 1 and digits[0] == "0":
            return None  # YAML 1.1 reads 010 as 8, YAML 1.2 as 10
        return int(text) if len(text) <= _MOST_DIGITS else _huge(text)
    if not _REAL.fullmatch(text) or not any(character.isdigit() for character in text.lower().partition("e")[0]):
        return None
    if len(text) > 20 * _MOST_DIGITS:
        return None
    try:
        value = Decimal(text)
    except InvalidOperation:  # an exponent beyond what even Decimal has
        return None
    if value.is_zero():
        return 0
    if value.adjusted() >= _MOST_DIGITS:
        return float(value)
    return int(value) if value == value.to_integral_value() else float(value)


def _huge(text: str) -> int:
    return -_HUGE if text.startswith("-") else _HUGE


def _unprintable(text: str) -> str | None:
    """Control characters and bytes that are not UTF-8 break logs, YAML and the file system's calls."""
    if len(text) > _MOST_TEXT:
        return f": longer than {_MOST_TEXT:,} characters"
    for character in text:
        if ord(character) < 32 or 127 <= ord(character) < 160:
            return f": holds the control character {character!r}; leave it out"
        if 0xD800 <= ord(character) < 0xE000:
            return ": holds bytes that are not UTF-8; rename it"
    return None


def show(value: Any, most: int = 80) -> str:
    """A value in a message: as YAML writes it where that differs, and no longer than a line."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, Scalar):
        text = show_node(value)
    elif isinstance(value, int) and abs(value) >= _HUGE:
        return f"{'-' * (value < 0)}(a number of over {_MOST_DIGITS} digits)"
    else:
        text = "null" if value is None else str(list(value)) if isinstance(value, tuple) else repr(value)
    return text if len(text) <= most else f"{text[: most - 20]}...{text[-15:]}"


@functools.cache
def kinds_of(section: type) -> dict[str, Kind]:
    """The kind of each field of a section, by name."""
    hints = get_type_hints(section, include_extras=True)
    return {one.name: _kind(hints[one.name], bool(one.metadata)) for one in fields(section)}


def _kind(hint: Any, by_mode: bool = False) -> Kind:
    """The Kind that an annotation describes."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        inner = _kind(args[0], by_mode)
        bounds = next((one for one in args[1:] if isinstance(one, Range)), inner.range)
        return _with(inner, range=bounds, path=any(isinstance(one, _PathText) for one in args[1:]))
    if origin in (Union, types.UnionType):
        (member,) = [one for one in args if one is not type(None)]
        return _with(_kind(member, by_mode), optional=True)
    if origin is Literal:
        return Kind(type(args[0]), by_mode=by_mode, choices=args)
    if origin is tuple:
        return Kind(tuple, item=_kind(args[0]))
    if origin is dict:
        return Kind(dict, item=_kind(args[1]), path=True)
    return Kind(hint, by_mode=by_mode)


def _with(kind: Kind, **changes: Any) -> Kind:
    return Kind(**{**vars(kind), **changes})


class Section:
    """Base of all sections of a config: a value of another type or out of its range is refused when one is built."""

    section: ClassVar[str] = ""

    def __init_subclass__(cls, section: str, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.section = section

    def __post_init__(self) -> None:
        """Raises UserError with all that is wrong."""
        self.complete()
        values = [(key, value_problems(kind, getattr(self, key))) for key, kind in kinds_of(type(self)).items()]
        found = [f"{self.section}.{key}{words}" for key, problems in values for words in problems]
        if found := found or self.contradictions():
            raise UserError(found)

    @classmethod
    def of_right_values(cls, **values: Any) -> Self:
        """One whose values are right each, but may contradict each other: `load_config` names all such problems."""
        one = object.__new__(cls)
        for each in fields(cls):  # type: ignore[arg-type]  # every section is a dataclass
            default = each.default if each.default_factory is MISSING else each.default_factory()
            object.__setattr__(one, each.name, values.get(each.name, default))
        one.complete()
        return one

    def complete(self) -> None:
        """Expand `~/` in paths, turn lists (JSON has no tuples) into tuples."""
        for key, kind in kinds_of(type(self)).items():
            value = getattr(self, key)
            if kind.path and value is not None:
                object.__setattr__(self, key, _expanded(value))
            elif kind.type is tuple and isinstance(value, list):
                object.__setattr__(self, key, tuple(value))

    def contradictions(self) -> list[str]:
        """What settings of this section, each right by itself, cannot be together; a line each."""
        return []


def value_problems(kind: Kind, value: Any) -> Iterator[str]:
    """What is wrong with a value of a field, each to stand after the field's name."""
    if problem := kind.problem(value):
        yield f"={show(value)}{problem}"
    elif kind.type is dict and isinstance(value, dict) and kind.item and kind.item.range:
        for folder, weight in value.items():
            if problem := _unprintable(folder) or (None if folder else " names no folder"):
                yield f"[{show(folder)}]{problem}"
            if problem := kind.item.range.problem(weight):
                yield f"[{folder}]={weight} {problem}"


def _expanded(value: Any) -> Any:
    """`~/x` and `~user/x` as the shell expands them; the keys of a mix too. Whatever is no text stays."""
    if isinstance(value, dict):
        return {_expanded(folder): weight for folder, weight in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") and "/" in value else value
