"""From YAML files and `section.key=value` overrides to one checked `Config`, or to every problem at once.

Rule: later wins. `base:` files first (paths relative to the file that names them), then the file, then overrides;
within a source, `model.variant` fills `model.*` before the other model keys of the same source are laid over it.
The trap: what a text means depends on the type of its setting, so texts stay texts until all sources are laid over
each other (config/tree.py, config/fields.py).
"""

import dataclasses
import difflib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml

from mythos_dist.config.fields import Kind, kinds_of, show, value_problems
from mythos_dist.config.rules import find_problems
from mythos_dist.config.schema import BY_MODE, Config
from mythos_dist.config.tree import NULLS, Node, Scalar, parse_yaml, read_yaml, show_node
from mythos_dist.config.variants import VARIANTS
from mythos_dist.errors import UserError

SECTIONS: dict[str, type] = get_type_hints(Config)
_MOST_FILES = 100  # a config and all its bases, each counted as often as it is named
_COMMAND_LINE = "the command line"


class _Source(NamedTuple):
    """What one file, or the command line, sets: section -> what is below it."""

    name: str
    sections: dict[str, Node]


class _Dumper(yaml.SafeDumper):
    """Puts quotes around texts that any reader of YAML, 1.1 or 1.2, would take for something else."""


def _quoted_where_unsure(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = text.replace("/", "").replace("_", "").replace("-", "").replace(".", "")
    unsure = not plain.isascii() or not plain.isalnum() or not plain[0].isalpha() or text.lower() in _WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if unsure else None)


_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n", "inf", "nan"}
_Dumper.add_representer(str, _quoted_where_unsure)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read `path`, lay the overrides over it and check the result.

    Where a source replaces `data.path` by `data.mix`, or the other way round, rank 0 says so on standard error.
    Raises UserError that lists every problem: unknown keys, wrong types, values that do not go together.
    """
    found: list[str] = []
    path = Path(path).expanduser() if str(path).startswith("~/") else Path(path)
    sources = [*_read_with_bases(path, (), [0]), _Source(_COMMAND_LINE, _parse_overrides(overrides, found))]
    values, notes = _laid_over(sources, found)
    config = _build(values, found)
    if found:
        raise UserError(found, source=str(path))
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        for note in notes:
            print(f"note: {path}: {note}", file=sys.stderr)
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
    return dump_settings(dataclasses.asdict(config))


def dump_settings(sections: dict[str, dict[str, Any]]) -> str:
    """Settings by section as YAML that `load_config` reads back."""
    plain = {
        section: {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
        for section, settings in sections.items()
    }
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False)


def _read_with_bases(path: Path, above: tuple[Path, ...], count: list[int]) -> list[_Source]:
    """What `path` and all its bases set, bases first. count: [files read so far]."""
    try:
        here = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL
        raise UserError(f"the config file {str(path)!r} cannot be read: {error}") from None
    if here in above:
        raise UserError(f"base: {path} is its own base; remove one of the `base:` lines", source=str(above[0]))
    count[0] += 1
    if count[0] > _MOST_FILES:
        raise UserError(f"base: more than {_MOST_FILES} files in all; name each base once", source=str(above[0]))
    named = f" (named by `base:` in {above[-1]})" if above else ""
    try:
        document = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"there is no config file {path}{named}; check the path{_files_like(path)}") from None
    except IsADirectoryError:
        raise UserError(f"the config file {path}{named} cannot be read: it is a folder{_files_in(path)}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the config file {path}{named} cannot be read: {error}") from None
    if isinstance(document, Scalar) and document.plain and document.text in NULLS:
        document = {}
    if not isinstance(document, dict):
        raise UserError(f"holds {show(document)} instead of sections like `model:` and `train:`", source=str(path))
    sections = dict(document)
    base = sections.pop("base", Scalar(""))
    bases = base if isinstance(base, list) else [] if base == Scalar("null") or base == Scalar("") else [base]
    sources: list[_Source] = []
    for one in bases:
        if not isinstance(one, Scalar) or not one.text:
            raise UserError(f"base={show_node(base)}: expected a file name or a list of them", source=str(path))
        sources += _read_with_bases(path.parent / os.path.expanduser(one.text), (*above, here), count)
    return [*sources, _Source(str(path), sections)]


def _files_like(path: Path) -> str:
    """The configs that may have been meant: those beside the path, else those of the repository."""
    for folder in (path.parent, Path("configs"), Path(__file__).parents[2] / "configs"):
        if names := _configs_in(folder):
            close = difflib.get_close_matches(path.stem, [name.removesuffix(".yaml") for name in names], n=1)
            meant = f"; did you mean {folder / close[0]}.yaml?" if close else ""
            return f"{meant or ';'} in {folder} there are {', '.join(names)}"
    return ""


def _files_in(folder: Path) -> str:
    names = _configs_in(folder)
    return f"; give a file in it, such as {folder / names[0]}" if names else ", with no .yaml file in it"


def _configs_in(folder: Path, most: int = 30) -> list[str]:
    """Names of the config files in a folder."""
    try:
        return sorted(file.name for file in folder.glob("*.yaml") if file.is_file())[:most]
    except OSError:
        return []


def _parse_overrides(overrides: Iterable[str], found: list[str]) -> dict[str, Node]:
    """Texts like `train.steps=100` as one source; what is none goes to `found`."""
    source: dict[str, dict[str, Node]] = {}
    for text in overrides:
        name, equals, raw = text.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot:
            found.append(f"{text!r}: expected section.key=value, such as train.steps=100")
            continue
        kind = kinds_of(SECTIONS[section]).get(key) if section in SECTIONS else None
        is_text = (section, key) == ("model", "variant") or (kind is not None and kind.type is str)
        try:
            source.setdefault(section, {})[key] = _override(raw.strip(" "), is_text)
        except UserError:
            found.append(f"{name}={show(raw)}: not a YAML value; put it in quotes")
    return {**source}


def _override(raw: str, is_text: bool) -> Node:
    """The value of an override. A text is what was typed, but for quotes around all of it, lists and mappings."""
    if not is_text or raw[:1] in ("[", "{"):
        return parse_yaml(raw)
    if len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "'\"":
        try:
            return parse_yaml(raw)
        except UserError:
            pass  # quotes that are part of the text
    return Scalar(raw)


def _laid_over(sources: Iterable[_Source], found: list[str]) -> tuple[dict[str, dict[str, Node]], list[str]]:
    """All settings, section by section, and notes on what replaced what; what is no setting goes to `found`."""
    values: dict[str, dict[str, Node]] = {}
    notes: list[str] = []
    for source in sources:
        for section, entries in source.sections.items():
            if section not in SECTIONS:
                found.append(f"{section[:80]}: unknown section{_did_you_mean(section, list(SECTIONS))}")
            elif isinstance(entries, dict):
                target = values.setdefault(section, {})
                if section == "data":
                    notes += _one_of_path_and_mix(target, entries, source.name)
                _lay_over(target, section, entries, found)
            elif not (isinstance(entries, Scalar) and entries.plain and entries.text in NULLS):  # `train:` alone
                found.append(
                    f"{section}={show_node(entries, 80)}: expected settings below it, such as `{section}: {{...}}`"
                )
    return values, notes


def _one_of_path_and_mix(target: dict[str, Node], entries: dict[str, Node], source: str) -> Iterable[str]:
    """One stands for the other, so a later source's `mix` replaces `path`: take it out of `target`, and say so."""
    for key, other in (("mix", "path"), ("path", "mix")):
        if _is_set(entries.get(key)) and other not in entries and _is_set(before := target.pop(other, None)):
            yield (
                f"data.{key} of {source} replaces data.{other}={_short(before)}; "
                f"give data.{other}=null beside it to leave out this note"
            )


def _is_set(node: Node | None) -> bool:
    return node is not None and not (
        isinstance(node, Scalar) and (not node.text or (node.plain and node.text in NULLS))
    )


def _short(node: Node | None) -> str:
    return node.text if isinstance(node, Scalar) else show_node(node or {}, 80)


def _lay_over(target: dict[str, Node], section: str, entries: dict[str, Node], found: list[str]) -> None:
    """Lay one source's settings of a section over those of earlier sources."""
    known = list(kinds_of(SECTIONS[section]))
    if section == "model" and "variant" in entries:
        variant = entries["variant"]
        if isinstance(variant, Scalar) and variant.text in VARIANTS:
            target.update({key: Scalar(str(value)) for key, value in VARIANTS[variant.text].items()})
        else:
            shown = repr(variant.text[:80]) if isinstance(variant, Scalar) else show_node(variant, 80)
            found.append(f"model.variant={shown}: {unknown_name(shown.strip(chr(39)), VARIANTS, 'variant')}")
    for key, value in entries.items():
        if key in known:
            target[key] = value
        elif (section, key) != ("model", "variant"):
            found.append(f"{section}.{key[:80]}: unknown key{_did_you_mean(key, known, section + '.')}")


def unknown_name(name: str, known: Iterable[str], what: str) -> str:
    """What is said of a name that is none of `known`: the closest one, and all of them."""
    close = difflib.get_close_matches(name[:80].lower(), list(known), n=1, cutoff=0.5)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"unknown {what}; {meant}set it to one of {', '.join(known)}"


def _did_you_mean(key: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(key[:80], known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    # Perhaps a right key under a wrong section: `train.lr`.
    homes = [f"{name}.{key}" for name, cls in SECTIONS.items() if key in kinds_of(cls)]
    return f"; did you mean {homes[0]}?" if homes else f"; known here: {', '.join(known)}"


def _build(values: dict[str, dict[str, Node]], found: list[str]) -> Config:
    """The Config. Adds each value that its field cannot hold to `found`, and broken rules among the other values."""
    sections: dict[str, Any] = {}
    refused: set[str] = set()  # settings
    for section, cls in SECTIONS.items():
        kinds, accepted = kinds_of(cls), {}
        for key, node in values.get(section, {}).items():
            value, wrong = _read(kinds[key], node)
            found += [f"{section}.{key}{words}" for words in wrong]
            if wrong:
                refused.add(f"{section}.{key}")
            else:
                accepted[key] = value
        sections[section] = cls.of_right_values(**accepted)
    config = Config(**sections)
    # Defaults replace the refused values: a rule about such a default would only confuse.
    found += [problem.message for problem in find_problems(config) if refused.isdisjoint(problem.settings)]
    return config


def _read(kind: Kind, node: Node) -> tuple[Any, list[str]]:
    """The value of a setting, and what is wrong with it, each text to follow the setting's name."""
    try:
        value = kind.read(node)
    except ValueError as error:
        return None, [f"={_shown(node)}: expected {error}"]
    if isinstance(node, Scalar):  # shown as the user wrote it
        problem = kind.problem(value)
        return value, [f"={_shown(node)}{problem}"] if problem else []
    return value, list(value_problems(kind, value))


def _shown(node: Node) -> str:
    return show_node(node, 80) if not isinstance(node, Scalar) else show(node)
