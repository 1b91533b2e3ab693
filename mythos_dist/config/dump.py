"""A `Config` as YAML that `load.py` reads back to an equal one."""

import dataclasses
from typing import Any

import yaml

from mythos_dist.config.fields import as_lists, kinds_of
from mythos_dist.config.load import SECTIONS
from mythos_dist.config.schema import Config
from mythos_dist.config.stages import stage_entries


class _Dumper(yaml.SafeDumper):
    """Quotes texts that a YAML 1.1 or 1.2 reader might read as another type."""


def _quoted_where_unsure(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = text.replace("/", "").replace("_", "").replace("-", "").replace(".", "")
    unsure = not plain.isascii() or not plain.isalnum() or not plain[0].isalpha() or text.lower() in _WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if unsure else None)


_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n", "inf", "nan"}
_Dumper.add_representer(str, _quoted_where_unsure)


def dump_config(config: Config) -> str:
    """The config as YAML with every setting; `load_config` reads it back to an equal Config, whose dump is the same."""
    sections = dataclasses.asdict(config)
    for section, cls in SECTIONS.items():
        for key, kind in kinds_of(cls).items():
            if kind.type is float and sections[section][key] is not None:
                sections[section][key] = float(sections[section][key])  # a default may be an int
    return dump_settings(sections)


def dump_stages(stages: list[Config]) -> str:
    """YAML that `load_stages` reads back to equal Configs."""
    first = dump_config(stages[0])
    if not stages[0].run.stage:
        return first
    return first + yaml.dump({"stages": stage_entries(stages)}, Dumper=_Dumper, sort_keys=False)


def dump_settings(sections: dict[str, dict[str, Any]]) -> str:
    """Settings by section as YAML that `load_config` reads back."""
    plain = {
        section: {key: as_lists(value) for key, value in settings.items()} for section, settings in sections.items()
    }
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False)
