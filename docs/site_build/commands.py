"""The reference of all commands: what each prints with --help.

Rule: commands of `mythos` have a parser to ask, which imports no torch; studies in tools/ are run with --help in this
process.
"""

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

from mythos_dist.commands import COMMANDS, GROUPS, Command

REPOSITORY = Path(__file__).parents[2]
WIDTH = "100"  # columns


def help_of(command: Command) -> str:
    """What `mythos COMMAND --help` prints."""
    with patch.dict(os.environ, COLUMNS=WIDTH):
        return command.load_parser().format_help()


def studies() -> list[Path]:
    """The files of tools/ that are not other names of commands: studies that docs/ quotes."""
    modules = {command.module.rpartition(".")[2] for command in COMMANDS}
    return [path for path in sorted((REPOSITORY / "tools").glob("*.py")) if path.stem not in modules]


def help_of_file(path: Path) -> str:
    """What `python tools/NAME.py --help` prints."""
    printed = io.StringIO()
    arguments = patch.object(sys, "argv", [str(path), "--help"])
    with arguments, patch.dict(os.environ, COLUMNS=WIDTH), contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as exited:
            if exited.code:
                raise RuntimeError(f"{path.name} --help ended with exit code {exited.code}") from None
    return printed.getvalue()


def page() -> str:
    """The reference as a Markdown page."""
    parts = [
        "# Commands\n",
        "What each command prints with `--help`. `pip install` puts `mythos` into the environment; from the project "
        "folder `python -m mythos_dist` is the same, and `python tools/NAME.py` is another name of most commands. An "
        "error of the user ends a command with [exit code 2](../files.md#exit-codes) and a message.\n",
    ]
    for group in GROUPS:
        parts.append(f"## {group.capitalize()}\n")
        for command in COMMANDS:
            if command.group == group:
                parts += [f"### mythos {command.name}\n", _paragraph(command.help), _block(help_of(command))]
    parts.append("## Studies\n")
    parts += [f"### python tools/{path.name}\n\n{_block(help_of_file(path))}" for path in studies()]
    return "\n".join(parts)


def _paragraph(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}.\n"


def _block(text: str) -> str:
    return f"```text\n{text.replace(str(REPOSITORY) + '/', '')}```\n"
