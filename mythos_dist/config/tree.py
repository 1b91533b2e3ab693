"""YAML -> a tree of texts; the type of a setting decides what value its text has (fields.py).

Supported: mappings, lists, scalars, anchors and aliases, `<<`, the tags of YAML's core schema. Anything else is refused
with its line. The traps: a few hundred bytes of aliases expand to billions of values, and PyYAML recurses into nested
brackets; so aliases count as often as they are used, and depth is limited.

Decisions: CONFIG-1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from mythos_dist.errors import UserError

NULLS = ("", "~", "null", "Null", "NULL")
MAX_BYTES = 1 << 18  # of a file: a hundred times our largest config
_MAX_NODES = 50_000  # aliases counted as often as they are used
_MAX_DEPTH = 32
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}


@dataclass(frozen=True)
class Scalar:
    """A text as written; `plain`: without quotes or a tag `!!str`, so that `null` means no value."""

    text: str
    plain: bool = True


Node = Scalar | list["Node"] | dict[str, "Node"]


def parse_yaml(text: str) -> Node:
    """The tree of a document; an empty one is an unquoted empty text. Raises UserError for anything unsupported."""
    if len(text) > MAX_BYTES:
        _refuse(f"a config has at most {MAX_BYTES:,} characters")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _Builder(yaml.parse(text, Loader=loader)).document()
    except yaml.YAMLError as error:
        _refuse(" ".join(str(error).split()))
    except UnicodeEncodeError:
        _refuse("contains bytes that are not UTF-8")
    except (ValueError, OverflowError) as error:  # PyYAML converts versions and escapes without a check
        if isinstance(error, UserError):
            raise
        _refuse(" ".join(str(error).split())[:100])


def read_yaml(path: Path) -> Node:
    """The tree of a file. Raises UserError for content that is not UTF-8 or not YAML, OSError as `open` does."""
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"a config has at most {MAX_BYTES:,} bytes", source=str(path))
    try:
        return parse_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"cannot be read: byte {error.start + 1} is not UTF-8; save it as UTF-8", str(path)) from None
    except UserError as error:
        raise UserError(error.problems, source=str(path)) from None


def show_node(node: Node, most: int = 200) -> str:
    """A tree for a message, in Python's notation, shortened."""
    text = ""
    for part in _parts(node):
        text += part
        if len(text) > most:
            break
    return text


def _parts(node: Node) -> Iterator[str]:
    if isinstance(node, Scalar):
        yield _show_scalar(node)
    elif isinstance(node, list):
        yield "["
        for i, one in enumerate(node):
            yield ", " if i else ""
            yield from _parts(one)
        yield "]"
    else:
        yield "{"
        for i, (key, one) in enumerate(node.items()):
            yield f"{', ' if i else ''}{key!r}: "
            yield from _parts(one)
        yield "}"


def _show_scalar(node: Scalar) -> str:
    if node.plain:
        if node.text in NULLS:
            return "null"
        if node.text.lower() in ("true", "false"):
            return node.text.lower()
        if node.text.lower() in (".nan", ".inf", "-.inf", "+.inf"):
            return node.text.lower().replace(".", "").lstrip("+")
        if len(node.text) <= 300 and _is_number(node.text):
            return node.text
    return repr(node.text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _refuse(what: str, event: yaml.Event | None = None) -> NoReturn:
    mark = getattr(event, "start_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    raise UserError(f"not valid YAML: {where}{what}")


class _Builder:
    """Builds a tree from a parser's events."""

    def __init__(self, events: Iterator[yaml.Event]):
        self.events = events
        self.anchors: dict[str, tuple[Node, int]] = {}  # a node and the number of nodes in it
        self.count = 0

    def document(self) -> Node:
        root: Node = Scalar("")
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                root = self.node(next(self.events), 0)
                if not isinstance(next(self.events), yaml.DocumentEndEvent):
                    raise AssertionError("a document has one root node")
                after = next(self.events)
                if not isinstance(after, yaml.StreamEndEvent):
                    _refuse("a second document starts here; a config is one document", after)
                return root
        return root

    def node(self, event: yaml.Event, depth: int) -> Node:
        if depth > _MAX_DEPTH:
            _refuse(f"nested more than {_MAX_DEPTH} deep", event)
        before = self.count
        self.count += 1
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event)
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _TAGS and tag != "!":
            _refuse(f"the tag {tag.replace('tag:yaml.org,2002:', '!!')!r} is not supported; leave it out", event)
        if isinstance(event, yaml.ScalarEvent):
            quoted = bool(event.style) or tag in ("!", "tag:yaml.org,2002:str")
            node: Node = Scalar(event.value, plain=not quoted)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = []
            while not isinstance(item := next(self.events), yaml.SequenceEndEvent):
                node.append(self.node(item, depth + 1))
        else:
            node = self.mapping(depth)
        if self.count > _MAX_NODES:
            _refuse(f"more than {_MAX_NODES:,} values, counting what aliases repeat", event)
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self.anchors[anchor] = node, self.count - before
        return node

    def alias(self, event: yaml.AliasEvent) -> Node:
        if event.anchor not in self.anchors:
            _refuse(f"the alias *{event.anchor} has no anchor before it", event)
        node, size = self.anchors[event.anchor]
        self.count += size
        if self.count > _MAX_NODES:
            _refuse(f"more than {_MAX_NODES:,} values, counting what aliases repeat", event)
        return node

    def mapping(self, depth: int) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.node(event, depth + 1)
            if not isinstance(key, Scalar):
                _refuse("a key must be a name", event)
            value = self.node(next(self.events), depth + 1)
            if key.plain and key.text == "<<":
                for other in value if isinstance(value, list) else [value]:
                    if not isinstance(other, dict):
                        _refuse("`<<` takes a mapping, or a list of them", event)
                    merged = other | merged
            elif key.text in own:
                _refuse(f"duplicate key {key.text!r}", event)
            else:
                own[key.text] = value
        return merged | own
