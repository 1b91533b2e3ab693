"""Continue a text with a trained model, or talk with one that was tuned on conversations.

python tools/generate.py RUN_DIR --prompt "..."
python tools/generate.py RUN_DIR --chat                   # each line of input is a message; Ctrl-D ends
python tools/generate.py RUN_DIR --chat --prompt "..."    # one message
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import UserError, run_command

if TYPE_CHECKING:
    from mythos_dist.data.manifest import ShardManifest
    from mythos_dist.data.tokenizer import Tokenizer
    from mythos_dist.model.mythos import Mythos


def main() -> None:
    """Parse the command line, load the run's newest checkpoint on one process and print the generated text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run_dir", type=Path, help="a run.dir (its newest checkpoint), a checkpoint or an export")
    add("--prompt", help="text to continue, or with --chat a message; - reads it from standard input")
    add("--chat", action="store_true", help="answer messages; without --prompt, one per line of input")
    add("--system", help="with --chat: the system message")
    add("--template", help="with --chat: a Jinja file, or plain; default: the template of the training shards")
    add("--max-new-tokens", type=int, default=100, help="(%(default)s)")
    add("--n-loops", type=int, help="loops of the recurrent block; default: as in training")
    add("--temperature", type=float, default=0.8, help="0: greedy decoding (%(default)s)")
    add("--top-k", type=int, default=50, help="0: sample from all tokens (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--tokenizer", type=Path, help="tokenizer file, if the training shards are not available")
    arguments = parse_arguments(parser)
    if arguments.prompt is None and not arguments.chat:
        parser.error("the following arguments are required: --prompt (or --chat)")
    prompt = None if arguments.prompt is None else read_prompt(arguments.prompt)
    options = sampling_options(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # terminals without UTF-8
    trained = load(arguments)
    if arguments.chat:
        talk(trained, prompt, arguments, options)
    else:
        print(continue_text(trained, prompt or "", options))


def read_prompt(prompt: str) -> str:
    """The text to continue. Raises UserError if there is none."""
    try:
        text = sys.stdin.buffer.read().decode() if prompt == "-" else prompt
        text.encode()  # an argument that is not UTF-8 has surrogates
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise UserError(f"the prompt is not valid UTF-8 ({error.reason})") from None
    if not text:
        raise UserError("the prompt is empty; give some text to continue")
    return text


def sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings of `Mythos.generate`. Raises UserError for options that are out of range."""
    import torch

    from mythos_dist.model.generate import sampling_errors

    names = ("max_new_tokens", "n_loops", "temperature", "top_k")
    options = {name: getattr(arguments, name) for name in names}
    problems = [f"--{problem.replace('_', '-', 2)}" for problem in sampling_errors(**options)]
    if not 0 <= arguments.seed < 1 << 63:
        problems.append(f"--seed={arguments.seed} must be from 0 to 2^63 - 1")
    if not arguments.chat:
        given = [name for name in ("system", "template") if getattr(arguments, name) is not None]
        problems += [f"--{name} needs --chat" for name in given]
    if problems:
        raise UserError(problems)
    return {**options, "generator": torch.Generator().manual_seed(arguments.seed)}


class Trained(NamedTuple):
    """A trained model and what is needed to use it."""

    model: "Mythos"
    n_loops: int  # of training, on average
    step: int
    tokenizer: "Tokenizer"
    shards: "ShardManifest | None"  # of training; None with --tokenizer


def load(arguments: argparse.Namespace) -> Trained:
    """The model and its tokenizer. Raises UserError."""
    from mythos_dist.checkpoint.restore import load_model
    from mythos_dist.data.manifest import read_shard_manifest
    from mythos_dist.data.tokenizer import Tokenizer

    model, config, step = load_model(arguments.run_dir)
    shards = Path(next(iter(config.data.folders)))  # all folders of a mix share one tokenizer
    if arguments.tokenizer:
        tokenizer, manifest = Tokenizer.load(arguments.tokenizer), None
    else:
        try:
            manifest = read_shard_manifest(shards)
        except UserError as error:
            raise UserError(f"no tokenizer ({error}); name its file with --tokenizer", str(arguments.run_dir)) from None
        tokenizer = Tokenizer.load(config.data.tokenizer or shards / manifest.tokenizer, manifest.eos)
    return Trained(model, config.loops.mean_of(config.model), step, tokenizer, manifest)


def continue_text(trained: Trained, prompt: str, options: dict[str, Any]) -> str:
    """The prompt and its continuation."""
    import torch

    tokenizer = trained.tokenizer
    ids = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))
    if not len(ids):
        raise UserError(f"the prompt {prompt!r} has no tokens in {tokenizer.path}; give some text to continue")
    options = {**options, "n_loops": options["n_loops"] or trained.n_loops}
    tokens = trained.model.generate(ids.unsqueeze(0), stop_token=tokenizer.eos_id, **options)
    return f"[after {trained.step} steps] " + tokenizer.decode(tokens[0].tolist())


def talk(trained: Trained, prompt: str | None, arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Print the answer to `prompt`; without one, to each line of standard input."""
    from mythos_dist.data.chat import ChatRenderer
    from mythos_dist.data.chat_template import find_renderer
    from mythos_dist.generate.chat import Chat

    tokenizer, shards = trained.tokenizer, trained.shards
    if shards and shards.chat and arguments.template is None:
        renderer = ChatRenderer(shards.chat, tuple(tokenizer.special_tokens))
    else:
        renderer = find_renderer(tokenizer, arguments.template)
    options = {**options, "n_loops": options["n_loops"] or trained.n_loops}
    chat = Chat(trained.model, tokenizer, renderer, system=arguments.system, **options)
    if prompt is not None:
        print(chat.answer(prompt))
        return
    if sys.stdin.isatty():
        print(f"after {trained.step} steps; a line is a message, Ctrl-D ends", file=sys.stderr)
    forgotten = 0
    for message in read_messages():
        try:
            print(chat.answer(message), flush=True)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if chat.forgotten > forgotten:
            forgotten = chat.forgotten
            print(f"(the context is full: turns forgotten so far: {forgotten})", file=sys.stderr, flush=True)


def read_messages() -> Iterator[str]:
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


if __name__ == "__main__":
    run_command(main)
