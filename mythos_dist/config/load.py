"""From YAML files and `section.key=value` overrides to one checked `Config`, or to every problem at once.

Rule: later wins. `base:` files first (paths relative to the file that names them), then the file, then overrides;
within a source, `model.variant` fills `model.*` before the other model keys of the same source are laid over it.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from mythos_dist.config.check import problems
from mythos_dist.config.schema import BY_MODE, Config
from mythos_dist.config.variants import VARIANTS
from mythos_dist.errors import UserError

SECTIONS: dict[str, type] = get_type_hints(Config)


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `3e-4` is a number and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around texts that `_Loader` would read as a number."""


# PyYAML follows YAML 1.1, where a float needs a dot and `off` is false: without this `lr: 3e-4` would be a text, and
# `act.mode: off` none. Such words are still written in quotes.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] != _BOOL] for first, rules in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read `path`, lay the overrides over it and check the result.

    Raises UserError that lists every problem: unknown keys, wrong types, values that do not go together.
    """
    found: list[str] = []
    values: dict[str, dict[str, Any]] = {}
    for source in _read_with_bases(Path(path), ()):
        _lay_over(values, source, found)
    _lay_over(values, _parse_overrides(overrides, found), found)
    config = _build(values, found)
    if found:
        raise UserError(found, source=str(path))
    return config


def config_from(values: dict[str, dict[str, Any]]) -> Config:
    """The Config of settings that `dataclasses.asdict` made of one that was checked; sections that lack are defaults.

    Settings of `model` that lack are OpenMythos': they were made before there was a choice. Raises UserError for
    settings that this version does not know.
    """
    values = {**values, "model": BY_MODE["reference"] | values.get("model", {})}
    try:
        return Config(**{section: SECTIONS[section](**settings) for section, settings in values.items()})
    except (KeyError, TypeError) as error:
        raise UserError(f"settings of another version of mythos_dist ({error})") from None


def dump_config(config: Config) -> str:
    """The whole config as YAML, every setting written out; `load_config` reads it back to an equal Config."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False)


def _read_with_bases(path: Path, above: tuple[Path, ...]) -> list[dict]:
    """The mappings of `path` and of all its bases, bases first."""
    if path.resolve() in above:
        raise UserError(f"base: {path} is its own base; remove one of the `base:` lines", source=str(above[0]))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        named = f" (named by `base:` in {above[-1]})" if above else ""
        raise UserError(f"there is no config file {path}{named}; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the config file {path} cannot be read: {error}") from None
    try:
        document = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}", source=str(path)) from None
    document = {} if document is None else document
    if not isinstance(document, dict):
        raise UserError(f"holds {document!r} instead of sections like `model:` and `train:`", source=str(path))
    bases = document.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"base={bases!r}: expected a file name or a list of them", source=str(path))
    sources: list[dict] = []
    for base in bases:
        sources += _read_with_bases(path.parent / base, (*above, path.resolve()))
    return [*sources, document]


def _parse_overrides(overrides: Iterable[str], found: list[str]) -> dict[str, dict[str, Any]]:
    source: dict[str, dict[str, Any]] = {}
    for text in overrides:
        name, equals, raw = text.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot:
            found.append(f"{text!r}: expected section.key=value, such as train.steps=100")
            continue
        try:
            source.setdefault(section, {})[key] = yaml.load(raw, _Loader)
        except yaml.YAMLError:
            found.append(f"{name}={raw!r}: not a YAML value; put it in quotes")
    return source


def _lay_over(values: dict[str, dict[str, Any]], source: dict, found: list[str]) -> None:
    """Add a source's settings to `values`; what is not a setting goes to `found`."""
    for section, entries in source.items():
        if section not in SECTIONS:
            found.append(f"{section}: unknown section{_did_you_mean(section, list(SECTIONS))}")
            continue
        if entries is None:  # `train:` with nothing below it
            continue
        if not isinstance(entries, dict):
            found.append(f"{section}={entries!r}: expected settings below it, such as `{section}: {{...}}`")
            continue
        known = [f.name for f in dataclasses.fields(SECTIONS[section])]
        target = values.setdefault(section, {})
        if section == "data" and len(named := {"path", "mix"} & entries.keys()) == 1:
            for other in {"path", "mix"} - named:  # one stands for the other, so a later source's `mix` replaces `path`
                target.pop(other, None)
        if section == "model" and "variant" in entries:
            variant = str(entries["variant"])
            if variant in VARIANTS:
                target.update(VARIANTS[variant])
            else:
                found.append(f"model.variant={variant!r}: unknown variant; set it to one of {', '.join(VARIANTS)}")
        for key, value in entries.items():
            if section == "model" and key == "variant":
                continue
            if key in known:
                target[key] = value
            else:
                found.append(f"{section}.{key}: unknown key{_did_you_mean(str(key), known, section + '.')}")


def _did_you_mean(key: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    # Perhaps a right key under a wrong section: `train.lr`.
    homes = [f"{name}.{key}" for name, cls in SECTIONS.items() if key in {f.name for f in dataclasses.fields(cls)}]
    return f"; did you mean {homes[0]}?" if homes else f"; known here: {', '.join(known)}"


_EXPECTED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "string_type": "text",
}
_MIX = "folders with their weights, such as {shards/web: 0.7, shards/code: 0.3}"


def _build(values: dict[str, dict[str, Any]], found: list[str]) -> Config:
    """The Config; each value of a wrong type goes to `found`, and the problems of all other settings too."""
    sections, wrong = {}, []
    for name, cls in SECTIONS.items():
        adapter, hints, entries = TypeAdapter(cls), get_type_hints(cls), dict(values.get(name, {}))
        bad: dict[str, str] = {}  # key -> what was expected
        for key, value in entries.items():
            if isinstance(value, bool) and bool not in (hints[key], *get_args(hints[key])):
                bad[key] = _plain(hints[key])  # pydantic would read true as 1
            elif isinstance(value, int | float) and str in (hints[key], *get_args(hints[key])):
                entries[key] = str(value)  # a folder may be called 2026
            elif isinstance(value, dict):
                entries[key] = {str(folder): weight for folder, weight in value.items()}
                if any(isinstance(weight, bool) for weight in value.values()):
                    bad[key] = _MIX
        try:
            adapter.validate_python(entries)
        except ValidationError as error:
            for problem in error.errors():
                key = str(problem["loc"][0])
                expected = _EXPECTED.get(problem["type"]) or problem.get("ctx", {}).get("expected") or problem["msg"]
                bad.setdefault(key, _MIX if dict[str, float] in get_args(hints[key]) else expected)
        found += [f"{name}.{key}={_yaml(entries[key])}: expected {expected}" for key, expected in bad.items()]
        wrong += [f"{name}.{key}=" for key in bad]
        section = adapter.validate_python({k: v for k, v in entries.items() if k not in bad})
        for key, value in vars(section).items():
            if isinstance(value, float) and not math.isfinite(value):
                found.append(f"{name}.{key}={value}: expected a finite number")
                wrong.append(f"{name}.{key}=")
        sections[name] = section
    config = Config(**sections)
    # A wrong value was replaced by its default above: what is said about that default would confuse.
    found += [line for line in problems(config) if not any(setting in line for setting in wrong)]
    return config


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _plain(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", dict[str, float]: _MIX}
    options = [names.get(h, repr(h)) for h in (get_args(hint) or (hint,)) if h is not type(None)]
    return " or ".join(options)
