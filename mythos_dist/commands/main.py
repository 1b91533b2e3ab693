"""`mythos COMMAND ...`: finds the command, imports its module alone, and runs it.

A command line is handed to the command's own parser unchanged, so that `mythos plan` and `tools/plan.py` do the same.

Decisions: PROJECT-6.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

from mythos_dist import __version__
from mythos_dist.commands import COMMANDS, GROUPS, Command
from mythos_dist.commands.completion import complete_words
from mythos_dist.errors import EXIT_USER_ERROR, run_command

_EPILOG = "`mythos COMMAND --help` describes a command."


def main() -> None:
    """Run the command that sys.argv names; exits with code 2 if there is none of that name."""
    complete_words(COMMANDS)
    words = sys.argv[1:]
    if words[:1] == ["help"]:  # `mythos help train` is `mythos train --help`
        words = [*words[1:], "--help"]
    command = find_command(words)
    if command is None:
        _explain(words)
        return
    length = len(command.name.split())
    sys.argv = [f"mythos {command.name}", *words[length:]]
    run_command(lambda: importlib.import_module(command.module).main(), is_tool=command.is_tool)


def find_command(words: Sequence[str]) -> Command | None:
    """The command that the words begin with."""
    by_name = {command.name: command for command in COMMANDS}
    return by_name.get(" ".join(words[:2])) or by_name.get(" ".join(words[:1]))


def build_parser() -> argparse.ArgumentParser:
    """The parser of `mythos` itself."""
    parser = argparse.ArgumentParser(
        prog="mythos",
        usage="mythos COMMAND ...",
        description="Train the OpenMythos Recurrent-Depth Transformer, from a laptop to a cluster.",
        epilog="\n".join([*_command_list(), _EPILOG]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mythos_dist {__version__}")
    return parser


def _command_list(first_word: str = "") -> list[str]:
    """A line per command, by group; with a first word, those that begin with it."""
    width = max(len(command.name) for command in COMMANDS)
    lines = []
    for group in GROUPS:
        commands = [command for command in COMMANDS if command.group == group]
        commands = [command for command in commands if not first_word or command.name.split()[0] == first_word]
        if commands:
            lines += [f"{group}:", *(f"  {command.name:<{width}}  {command.help}" for command in commands), ""]
    return lines


def _explain(words: Sequence[str]) -> None:
    """Help, the version, or why there is no such command."""
    parser = build_parser()
    if not words:
        parser.print_help(sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    first = words[0]
    if first.startswith("-"):
        parser.parse_args(words[:1])
    of_first = _command_list(first)
    if of_first and (len(words) == 1 or words[1].startswith("-")):
        is_help = words[1:] in (["--help"], ["-h"])
        print(
            "\n".join([f"usage: mythos {first} KIND ...", "", *of_first, _EPILOG]), file=None if is_help else sys.stderr
        )
        sys.exit(0 if is_help else EXIT_USER_ERROR)
    typed = " ".join(words[:2]) if of_first else first
    names = [command.name for command in COMMANDS]
    close = difflib.get_close_matches(typed, [*names, *_OTHER_NAMES], n=1, cutoff=0.5)
    meant = f"did you mean mythos {_OTHER_NAMES.get(close[0], close[0])}?" if close else "mythos --help lists them"
    parser.exit(EXIT_USER_ERROR, f"error: mythos has no command {typed[:80]!r}; {meant}\n")


# Names of files in tools/, and what other programs call it.
_OTHER_NAMES = {
    **{command.module.rpartition(".")[2]: command.name for command in COMMANDS if command.name != "train"},
    "convert": "shards",
    "chat": "generate",
    "resume": "train",
    "sweep": "depth-sweep",
    "launch": "submit",
}
