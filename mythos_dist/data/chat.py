"""Conversations as text: which of it is in the loss, and what a model continues; for training and generation alike.

A conversation is rendered by a chat template, a Jinja program that Hugging Face's tokenizers carry. What an assistant
says, up to and including the special token that ends its turn, is in the loss. To find it, the conversation is rendered
once up to each assistant message with the prompt for it ("generation prompt") and once including the message: the
difference is the completion.

The trap: some templates render earlier messages differently once later ones follow (they remove reasoning). Such a
conversation is not a sequence that a model generates, so it is refused. The pieces of text are encoded one by one:
when a model generates, its prompt is encoded alone, too.

Decisions: DATA-18, DATA-19.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np

from mythos_dist.data.manifest import ChatTemplate
from mythos_dist.data.tokenizer import Tokenizer, any_of
from mythos_dist.errors import UserError, first_line

ROLES = ("system", "user", "assistant")
_PROBE = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
Message = Mapping[str, str]  # "role" and "content"


class TextSpan(NamedTuple):
    """Text of a rendered conversation; its tokens are in the loss or not."""

    text: str
    in_loss: bool


def messages_of(record: Any) -> list[dict[str, str]]:
    """The messages of a record with `messages`, or with `prompt` and `completion`, up to the last assistant message.

    Raises ValueError with the problem.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a conversation is an object with 'messages', not {type(record).__name__}")
    if "messages" in record:
        messages = [_message(i, one) for i, one in enumerate(_list(record["messages"]), 1)]
    elif "prompt" in record and "completion" in record:
        roles = {"prompt": "user", "completion": "assistant"}
        messages = [{"role": role, "content": _text(repr(key), record[key])} for key, role in roles.items()]
    else:
        keys = ", ".join(map(str, record)) or "nothing"
        raise ValueError(f"no key 'messages', nor 'prompt' and 'completion'; there is: {keys:.200}")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise ValueError("no assistant message: there would be nothing to learn")
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"message {number}, of the assistant, is empty: there would be nothing to learn")
    return messages


def _list(messages: Any) -> list[Any]:
    if not isinstance(messages, list):
        raise ValueError(f"'messages' holds {type(messages).__name__}, not a list")
    return messages


def _message(number: int, message: Any) -> dict[str, str]:
    where = f"message {number}"
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise ValueError(f"{where} is not an object with 'role' and 'content'")
    if message["role"] not in ROLES:
        raise ValueError(f"{where} has the role {message['role']!r:.40}; supported are {', '.join(ROLES)}")
    return {"role": message["role"], "content": _text(f"'content' of {where}", message["content"])}


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} holds {type(value).__name__}, not text")
    return value


@dataclass(frozen=True)
class ChatRenderer:
    """A template with the special tokens of the tokenizer that encodes its renderings."""

    template: ChatTemplate
    special_tokens: tuple[str, ...]

    def check(self) -> None:
        """Render a probe. Raises UserError if the template cannot be used."""
        try:
            self.pieces(_PROBE)
        except ValueError as error:
            raise UserError(f"the chat template cannot be used: {error}; pass another one with --template") from None

    def pieces(self, messages: Sequence[Message]) -> list[TextSpan]:
        """A conversation up to its last assistant message: prompts and completions, in turn.

        Raises ValueError with the problem: of the messages, or of the template for them.
        """
        self._check_contents(messages)
        pieces: list[TextSpan] = []
        text, answered = "", 0  # of `pieces`, and its number of messages
        for number, message in enumerate(messages, 1):
            if message["role"] == "assistant":
                prompt = self._render(messages[: number - 1], add_generation_prompt=True)
                rendered = _after(prompt, self._render(messages[:number]), number)
                completion = self._until_end_of_turn(rendered, message["content"])
                pieces += [TextSpan(_after(text, prompt, answered + 1), False), TextSpan(completion, True)]
                text, answered = prompt + completion, number
        return pieces

    def prompt(self, messages: Sequence[Message]) -> list[TextSpan]:
        """What a model continues to answer the last of `messages`, in the pieces that it was trained on. ValueError."""
        self._check_contents(messages)
        answered = max((number for number, one in enumerate(messages, 1) if one["role"] == "assistant"), default=0)
        pieces = self.pieces(messages[:answered])
        text = "".join(piece.text for piece in pieces)
        rest = _after(text, self._render(messages, add_generation_prompt=True), answered + 1)
        return [*pieces, TextSpan(rest, False)]

    def end_of_turn(self) -> str:
        """The special token that ends an assistant's turn."""
        answer = self.pieces(_PROBE)[1].text
        return max((token for token in self.special_tokens if answer.endswith(token)), key=len)

    def _check_contents(self, messages: Sequence[Message]) -> None:
        """Text that reads as a special token would end a turn, or begin another role's."""
        for number, message in enumerate(messages, 1):
            if match := any_of(self.special_tokens).search(message["content"]):
                raise ValueError(f"message {number} contains the text of the special token {match[0]}; remove it there")

    def _until_end_of_turn(self, rendered: str, content: str) -> str:
        """The beginning of a rendered message, up to the special token after its content."""
        parts = re.split(f"({any_of(self.special_tokens).pattern})", rendered)  # text, special token, text, …
        if len(parts) == 1:
            raise ValueError(
                "the template puts no special token of the tokenizer after an assistant message, so a model would not "
                "learn to stop"
            )
        # The last text with the content: a template may strip it, or put the role and other special tokens before it.
        having = [i for i in range(0, len(parts) - 1, 2) if content.strip() and content.strip() in parts[i]]
        end = having[-1] if having else 0
        return "".join(parts[: end + 2])

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            return _compiled(self.template.text)(
                **self.template.tokens,
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(f"the template refuses it ({first_line(error)})") from None


def encode(tokenizer: Tokenizer, pieces: Sequence[TextSpan]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, int32 (n,), and which of them are in the loss, bool (n,)."""
    ids = [tokenizer.encode_rendered(piece.text, continues=i > 0) for i, piece in enumerate(pieces)]
    in_loss = np.repeat([piece.in_loss for piece in pieces], [len(one) for one in ids])
    return np.concatenate([np.empty(0, np.int32), *ids]), in_loss.astype(bool)


def _after(before: str, text: str, number: int) -> str:
    """The part of `text` after `before`, which ends where message `number` begins (from 1). ValueError if `text` begins
    differently."""
    if not text.startswith(before):
        raise ValueError(
            f"the template renders what precedes message {number} differently once that follows, so a model would "
            "not generate the conversation as it is; divide it into several, or use another template"
        )
    return text[len(before) :]


@functools.cache
def _compiled(template: str) -> Callable[..., str]:
    """The `render` of a template, in the environment that transformers uses: a template is a program of its author, so
    it is sandboxed. Without `strftime_now`: shards would depend on the day."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template).render


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, with which transformers finds completions, has no effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
