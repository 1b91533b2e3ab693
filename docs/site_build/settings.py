"""The reference of all settings, made of the schema: types and ranges are its annotations, descriptions its comments.

Rule: a field is described by the comment on its line and the comment lines directly above it, as in schema.py.
"""

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from mythos_dist.config import schema
from mythos_dist.config.fields import Kind, Section, as_lists, kinds_of
from mythos_dist.config.load import SECTIONS

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
OF_VERSION_0_1 = REPOSITORY / "tests" / "fixtures" / "run_of_version_0.1" / "run" / "config.yaml"
UNITS = {  # of the schema's types
    "Tokens": "tokens", "Layers": "layers", "LoopCount": "loops", "Ranks": "ranks", "Sequences": "sequences",
    "Steps": "steps", "StepsOrOff": "steps", "Seconds": "seconds", "SizeText": "bytes",
}  # fmt: skip
UNITS_OF = {  # of settings whose type is used with several
    "run.max_seconds": "seconds", "run.peak_tflops": "TFLOP/s", "faults.clock_skew": "seconds",
    "train.chunk_tokens": "tokens", "train.eval_samples": "sequences", "train.batch_ramp": "sequences, steps",
    "data.mix_samples": "sequences", "act.ponder_cost": "nats per loop", "data.prefetch_shards": "shards",
    "data.workers": "processes per rank", "checkpoint.keep": "checkpoints", "checkpoint.remote_keep": "checkpoints",
    "checkpoint.remote_backlog": "checkpoints", "loops.maximum": "loops",
}  # fmt: skip
EXAMPLES = {  # of settings that no shipped config sets, and whose type suggests none
    "act.prior": "0.25", "loops.backprop": "4", "model.dropout": "0.1", "model.kv_sharing": "every:4",
    "model.rope_scaling.attention_factor": "1.1", "model.rope_scaling.beta_fast": "64",
    "model.rope_scaling.beta_slow": "2", "model.rope_scaling.low_freq_factor": "2",
    "model.rope_scaling.high_freq_factor": "8",
    "optim.beta1": "0.95", "optim.beta2": "0.99", "optim.muon_momentum": "0.9", "train.chunk_tokens": "16384",
    "average.last": "20", "checkpoint.key_file": "~/.mythos/key", "checkpoint.pin": "[100, 250]",
    "checkpoint.remote": "s3://bucket/run", "checkpoint.remote_keep": "3", "data.cache": "/local/shards",
    "data.cache_limit": "200GB", "data.mix": "{shards/web: 0.7, shards/code: 0.3}",
    "data.mix_end": "{shards/web: 0.2, shards/code: 0.8}", "data.mix_samples": "[40000, 80000]",
    "data.tokenizer": "tokenizer.model", "faults.inject": "nan@3:0", "faults.spike_factor": "10",
    "loops.maximum": "32", "loops.set": "[1, 2, 4, 8]", "model.loop_layers": "4",
    "model.norm_eps": "1.0e-5", "model.dense_dim": "5632", "model.gqa_head_dim": "128",
    "model.rope_scaling": schema.RopeScaling.example,
    "optim.muon_lr": "0.01", "run.cluster": "configs/clusters/h100_80gb.yaml", "run.max_seconds": "84000",
    "run.peak_tflops": "989", "run.stage": "chat",
    "run.start_from": "runs/first", "train.batch_ramp": "[[8, 100], [16, 200]]",
    "train.tasks": "[hellaswag]", "loops.sweep": "[1, 2, 4, 8]",
    "run.project": "loops", "run.group": "first-study", "run.tags": "[demo, muon]",
    "run.profile": schema.ProfileConfig.example, "run.profile.steps": "[10, 12]", "run.profile.ranks": "[0, 8]",
}  # fmt: skip
_COMMENT = re.compile(r"^\s*#\s?(.*)$")


@dataclass(frozen=True)
class Setting:
    """One entry of the reference."""

    name: str  # section.field
    kind: Kind
    default: str  # as YAML; "" if the setting must be given
    unit: str  # "" if it has none
    description: str  # Markdown
    examples: tuple[tuple[str, str], ...]  # (value as YAML, the config that sets it or "")
    since: str  # version

    @property
    def type_text(self) -> str:
        """Type and range in words, as Markdown."""
        return type_text(self.kind)


def all_settings() -> dict[type[Section], list[Setting]]:
    """The settings by section, in the order of the schema."""
    old = yaml.safe_load(OF_VERSION_0_1.read_text(encoding="utf-8"))
    found = examples_in_configs()
    inner: dict[type[Section], type[Section]] = {
        schema.MythosConfig: schema.RopeScaling,
        schema.RunConfig: schema.ProfileConfig,
    }
    sections = [one for section in SECTIONS.values() for one in (section, inner.get(section)) if one]
    return {section: list(_of_section(section, old, found)) for section in sections}


def _of_section(
    section: type[Section], old: dict[str, Any], found: dict[str, list[tuple[str, str]]]
) -> Iterator[Setting]:
    comments, types = comments_of(section), annotations_of(section)
    for one in fields(section):  # pyright: ignore[reportArgumentType]
        name, kind = f"{section.section}.{one.name}", kinds_of(section)[one.name]
        units = [unit for word, unit in UNITS.items() if re.search(rf"\b{word}\b", types[one.name])]
        yield Setting(
            name=name,
            kind=kind,
            default=_default(one),
            unit=UNITS_OF.get(name, units[0] if units else ""),
            description=markdown(comments.get(one.name, ""), kind.choices or (kind.words.words if kind.words else ())),
            examples=tuple(found.get(name, [])[:2]) or _example(name, kind, one.default),
            since="0.1" if one.name in old.get(section.section, {}) else "",
        )


def comments_of(section: type) -> dict[str, str]:
    """{field: its comments} of a dataclass, those above before the one beside."""
    source = inspect.getsource(section)
    lines = source.splitlines()
    beside: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1].strip() != token.string:
            beside[token.start[0]] = token.string.lstrip("# ")
    found = {}
    for node in _fields(source):
        above = []
        for line in reversed(lines[: node.lineno - 1]):
            if not (match := _COMMENT.match(line)):
                break
            above.insert(0, match[1])
        own = [beside[i] for i in range(node.lineno, (node.end_lineno or node.lineno) + 1) if i in beside]
        texts = [" ".join(" ".join(part).split()) for part in (above, own)]
        found[node.target.id] = " ".join(text if text.endswith((".", ":")) else f"{text}." for text in texts if text)
    return found


def annotations_of(section: type) -> dict[str, str]:
    """{field: source of its annotation} of a dataclass."""
    return {node.target.id: ast.unparse(node.annotation) for node in _fields(inspect.getsource(section))}


def _fields(source: str) -> list[Any]:
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    return [node for node in definition.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]


def _default(one: Any) -> str:
    if one.metadata:
        reference, train = (as_yaml(one.metadata[mode]) for mode in ("reference", "train"))
        return train if reference == train else f"{train} (mode: reference: {reference})"
    return "" if one.default is MISSING else as_yaml(one.default)


def as_yaml(value: Any) -> str:
    """A value in YAML, on one line."""
    if isinstance(value, str):
        return value if value else '""'
    text = yaml.safe_dump(as_lists(value), default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()


def type_text(kind: Kind) -> str:
    """The type and range of a setting, as Markdown."""
    if kind.section:
        text = f"[settings](#settings-of-{kind.section.section}) of their own"
    elif kind.choices:
        text = "one of " + ", ".join(f"`{choice}`" for choice in kind.choices)
    elif kind.words:
        text = ", ".join(f"`{word}`" for word in kind.words.words) + f" or `{kind.words.prefix}N`"
    elif kind.type is bool:
        text = "`true` or `false`"
    elif kind.type in (int, float):
        text = ("whole number" if kind.type is int else "number") + _range_text(kind)
    elif kind.type is str:
        text = "size, such as `400kB`" if kind.size else "path or URL" if kind.path else "text"
    elif kind.type is dict:
        text = "folders with their weights"
    else:
        assert kind.item is not None
        pairs = kind.item.type is tuple
        text = (
            "list of pairs of whole numbers"
            if pairs
            else f"{'two' if kind.length else 'list of'} "
            + ("texts" if kind.item.type is str else "whole numbers" + _range_text(kind.item))
        )
    return f"{text}, or `null`" if kind.optional and kind.type is not dict else text


def _range_text(kind: Kind) -> str:
    if kind.range is None:
        return ""
    least, most = kind.range.least, kind.range.most
    lower = f" above {least:,g}" if kind.range.above else f", at least {least:,g}"
    if most >= 1e6 or 1 - 1e-9 < most < 1:
        return lower + ("" if most >= 1e6 else ", below 1")
    return f" above {least:,g}, at most {most:,g}" if kind.range.above else f", {least:,g} to {most:,g}"


def examples_in_configs() -> dict[str, list[tuple[str, str]]]:
    """{setting: [(value as YAML, config)]}, of values that shipped configs set, each value once."""
    found: dict[str, list[tuple[str, str]]] = {}
    for file in [*sorted(CONFIGS.glob("*.yaml")), *sorted(CONFIGS.glob("recipes/*.yaml"))]:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        for sections in [content, *(stage for stage in content.get("stages", []) if isinstance(stage, dict))]:
            for name, value in _settings_of(sections):
                values = found.setdefault(name, [])
                if (text := as_yaml(value)) not in [seen for seen, _ in values]:
                    values.append((text, f"configs/{file.relative_to(CONFIGS).as_posix()}"))
    return found


def _settings_of(sections: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, settings in sections.items():
        if isinstance(settings, dict) and section in SECTIONS:
            for key, value in settings.items():
                yield f"{section}.{key}", value
                if isinstance(value, dict) and key == "rope_scaling":
                    yield from ((f"{section}.{key}.{inner}", each) for inner, each in value.items())


def _example(name: str, kind: Kind, default: Any) -> tuple[tuple[str, str], ...]:
    if name in EXAMPLES:
        return ((EXAMPLES[name], ""),)
    if kind.choices:
        value: Any = next(choice for choice in kind.choices if choice != default)
    elif kind.type is bool:
        value = not default
    elif kind.type in (int, float) and default not in (None, MISSING):
        value = default * 2 or 1
        value = value if kind.problem(value) is None else default
    else:
        return ()
    return ((as_yaml(value), ""),)


def markdown(text: str, choices: tuple = ()) -> str:
    """The text of a comment as Markdown: what Markdown would read is escaped outside of code spans, and explained
    `choices` become code."""
    text = re.sub(r"\bNone\b", "`null`", text)
    for choice in choices:
        text = re.sub(rf"(?<![`\w.=])({re.escape(str(choice))})(?=:|, \w+:)", r"`\1`", text)
    parts = re.split(r"(`[^`]*`)", text)
    escaped = (part if part.startswith("`") else re.sub(r"([*_\[\]<>$|#~])", r"\\\1", part) for part in parts)
    text = "".join(escaped)
    return text[:1].upper() + text[1:]


def page() -> str:
    """The reference as a Markdown page."""
    parts = [
        "# Settings\n",
        "Every setting of a run, from `mythos_dist/config/schema.py`. In YAML a setting is a key of its section, on "
        "the command line it is `section.field=value`:\n",
        "```yaml\ntrain:\n  steps: 2000\noptim:\n  lr: 3.0e-4\n```\n",
        "```\nmythos train configs/tiny_cpu.yaml train.steps=40 optim.lr=1e-3\n```\n",
        "Unknown keys, values of another type or outside their range, and settings that contradict each other are "
        "reported together, before anything is written. A config may name a `base:`, a file whose settings it changes, "
        "and `model.variant: 1b` (to `1t`) sets a size of OpenMythos.\n",
    ]
    for section, settings in all_settings().items():
        title = section.section + (".\\*" if "." in section.section else "")
        parts.append(f"(settings-of-{section.section})=\n## {title}\n")
        if (docstring := section.__dict__.get("__doc__")) and not docstring.startswith(section.__name__ + "("):
            parts.append(markdown(" ".join(docstring.partition(">>>")[0].split())) + "\n")
        for one in settings:
            parts += [f"### {one.name}\n", one.description + "\n", _facts(one)]
    return "\n".join(parts)


def _facts(one: Setting) -> str:
    rows = [("Type", one.type_text), ("Default", f"`{one.default}`" if one.default else "none: it must be given")]
    if one.unit:
        rows.append(("Unit", one.unit))
    if one.examples:
        shown = [f"`{value}`" + (f" (`{config}`)" if config else "") for value, config in one.examples]
        rows.append(("Example" if len(shown) == 1 else "Examples", ", ".join(shown)))
    rows.append(("Since", one.since or "the version after 0.1"))
    return "\n".join(f"- {name}: {text}" for name, text in rows) + "\n"
