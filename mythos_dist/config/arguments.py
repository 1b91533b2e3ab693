"""Command lines: options and `section.key=value` in any order, `~/` in paths, numbers with bounds."""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mythos_dist.errors import redact
from mythos_dist.urls import AnyPath, any_path, is_url

# Help texts of arguments of type `location`.
CHECKPOINT_HELP = "a run.dir (its newest checkpoint), the folder of one checkpoint, or a URL"
WEIGHTS_HELP = "a run.dir (its newest checkpoint), a checkpoint or an export; or a URL"
_SETTING = r"[a-z]+\.\w+|start_from(?:_state)?"
_OVERRIDE = re.compile(rf"(?:{_SETTING})\s*=")
_AS_OPTION = re.compile(rf"--?({_SETTING}|[a-z][\w-]*)(?:=(.*))?")


def add_config(parser: argparse.ArgumentParser, what: str, optional: bool = False) -> None:
    """Add the arguments `config`, whose help text is `what`, and `overrides`."""
    parser.add_argument("config", nargs="?" if optional else None, metavar="CONFIG.yaml", help=what)
    add_overrides(parser, "settings that override those of the file")


def add_overrides(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the argument `overrides`; `what`: its help text."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=what)


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a tool that writes an export: its folder, and the type of its weights."""
    parser.add_argument("--out", type=nonempty_path, required=True, help="a new folder")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="(%(default)s)")


def add_tokenizer_option(parser: argparse.ArgumentParser, use: str = "") -> None:
    """Add the option of a tool that reads a trained model and text. use: what needs it, if not all of the tool does."""
    of_use = f" for {use}" if use else ""
    text = f"tokenizer file{of_use}, if neither export nor training shards have one"
    parser.add_argument("--tokenizer", type=Path, help=text)


def add_json_option(parser: argparse.ArgumentParser, what: str = "print everything as JSON") -> None:
    """Add `--json` to a tool that has no `--quiet`."""
    parser.add_argument("--json", action="store_true", help=what)


def add_write_options(parser: argparse.ArgumentParser, workers: int) -> None:
    """Add the options of a tool that reads checkpoints and writes files. workers: the default."""
    add = parser.add_argument
    add("--workers", type=integer(1, 1024), default=workers, help="files written at once (%(default)s)")
    add("--no-verify", action="store_true", help="do not check for damage first (ignored with a signing key)")
    add_print_options(parser)


def add_print_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `print_result`."""
    parser.add_argument("--quiet", action="store_true", help="print only errors")
    parser.add_argument("--json", action="store_true", help="print the result as a line of JSON on standard output")


def print_result(arguments: argparse.Namespace, text: str, notes: Sequence[str], **values: Any) -> None:
    """Print a tool's result: `text`, or with --json `values` and the notes. Notes are also lines of standard error."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({**values, "notes": list(notes)}, default=str))
    elif not arguments.quiet:
        print(text)


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line with positional arguments and options in any order.

    A setting given before the config is an override. Exits with code 2 as argparse does.
    """
    if sys.argv[0].startswith("mythos "):  # commands/main.py runs it
        parser.prog = sys.argv[0]
    parsed, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        hints = _as_settings(unknown) if hasattr(parsed, "overrides") else []
        advice = f"; write {' '.join(hints)}" if hints else ""
        if "--config" in unknown and hasattr(parsed, "config"):
            advice += "; write the file's name alone, without --config"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{advice}")
    if hasattr(parsed, "config") and hasattr(parsed, "overrides"):
        _order(parser, parsed)
    for name, value in vars(parsed).items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path) and (url := _url_as_path(path)):
                parser.error(f"{url} is a URL, but a local path is needed here; copy it, or name a local path")
        setattr(parsed, name, [_home(one) for one in value] if isinstance(value, list) else _home(value))
    return parsed


def integer(least: int, most: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"[-+]?[0-9]{1,40}", text.strip()):
            raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected a whole number")
        return _within(int(text), least, most)

    return convert


def number(least: float, most: float, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number from `least` (`above`: excluding it) to `most`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected a number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text[:40]}: expected a finite number")
        if above and value == least:
            raise argparse.ArgumentTypeError(f"{text[:40]} must be above {least:g}")
        return _within(value, least, most)

    return convert


def _within(value: Any, least: float, most: float) -> Any:
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} must be at least {least:,}")
    if value > most:
        raise argparse.ArgumentTypeError(f"{value} must be at most {most:,}")
    return value


def _as_settings(unknown: Sequence[str]) -> list[str]:
    """How options that are settings are written: `--steps 5` and `--train.steps=5` are train.steps=5."""
    from mythos_dist.config.load import settings_named

    hints = []
    for word, following in zip(unknown, [*unknown[1:], "--"], strict=True):
        if not (match := _AS_OPTION.fullmatch(word)):
            continue
        names = [match[1]] if re.fullmatch(_SETTING, match[1]) else settings_named(match[1].replace("-", "_"))
        value = match[2] if match[2] is not None else "VALUE" if following.startswith("-") else following
        hints += [" or ".join(f"{name}={value}" for name in names)] if names else []
    return hints


def _order(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    """The positional argument that is not a setting is the config."""
    required = any(action.dest == "config" and action.nargs is None for action in parser._actions)
    config = str(parsed.config) if parsed.config is not None else ""
    if not _OVERRIDE.match(config) or os.path.exists(config):
        return
    others = [word for word in parsed.overrides if not _OVERRIDE.match(word)]
    if not others and required:
        parser.error(f"the following arguments are required: CONFIG.yaml; {config} is a setting")
    named = others[0] if others else None
    kind = next(action.type for action in parser._actions if action.dest == "config")
    parsed.overrides = [config, *(word for word in parsed.overrides if word is not named)]
    parsed.config = Path(named) if named is not None and kind is Path else named


def _url_as_path(path: Path) -> str:
    """The URL that was given for `path`: Path("s3://bucket/x") is s3:/bucket/x, in a folder called `s3:`."""
    url = str(path).replace(":/", "://", 1)
    return redact(url) if is_url(url) and not os.path.exists(path.parts[0]) else ""


def _home(path: Any) -> Any:
    """Expand `~/x` and `~user/x`, which a shell does not in `--out=~/x`."""
    return Path(os.path.expanduser(path)) if isinstance(path, Path) and str(path).startswith("~") else path


def nonempty_path(text: str) -> Path:
    """An argparse type for a folder. An empty text is refused: it comes from an unset shell variable, and would mean
    the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a folder")
    return Path(text)


def location(text: str) -> AnyPath:
    """An argparse type for a run, a checkpoint or an export: a folder, or its URL in a store. Not empty, as
    `nonempty_path`."""
    return any_path(text) if is_url(text) else nonempty_path(text)


def path_text(text: str) -> str:
    """An argparse type for a path, a pattern or a URL: a leading `~/` is expanded."""
    return os.path.expanduser(text) if text.startswith("~") else text
