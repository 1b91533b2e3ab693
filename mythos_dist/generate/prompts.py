"""Prompts of `mythos generate`: from an argument, standard input, or a file with one in each line."""

import json
import sys
from pathlib import Path
from typing import Any

from mythos_dist.errors import UserError


def read_prompt(prompt: str) -> str:
    """`prompt`, or standard input for "-". Raises UserError if it is empty or not UTF-8."""
    try:
        text = sys.stdin.buffer.read().decode() if prompt == "-" else prompt
        text.encode()  # an argument that is not UTF-8 has surrogates
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise UserError(f"the prompt is not valid UTF-8 ({error.reason})") from None
    if not text:
        raise UserError("the prompt is empty; give some text to continue")
    return text


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank; of a .jsonl file the texts, or the "prompt" of objects. Raises UserError
    with all lines that cannot be used."""
    try:
        lines = path.read_bytes().decode().splitlines()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", str(path)) from None
    except UnicodeDecodeError as error:
        raise UserError(f"not valid UTF-8 ({error.reason})", str(path)) from None
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if path.suffix != ".jsonl":
        prompts, problems = [line for _, line in numbered], []
    else:
        read = [(i, _prompt_of(line)) for i, line in numbered]
        prompts = [prompt for _, prompt in read if prompt]
        problems = [
            f'line {i} is neither a JSON text nor an object with a "prompt"' for i, prompt in read if not prompt
        ]
    if not problems and not prompts:
        problems = ["no prompts; write one in each line"]
    if problems:
        raise UserError(problems, str(path))
    return prompts


def _prompt_of(line: str) -> str | None:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        value = value.get("prompt")
    try:
        return value if isinstance(value, str) and value.encode() else None
    except UnicodeEncodeError:  # half of a surrogate pair
        return None
