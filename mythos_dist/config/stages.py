"""`stages:` in a config: a list of stages that train one after the other in one run folder.

    stages:
      - {name: stable, steps: 1000, optim: {schedule: constant}}
      - {name: decay, steps: 200, optim: {schedule: linear, warmup_steps: 0}, data: {path: shards/better}}

A stage has `steps`, perhaps a `name` and a `start_from_state`, and the settings that differ from those of the file. It
becomes a config of its own: `train.steps` is where its schedule ends, `run.stage_begin` the step of the run after which
it begins.

Decisions: STAGES-3.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from operator import attrgetter
from typing import Any

from mythos_dist.config.compare import WIDTHS
from mythos_dist.config.fields import as_lists, number_of, show
from mythos_dist.config.schema import Config
from mythos_dist.config.tree import NULLS, Node, Scalar, show_node

_OWN = ("name", "steps", "start_from_state")  # keys of a stage that are not sections
_BY_POSITION = ("train.steps", "run.stage", "run.stage_begin", "run.start_from_state")
# Settings of the run: read before its stage is known, or applied to the checkpoints of all stages.
_OF_RUN = (
    "run.dir",
    *(f"checkpoint.{key}" for key in ("key_file", "pin", "pin_every", "remote", "remote_keep")),
    *(f"faults.{key}" for key in ("join_within", "hang_after", "lost_after")),
)
_NAME = re.compile(r"[\w.+-]{1,40}")


def read_stages(
    node: Node, command_line: dict[str, Node], problems: list[str]
) -> Iterator[tuple[str, list[dict[str, Node]]]]:
    """The name of each stage, and its settings by section: its own, the command line's, and those that follow from its
    position. Adds to `problems`."""
    if not isinstance(node, list) or not node:
        problems.append(f"stages={show_node(node, 80)}: expected a list, such as [{{name: stable, steps: 1000}}]")
        return
    problems += _refused_on_command_line(command_line)
    begin, schedule_end, names = 0, 0, set()
    for i, entry in enumerate(node):
        where = f"stages[{i}]"
        if not isinstance(entry, dict):
            problems.append(f"{where}={show_node(entry, 80)}: expected settings, such as {{name: stable, steps: 1000}}")
            continue
        name = _text(entry.get("name")) or str(i + 1)
        steps = number_of(_text(entry.get("steps")))
        if not _NAME.fullmatch(name) or name in names:
            problems.append(f"{where}.name={name[:60]!r}: expected a name of its own, of letters, digits and . + - _")
        if not isinstance(steps, int) or not 1 <= steps <= 10**12:
            shown = show_node(entry.get("steps", Scalar("")), 40)
            problems.append(f"{where}.steps={shown}: expected a number of steps")
            continue
        names.add(name)
        problems += _refused_in_stage(where, entry, is_first=i == 0)
        state = _text(entry.get("start_from_state")) or "weights+moments"
        run = {"stage": Scalar(name, plain=False), "stage_begin": Scalar(str(begin))}
        if i:
            run["start_from_state"] = Scalar(state)
        schedule_end = (schedule_end if state == "everything" else 0) + steps
        position: dict[str, Node] = {"train": {"steps": Scalar(str(schedule_end))}, "run": {**run}}
        settings = {section: value for section, value in entry.items() if section not in _OWN}
        yield name, [settings, command_line, position]
        begin += steps


def _refused_on_command_line(command_line: dict[str, Node]) -> Iterator[str]:
    """Settings of the command line that follow from the stages."""
    if _sets(command_line, "train.steps"):
        yield "train.steps does not work with `stages:`, whose lengths are their `steps`; leave it out"
    for setting in ("run.stage", "run.stage_begin"):
        if _sets(command_line, setting):
            yield f"{setting} follows from `stages:`; leave it out"


def _refused_in_stage(where: str, entry: dict[str, Node], is_first: bool) -> Iterator[str]:
    """Settings of a stage that follow from its position."""
    known = "`name`, `steps` and `start_from_state`"
    for setting in _BY_POSITION:
        if _sets(entry, setting):
            yield f"{where} sets {setting}, which follows from {known} of the stages; leave it out"
    if is_first and "start_from_state" in entry:
        yield f"{where}.start_from_state: the first stage begins with `start_from` of the run; leave it out"


def stage_problems(configs: list[Config]) -> Iterator[str]:
    """What stages cannot change among each other."""
    first = configs[0] if configs else None
    for config in configs:
        assert first
        for key in WIDTHS:
            value, expected = getattr(config.model, key), getattr(first.model, key)
            if value != expected:
                yield (
                    f"stage {config.run.stage}: model.{key}={value}, but stage {first.run.stage} has {expected}; the "
                    "shapes of tensors cannot change"
                )
        for name in _OF_RUN:
            value, expected = (attrgetter(name)(one) for one in (config, first))
            if value != expected:
                yield (
                    f"stage {config.run.stage}: {name}={show(value)}, but stage {first.run.stage} has {show(expected)}"
                    "; it is a setting of the run: set it outside of `stages:`"
                )
    for before, config in pairwise(configs):
        if before.optim.name != config.optim.name and config.run.start_from_state != "weights":
            yield (
                f"stage {config.run.stage}: optim.name={config.optim.name} cannot take over the moments of "
                f"{before.optim.name}; set start_from_state: weights"
            )
    if first and len(configs) > 1 and first.run.start_from_state == "everything":
        yield "start_from_state=everything does not work with `stages:`; set it to weights or weights+moments"


def lines_by_stage(stages: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    """stages: (name, lines). A line that all of several stages have is yielded once, others with their stages' names;
    without `stages:` the name is empty."""
    names_by_line: dict[str, list[str]] = {}
    for name, lines in stages:
        for line in lines:
            names_by_line.setdefault(line, []).append(name)
    for line, names in names_by_line.items():
        is_common = len(names) == len(stages) > 1 or not any(names)
        yield line if is_common else f"stage {', '.join(names)}: {line}"


def stage_entries(stages: list[Config]) -> list[dict[str, Any]]:
    """The list `stages:` for these configs, beside the settings of the first one."""
    entries, schedule_end = [], 0
    first = asdict(stages[0])
    for i, stage in enumerate(stages):
        state = stage.run.start_from_state
        continues = i > 0 and state == "everything"
        entry: dict[str, Any] = {"name": stage.run.stage, "steps": stage.train.steps - schedule_end * continues}
        if i:
            entry["start_from_state"] = state
        schedule_end = stage.train.steps
        for section, settings in asdict(stage).items():
            changed = {
                key: as_lists(value)
                for key, value in settings.items()
                if value != first[section][key] and f"{section}.{key}" not in _BY_POSITION
            }
            if changed:
                entry[section] = changed
        entries.append(entry)
    return entries


def _sets(sections: dict[str, Node], setting: str) -> bool:
    section, _, key = setting.partition(".")
    entries = sections.get(section)
    return isinstance(entries, dict) and key in entries


def _text(node: Node | None) -> str:
    """The text of a scalar; empty if the node is another one, null or missing."""
    if not isinstance(node, Scalar) or (node.plain and node.text in NULLS):
        return ""
    return node.text
