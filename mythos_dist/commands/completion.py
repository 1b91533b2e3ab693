"""Print the shell code that completes commands, options, settings and names of configs on Tab.

eval "$(mythos completion bash)"      # in ~/.bashrc
eval "$(mythos completion zsh)"       # in ~/.zshrc, after compinit
mythos completion fish | source       # in ~/.config/fish/config.fish
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mythos_dist.commands import Command
from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import run_command
from mythos_dist.packaged import CONFIGS


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def main() -> None:
    """Print the code."""
    arguments = parse_arguments(build_parser())
    print(_argcomplete().shellcode(["mythos"], shell=arguments.shell))


def _argcomplete(module: str = "") -> Any:
    return importlib.import_module(f"argcomplete{module}")  # only when a shell asks (PROJECT-7)


def complete_words(commands: Sequence[Command]) -> None:
    """If the shell asks for completions, print them and exit; else do nothing. Imports the parser of one command."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", "0"))]
    typed = line.split()[1:]
    if not line.endswith(" "):
        typed = typed[:-1]  # the word that is being typed
    parser = argparse.ArgumentParser(prog="mythos")
    _add_commands(parser, commands, typed)
    _argcomplete().autocomplete(parser, always_complete_options=False)
    sys.exit(0)


def _add_commands(parser: argparse.ArgumentParser, commands: Sequence[Command], typed: list[str]) -> None:
    """Add commands as subparsers, and to the one that was typed its own arguments."""
    subparsers = parser.add_subparsers()
    kinds: dict[str, list[Command]] = {}
    for command in commands:
        kinds.setdefault(command.name.split()[0], []).append(command)
    for first, group in kinds.items():
        chosen = typed[:1] == [first]
        if len(group[0].name.split()) == 2:
            words = [command._replace(name=command.name.split()[1]) for command in group]
            below = subparsers.add_parser(first)
            if chosen:
                _add_commands(below, words, typed[1:])
        elif chosen:
            own = group[0].load_parser()
            subparsers.add_parser(first, parents=[own], add_help=False)
            _add_completers(own)
        else:
            subparsers.add_parser(first, help=group[0].help)


def _add_completers(parser: argparse.ArgumentParser) -> None:
    """Names of packaged configs and clusters, and of settings, besides files."""
    yaml_files = _argcomplete(".completers").FilesCompleter(("yaml", "yml"))

    def files_and_names(folder: Path) -> Any:
        def complete_file(prefix: str, **rest: Any) -> list[str]:
            names = (str(path.relative_to(folder).with_suffix("")) for path in sorted(folder.rglob("*.yaml")))
            return [*(name for name in names if name.startswith(prefix)), *yaml_files(prefix, **rest)]

        return complete_file

    def complete_setting(prefix: str, **rest: Any) -> list[str]:
        from mythos_dist.config.fields import kinds_of
        from mythos_dist.config.load import SECTIONS

        names = (f"{section}.{key}=" for section, cls in SECTIONS.items() for key in kinds_of(cls))
        return [name for name in names if name.startswith(prefix)]

    completers = {"config": files_and_names(CONFIGS), "cluster": files_and_names(CONFIGS / "clusters")}
    completers["overrides"] = complete_setting
    for action in parser._actions:
        if action.dest in completers:
            action.completer = completers[action.dest]  # type: ignore[attr-defined]


if __name__ == "__main__":
    run_command(main)
