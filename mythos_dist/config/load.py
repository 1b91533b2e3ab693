"""YAML files and `section.key=value` overrides -> one checked `Config`, or all problems at once.

Rule: later wins. `base:` files first (paths relative to the file that names them), then the file, then overrides;
within a source, `model.variant` sets `model.*` before the source's other model keys.
The trap: the value of a text depends on the type of its setting, so texts are converted only after all sources are
merged (tree.py, fields.py).

Decisions: CONFIG-3.
"""

import difflib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from mythos_dist.config.fields import Kind, Section, kinds_of, show, value_problems
from mythos_dist.config.rules import problems
from mythos_dist.config.schema import BY_MODE, Config
from mythos_dist.config.stages import lines_by_stage, read_stages, stage_problems
from mythos_dist.config.tree import NULLS, Node, Scalar, parse_yaml, read_yaml, show_node
from mythos_dist.config.variants import VARIANTS
from mythos_dist.errors import UserError
from mythos_dist.packaged import CONFIGS, packaged_file

SECTIONS: dict[str, type] = get_type_hints(Config)
TOP_LEVEL = {"start_from": "run", "start_from_state": "run"}  # settings that need no section, and theirs
_MAX_FILES = 100  # a config and all its bases, each counted as often as it is named
_COMMAND_LINE = "the command line"


class _Source(NamedTuple):
    """The settings of one file or of the command line, by section."""

    name: str
    sections: dict[str, Node]
    stages: Node | None = None  # `stages:` of a file


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read `path`, apply the overrides and check the result; of several `stages:` the first one's.

    Where a source replaces `data.path` by `data.mix` or vice versa, rank 0 prints a note on standard error.
    Raises UserError with all problems: unknown keys, wrong types, broken rules.

    >>> from mythos_dist import load_config
    >>> load_config("configs/tiny_cpu.yaml", ["train.steps=40"]).train.steps
    40
    """
    return load_stages(path, overrides)[0]


def load_stages(path: str | Path, overrides: Iterable[str] = ()) -> list[Config]:
    """As `load_config`, for each of the file's `stages:` in order; without them a list of one.

    Overrides apply to every stage.

    >>> from mythos_dist import load_stages
    >>> [config.run.stage for config in load_stages("configs/recipes/long_context_tiny.yaml")]
    ['short', 'long']
    """
    messages: list[str] = []
    path = find_config(path)
    sources = _read_with_bases(path, (), [0])
    command_line = _Source(_COMMAND_LINE, _parse_overrides(overrides, messages))
    node = next((source.stages for source in reversed(sources) if source.stages is not None), None)
    if node is None:
        values, notes = _merge([*sources, command_line], messages)
        stages = [_build(values, messages)]
    else:
        stages, notes = _load_each_stage(node, sources, command_line, messages)
    if messages:
        raise UserError(messages, source=str(path))
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        for note in notes:
            print(f"note: {path}: {note}", file=sys.stderr)
    return stages


def find_config(path: str | Path) -> Path:
    """The file `path`; if there is none, the config of that name that comes with the package: 1b, recipes/sft."""
    return packaged_file(path, CONFIGS)


def _load_each_stage(
    node: Node, sources: list[_Source], command_line: _Source, messages: list[str]
) -> tuple[list[Config], list[str]]:
    """The configs of all stages, and notes. A problem that every stage has is reported once."""
    stages, notes = [], []
    problems: list[tuple[str, list[str]]] = []
    for name, settings in read_stages(node, command_line.sections, messages):
        mine: list[str] = []
        origins = (f"stage {name}", _COMMAND_LINE, f"the position of stage {name}")
        own = [_Source(origin, each) for origin, each in zip(origins, settings, strict=True)]
        values, more = _merge([*sources, *own], mine)
        stages.append(_build(values, mine))
        notes += [note for note in more if note not in notes]
        problems.append((name, mine))
    messages += lines_by_stage(problems)
    if not messages:
        messages += stage_problems(stages)
    return stages, notes


def config_from(values: dict[str, dict[str, Any]]) -> Config:
    """The Config of settings as `dataclasses.asdict` writes them; missing sections get their defaults.

    Missing settings of `model` get OpenMythos' values: they are from versions that had no others. Raises UserError for
    unknown settings.
    """
    values = {**values, "model": BY_MODE["reference"] | values.get("model", {})}
    try:
        return Config(**{section: SECTIONS[section](**settings) for section, settings in values.items()})
    except (KeyError, TypeError) as error:
        raise UserError(f"settings of another version of mythos_dist ({error})") from None


def _read_with_bases(path: Path, above: tuple[Path, ...], count: list[int]) -> list[_Source]:
    """The settings of `path` and all its bases, bases first. count: [files read so far]."""
    try:
        here = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL
        raise UserError(f"the config file {str(path)!r} cannot be read: {error}") from None
    if here in above:
        raise UserError(f"base: {path} includes itself; remove one of the `base:` lines", source=str(above[0]))
    count[0] += 1
    if count[0] > _MAX_FILES:
        raise UserError(f"base: more than {_MAX_FILES} files in total; name each base once", source=str(above[0]))
    named = f" (named by `base:` in {above[-1]})" if above else ""
    try:
        document = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"config file {path}{named} does not exist; check the path{_files_like(path)}") from None
    except IsADirectoryError:
        raise UserError(f"the config file {path}{named} cannot be read: it is a folder{_files_in(path)}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the config file {path}{named} cannot be read: {error}") from None
    if isinstance(document, Scalar) and document.plain and document.text in NULLS:
        document = {}
    if not isinstance(document, dict):
        raise UserError(f"expected sections like `model:` and `train:`, not {show(document)}", source=str(path))
    sections = dict(document)
    base = sections.pop("base", Scalar(""))
    if base in (Scalar("null"), Scalar("")):
        base = []
    bases = base if isinstance(base, list) else [base]
    sources: list[_Source] = []
    for one in bases:
        if not isinstance(one, Scalar) or not one.text:
            raise UserError(f"base={show_node(base)}: expected a file name or a list of them", source=str(path))
        sources += _read_with_bases(path.parent / os.path.expanduser(one.text), (*above, here), count)
    stages = sections.pop("stages", None)
    return [*sources, _Source(str(path), _with_sections(sections), stages)]


def _with_sections(document: dict[str, Node]) -> dict[str, Node]:
    """A file's content with the settings of TOP_LEVEL in their sections."""
    sections = {name: value for name, value in document.items() if name not in TOP_LEVEL}
    for name, section in TOP_LEVEL.items():
        if name in document:
            others = sections.get(section)
            sections[section] = {**(others if isinstance(others, dict) else {}), name: document[name]}
    return sections


def _files_like(path: Path) -> str:
    """The config files beside the path, or else those of the package, for a message."""
    for folder in (path.parent, Path("configs"), CONFIGS):
        if names := _configs_in(folder):
            stems = [name.removesuffix(".yaml") for name in names]
            close = difflib.get_close_matches(path.stem, stems, n=1)
            if folder == CONFIGS:  # found by name
                meant = f"; did you mean {close[0]}?" if close else ";"
                return f"{meant} the package contains {', '.join(stems)}"
            meant = f"; did you mean {folder / close[0]}.yaml?" if close else ""
            return f"{meant or ';'} {folder} contains {', '.join(names)}"
    return ""


def _files_in(folder: Path) -> str:
    names = _configs_in(folder)
    return f"; give a file in it, such as {folder / names[0]}" if names else ", without any .yaml file"


def _configs_in(folder: Path, most: int = 30) -> list[str]:
    """Names of the config files in a folder."""
    try:
        return sorted(file.name for file in folder.glob("*.yaml") if file.is_file())[:most]
    except OSError:
        return []


def settings_named(key: str) -> list[str]:
    """The settings with this name in any section: `lr` is optim.lr."""
    return [f"{section}.{key}" for section, kind in SECTIONS.items() if key in kinds_of(kind)]


def _parse_overrides(overrides: Iterable[str], messages: list[str]) -> dict[str, Node]:
    """Texts like `train.steps=100` as one source; adds a problem for any other text."""
    source: dict[str, dict[str, Node]] = {}
    for text in overrides:
        name, equals, raw = text.partition("=")
        section, dot, key = name.strip().partition(".")
        if section in TOP_LEVEL and not dot:
            section, dot, key = TOP_LEVEL[section], ".", section
        if not equals or not dot:
            meant = [f"{full}={raw}" for full in settings_named(name.strip())] if equals else []
            advice = f"did you mean {' or '.join(meant)}?" if meant else "such as train.steps=100"
            messages.append(f"{text!r}: expected section.key=value{';' if meant else ','} {advice}")
            continue
        kind = kinds_of(SECTIONS[section]).get(key) if section in SECTIONS else None
        is_text = (section, key) == ("model", "variant") or (kind is not None and kind.type is str)
        try:
            spaced = name != name.rstrip(" ")  # `run.dir = x`; else spaces are part of a text
            source.setdefault(section, {})[key] = _override(raw if is_text and not spaced else raw.strip(" "), is_text)
        except UserError:
            messages.append(f"{name}={show(raw)}: not a YAML value; put it in quotes")
    return {**source}


def _override(raw: str, is_text: bool) -> Node:
    """The value of an override: YAML; but text for a text setting is literal unless it is quoted."""
    if not is_text or raw[:1] in ("[", "{"):
        return parse_yaml(raw)
    if len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "'\"":
        try:
            return parse_yaml(raw)
        except UserError:
            pass  # quotes that are part of the text
    return Scalar(raw)


def _merge(sources: Iterable[_Source], messages: list[str]) -> tuple[dict[str, dict[str, Node]], list[str]]:
    """All settings by section, and notes on replaced settings; adds problems for unknown ones."""
    values: dict[str, dict[str, Node]] = {}
    notes: list[str] = []
    for source in sources:
        for section, entries in source.sections.items():
            if section in ("base", "stages", *TOP_LEVEL):
                messages.append(f"{section} belongs at the top of a config file, and cannot be set here")
            elif section not in SECTIONS:
                messages.append(
                    f"{section[:80]}: unknown section{_did_you_mean(section, [*SECTIONS, *TOP_LEVEL, 'stages'])}"
                )
            elif isinstance(entries, dict):
                target = values.setdefault(section, {})
                if section == "data":
                    notes += _replace_path_or_mix(target, entries, source.name)
                _update(target, section, entries, messages)
            elif not (isinstance(entries, Scalar) and entries.plain and entries.text in NULLS):  # `train:` alone
                messages.append(
                    f"{section}={show_node(entries, 80)}: expected settings below it, such as `{section}: {{...}}`"
                )
    return values, notes


def _replace_path_or_mix(target: dict[str, Node], entries: dict[str, Node], source: str) -> Iterable[str]:
    """A later source's `mix` replaces `path`, and vice versa: remove it from `target` and yield a note."""
    for key, other in (("mix", "path"), ("path", "mix")):
        if _is_set(entries.get(key)) and other not in entries and _is_set(before := target.pop(other, None)):
            if other == "mix":
                target.pop("mix_end", None)
                target.pop("mix_samples", None)
            yield (
                f"data.{key} of {source} replaces data.{other}={_short(before)}; "
                f"set data.{other}=null as well to silence this note"
            )


def _is_set(node: Node | None) -> bool:
    return node is not None and not (
        isinstance(node, Scalar) and (not node.text or (node.plain and node.text in NULLS))
    )


def _short(node: Node | None) -> str:
    return node.text if isinstance(node, Scalar) else show_node(node or {}, 80)


def _update(target: dict[str, Node], section: str, entries: dict[str, Node], messages: list[str]) -> None:
    """Update the settings of a section with those of a later source."""
    known = list(kinds_of(SECTIONS[section]))
    if section == "model" and "variant" in entries:
        variant = entries["variant"]
        if isinstance(variant, Scalar) and variant.text in VARIANTS:
            target.update({key: Scalar(str(value)) for key, value in VARIANTS[variant.text].items()})
        else:
            shown = repr(variant.text[:80]) if isinstance(variant, Scalar) else show_node(variant, 80)
            messages.append(f"model.variant={shown}: {unknown_name(shown.strip(chr(39)), VARIANTS, 'variant')}")
    for key, value in entries.items():
        if key in known:
            target[key] = value
        elif (section, key) != ("model", "variant"):
            messages.append(f"{section}.{key[:80]}: unknown key{_did_you_mean(key, known, section + '.')}")


def unknown_name(name: str, known: Iterable[str], what: str) -> str:
    """The message for a name that is not in `known`: the closest one, and all of them."""
    close = difflib.get_close_matches(name[:80].lower(), list(known), n=1, cutoff=0.5)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"unknown {what}; {meant}set it to one of {', '.join(known)}"


def _did_you_mean(key: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(key[:80], known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    # Perhaps the key of another section: `train.lr`.
    elsewhere = [f"{name}.{key}" for name, cls in SECTIONS.items() if key in kinds_of(cls)]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; choose from {', '.join(known)}"


def _build(values: dict[str, dict[str, Node]], messages: list[str]) -> Config:
    """The Config. Adds problems for values that their fields refuse, and for broken rules among the other values."""
    sections: dict[str, Any] = {}
    refused: set[str] = set()  # settings
    for section, cls in SECTIONS.items():
        kinds, accepted = kinds_of(cls), {}
        for key, node in values.get(section, {}).items():
            value, wrong = _read(kinds[key], node)
            messages += [f"{section}.{key}{words}" for words in wrong]
            if wrong:
                refused.add(f"{section}.{key}")
            else:
                accepted[key] = value
        sections[section] = cls.from_checked_values(**accepted)
    config = Config(**sections)
    # Defaults replace the refused values: a rule about such a default would only confuse.
    messages += problems(config, refused)
    return config


def _read(kind: Kind, node: Node) -> tuple[Any, list[str]]:
    """The value of a setting, and what is wrong with it, each text to follow the setting's name."""
    if kind.section and isinstance(node, dict):
        return _read_section(kind.section, node)
    try:
        value = kind.read(node)
    except ValueError as error:
        return None, [f"={_shown(node)}: expected {error}"]
    if isinstance(node, Scalar):  # shown as the user wrote it
        problem = kind.problem(value)
        return value, [f"={_shown(node)}{problem}"] if problem else []
    return value, list(value_problems(kind, value))


def _read_section(section: type[Section], node: dict[str, Node]) -> tuple[Any, list[str]]:
    """As `_read`, of a setting that has settings of its own. Rules between those and others are in rules.py."""
    kinds, accepted, wrong = kinds_of(section), {}, []
    for key, each in node.items():
        if key not in kinds:
            close = difflib.get_close_matches(key[:80], kinds, n=1, cutoff=0.5)
            meant = f"did you mean {close[0]}?" if close else f"choose from {', '.join(kinds)}"
            wrong.append(f".{key[:80]}: unknown key; {meant}")
            continue
        accepted[key], problems = _read(kinds[key], each)
        wrong += [f".{key}{problem}" for problem in problems]
    if missing := section.required() - node.keys():
        wrong.append(f": {', '.join(sorted(missing))} must be set, as in {section.example}")
    if wrong:
        return None, wrong
    value = section.from_checked_values(**accepted)
    return value, [problem.removeprefix(section.section) for problem in value.contradictions()]


def _shown(node: Node) -> str:
    return show_node(node, 80) if not isinstance(node, Scalar) else show(node)
