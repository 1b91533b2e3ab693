"""`tools/generate.py`: a trained model continues a text, or answers messages."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch

from mythos_dist.errors import UserError
from mythos_dist.generate.chat import Chat
from mythos_dist.generate.trained import Trained, load_trained
from mythos_dist.model.generate import sampling_errors


def run(arguments: argparse.Namespace) -> None:
    """Print the text, or the answers. Raises UserError."""
    prompt = None if arguments.prompt is None else _read_prompt(arguments.prompt)
    options = _sampling_options(arguments)
    trained = load_trained(arguments.run_dir, arguments.tokenizer)
    options["n_loops"] = options["n_loops"] or trained.n_loops
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # terminals without UTF-8
    if arguments.chat:
        renderer = trained.renderer(arguments.template)
        chat = Chat(trained.model, trained.tokenizer, renderer, system=arguments.system, **options)
        _talk(chat, prompt, trained.step)
    else:
        print(_continue_text(trained, prompt or "", options))


def _read_prompt(prompt: str) -> str:
    """The text to continue. Raises UserError if there is none."""
    try:
        text = sys.stdin.buffer.read().decode() if prompt == "-" else prompt
        text.encode()  # an argument that is not UTF-8 has surrogates
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise UserError(f"the prompt is not valid UTF-8 ({error.reason})") from None
    if not text:
        raise UserError("the prompt is empty; give some text to continue")
    return text


def _sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings of `Mythos.generate`. Raises UserError for options that are out of range."""
    names = ("max_new_tokens", "n_loops", "temperature", "top_k")
    options = {name: getattr(arguments, name) for name in names}
    problems = [f"--{problem.replace('_', '-', 2)}" for problem in sampling_errors(**options)]
    if not 0 <= arguments.seed < 1 << 63:
        problems.append(f"--seed={arguments.seed} must be from 0 to 2^63 - 1")
    if not arguments.chat:
        given = [name for name in ("system", "template") if getattr(arguments, name) is not None]
        problems += [f"--{name} needs --chat" for name in given]
        if arguments.prompt is None:
            problems.append("name a --prompt to continue, or talk with --chat")
    if problems:
        raise UserError(problems)
    return {**options, "generator": torch.Generator().manual_seed(arguments.seed)}


def _continue_text(trained: Trained, prompt: str, options: dict[str, Any]) -> str:
    """The prompt and its continuation."""
    tokenizer = trained.tokenizer
    ids = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))
    if not len(ids):
        raise UserError(f"the prompt {prompt!r} has no tokens in {tokenizer.path}; give some text to continue")
    tokens = trained.model.generate(ids.unsqueeze(0), stop_token=tokenizer.eos_id, **options)
    return f"[after {trained.step} steps] " + tokenizer.decode(tokens[0].tolist())


def _talk(chat: Chat, prompt: str | None, step: int) -> None:
    """Print the answer to `prompt`; without one, to each line of standard input."""
    if prompt is not None:
        print(chat.answer(prompt))
        return
    if sys.stdin.isatty():
        print(f"after {step} steps; a line is a message, Ctrl-D ends", file=sys.stderr)
    forgotten = 0
    for message in _read_messages():
        try:
            print(chat.answer(message), flush=True)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if chat.forgotten > forgotten:
            forgotten = chat.forgotten
            print(f"(the context is full: turns forgotten so far: {forgotten})", file=sys.stderr, flush=True)


def _read_messages() -> Iterator[str]:
    """The lines of standard input that are not blank."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not valid UTF-8 ({error.reason})") from None
        if line.strip():
            yield line
