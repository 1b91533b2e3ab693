"""The reference of the Python interface: the docstrings of `mythos_dist.__all__`, read by Sphinx' autodoc."""

import re
from collections.abc import Mapping

import mythos_dist
from site_build.settings import comments_of, markdown

GROUPS: Mapping[str, tuple[str, ...]] = {
    "The model": ("Mythos", "MythosConfig", "ActConfig", "ExpertsConfig", "KVCache"),
    "Trained models": ("load_model", "load_trained", "sweep"),
    "Generation": ("DecodingEngine", "Sampling"),
    "Settings of a run": ("load_config", "load_stages", "Config", "UserError"),
    "Data": ("Tokenizer", "train_tokenizer", "convert", "verify"),
    "Planning": ("Estimate", "load_cluster"),
}
MEMBERS = {
    "Mythos": "forward, generate, from_pretrained, load_open_mythos, update_router_bias",
    "KVCache": "lengths, tokens, select",
    "DecodingEngine": "submit, step, run, cancel, max_seq_len",
    "Tokenizer": "load, encode, decode",
    "Estimate": "fits, stages, largest_stage, step_seconds, tokens_per_second, mfu, gpu_hours, communication",
}
_SECTIONS = {"MythosConfig": "model", "ActConfig": "act", "ExpertsConfig": "experts"}
_ARGUMENT = re.compile(r"^(?:`(\w+)`|(\w+)): (.*)$")


def page() -> str:
    """The reference as a Markdown page."""
    parts = [
        "# Python\n",
        "`from mythos_dist import …` gives the names below; what is not listed here may change without notice. B is "
        "the batch, S the sequence in tokens, V the vocabulary. The examples expect a run in `runs/first`, an export "
        "of it in `exported`, shards in `shards` and texts in `text.jsonl`; a test runs them.\n",
    ]
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        parts += [_entry(name) for name in names]
    return "\n".join(parts)


def _entry(name: str) -> str:
    value = getattr(mythos_dist, name)
    if not isinstance(value, type):
        return f"```{{eval-rst}}\n.. autofunction:: mythos_dist.{name}\n```\n"
    signature = "(**settings)" if name in _SECTIONS or name == "Sampling" else ""
    lines = [f".. autoclass:: mythos_dist.{name}{signature}"]
    if name in MEMBERS:
        lines += [f"   :members: {MEMBERS[name]}", "   :member-order: bysource"]
    text = "```{eval-rst}\n" + "\n".join(lines) + "\n```\n"
    if name in _SECTIONS:
        text += f"\nIts settings are those of [`{_SECTIONS[name]}`](settings.md#settings-of-{_SECTIONS[name]}).\n"
    if name == "Sampling":
        comments = comments_of(value)
        for field in value.__dataclass_fields__.values():
            text += f"\n- `{field.name}` (default `{field.default!r}`): {markdown(comments.get(field.name, ''))}"
        text += "\n"
    return text


def describe_arguments(lines: list[str], names: set[str]) -> None:
    """Rewrite a docstring in place: lines such as `seq_len: tokens` about an argument become fields of a list.

    Text that follows on the same line and on indented lines belongs to the argument, until the next one or a blank
    line.
    """
    output, inside = [], False
    for line in lines:
        match = _ARGUMENT.match(line)
        if match and (match[1] or match[2]) in names:
            if not inside:
                output.append("")
            output.append(f":param {match[1] or match[2]}: {match[3]}")
            inside = True
        elif inside and line.strip() and not line.startswith(("Raises ", "Returns ", "On a mesh ", "Without ")):
            output.append(f"    {line.strip()}")
        else:
            if inside and line.strip():
                output.append("")
            inside = False
            output.append(line)
    lines[:] = output
