"""`mythos generate`: a trained model continues texts, or answers messages."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from mythos_dist.errors import UserError
from mythos_dist.generate.chat import Chat
from mythos_dist.generate.engine import DecodingEngine, Request
from mythos_dist.generate.prompts import read_prompt, read_prompts
from mythos_dist.generate.sampling import Sampling, sampling_errors
from mythos_dist.generate.speculate import Speculation, speculate
from mythos_dist.generate.trained import Trained, load_trained
from mythos_dist.model.kv_cache import loops_per_entry

_OPTIONS = (
    "max_new_tokens", "n_loops", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "exit",
    "exit_threshold",
)  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Print the text, or the answers. Raises UserError."""
    prompt = None if arguments.prompt is None else read_prompt(arguments.prompt)
    prompts = [prompt or ""] if arguments.prompts is None else read_prompts(arguments.prompts)
    options = _sampling_options(arguments)
    trained = load_trained(arguments.run_dir, arguments.tokenizer, quiet=False)
    options["n_loops"] = options["n_loops"] or trained.n_loops
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # terminals without UTF-8
    if arguments.chat:
        renderer = trained.renderer(arguments.template)
        engine = DecodingEngine(trained.model, None, n_loops=trained.n_loops, max_batch=1, cache=arguments.cache)
        options |= {"system": arguments.system, "seed": arguments.seed}
        chat = Chat(engine, trained.tokenizer, renderer, **options)
        _talk(chat, prompt, trained.step)
        return
    stop_tokens = (trained.tokenizer.eos_id,)
    sampling = Sampling(**options, seed=arguments.seed, stop=tuple(arguments.stop), stop_tokens=stop_tokens)
    if arguments.draft_loops is not None:
        for text in prompts:
            result = speculate(
                trained.model.eval(), trained.tokenizer, _encode(trained, text), sampling, n_loops=trained.n_loops,
                draft_loops=arguments.draft_loops, draft_tokens=arguments.draft_tokens,
            )  # fmt: skip
            _print_speculation(text, result, arguments.json)
        return
    engine = DecodingEngine(
        trained.model, trained.tokenizer, n_loops=trained.n_loops, max_batch=arguments.batch, cache=arguments.cache
    )
    requests = [engine.submit(_encode(trained, text), sampling) for text in prompts]
    if arguments.json:
        for i in _finished_in_order(engine, requests):
            print(json.dumps(_as_json(prompts[i], requests[i])), flush=True)
    elif arguments.prompts is None:
        _print_stream(engine, requests[0], trained)
    else:
        for i in _finished_in_order(engine, requests):
            print(prompts[i] + requests[i].text, end="\n\n", flush=True)


def _sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of `Sampling`. Raises UserError for options that are out of range or do not fit together."""
    options = {name: getattr(arguments, name) for name in _OPTIONS}
    problems = sampling_errors(Sampling(**options, seed=arguments.seed, stop=tuple(arguments.stop)))
    problems = [f"--{_option_name(problem)}" for problem in problems]
    if arguments.batch < 1:
        problems.append(f"--batch={arguments.batch} must be at least 1")
    try:
        loops_per_entry(arguments.cache)
    except UserError as error:
        problems.append(f"--{error}")
    if arguments.draft_loops is not None:
        if options["temperature"] != 0:
            problems.append("--draft-loops needs --temperature 0")
        if arguments.chat or arguments.cache != "all":
            problems.append("--draft-loops goes with neither --chat nor --cache")
    given = [name for name in ("system", "template") if getattr(arguments, name) is not None]
    wrong = [name for name in ("prompts", "json", "stop") if getattr(arguments, name)] if arguments.chat else []
    problems += [f"--{name} needs --chat" for name in given if not arguments.chat]
    problems += [f"--{name} does not go with --chat" for name in wrong]
    if problems:
        raise UserError(problems)
    return options


def _option_name(problem: str) -> str:
    """A problem that begins with a field's name, with the name of the option."""
    name = next((name for name in sorted(_OPTIONS, key=len, reverse=True) if problem.startswith(name)), "")
    return name.replace("_", "-") + problem[len(name) :]


def _encode(trained: Trained, prompt: str) -> list[int]:
    ids = trained.tokenizer.encode(prompt).tolist()
    if not ids:
        raise UserError(f"the prompt {prompt!r} has no tokens in {trained.tokenizer.path}; give some text to continue")
    return ids


def _print_stream(engine: DecodingEngine, request: Request, trained: Trained) -> None:
    """Print the prompt, and its continuation as it comes."""
    print(f"[after {trained.step} steps] " + trained.tokenizer.decode(request.prompt), end="", flush=True)
    printed = 0
    while engine.step():
        print(request.text[printed:], end="", flush=True)
        printed = len(request.text)
    print()


def _finished_in_order(engine: DecodingEngine, requests: Sequence[Request]) -> Iterator[int]:
    """The index of each request, in order, as soon as it and those before it are finished."""
    for i, request in enumerate(requests):
        while request.finish_reason is None:
            engine.step()
        yield i


def _print_speculation(prompt: str, result: Speculation, as_json: bool) -> None:
    counts = {
        "drafted": result.drafted,
        "accepted": result.accepted,
        "loops_per_token": round(result.loops_per_token, 3),
    }
    if as_json:
        print(json.dumps(_as_json(prompt, result.request) | {"speculation": counts}), flush=True)
        return
    print(prompt + result.request.text, flush=True)
    print(
        f"(drafts accepted: {result.accepted} of {result.drafted}; {counts['loops_per_token']} loops per token)",
        file=sys.stderr,
    )


def _as_json(prompt: str, request: Request) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": request.text,
        "tokens": request.tokens,
        "finish_reason": request.finish_reason,
        "loops": request.loops,
    }


def _talk(chat: Chat, prompt: str | None, step: int) -> None:
    """Print the answer to `prompt`; without one, to each line of standard input."""
    if prompt is not None:
        _print_answer(chat, prompt)
        return
    if sys.stdin.isatty():
        print(f"after {step} steps; a line is a message, Ctrl-D ends", file=sys.stderr)
    forgotten = 0
    for message in _read_messages():
        try:
            _print_answer(chat, message)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if chat.forgotten > forgotten:
            forgotten = chat.forgotten
            print(f"(the context is full: turns forgotten so far: {forgotten})", file=sys.stderr, flush=True)


def _print_answer(chat: Chat, message: str) -> None:
    """Print an answer as it is made."""
    for piece in chat.stream(message):
        print(piece, end="", flush=True)
    print(flush=True)


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
