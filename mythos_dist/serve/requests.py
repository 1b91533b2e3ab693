"""The bodies of requests: OpenAI's fields, and a few more for looped models.

A field is refused unless it has an effect or `IGNORED` names it: a client that believes in a penalty or a tool which
this server does not have would draw wrong conclusions from the text.

Decisions: SERVE-3.
"""

from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mythos_dist.config.schema import MAX_LOOPS
from mythos_dist.errors import first_line
from mythos_dist.serve.errors import ApiError, invalid

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000  # characters
MAX_LOGPROBS = 20
IGNORED = {  # no effect on the text, in OpenAI's API either
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "prediction"),
}
UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # field -> the values that mean "without it"
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}


def _stops(value: Any) -> Any:
    """One stop string, or a list of them."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("expected a string that is not empty, or a list of such strings")
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise ValueError(f"at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters")
    return stops


def _prompts(value: Any) -> Any:
    """A list of texts or of lists of token ids, from either or one of them."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_token, value))):
        return [value]
    if isinstance(value, list) and value and all(isinstance(one, str) or _is_prompt(one) for one in value):
        return value
    raise ValueError("expected a string, a list of strings, a list of token ids, or a list of such lists")


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_token, value))


def _content(value: Any) -> Any:
    """The text of a message: a string, or a list of parts of type text."""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in value):
            raise ValueError("only parts of type 'text' are supported")
        return "".join(part["text"] for part in value)
    return value


class _Body(BaseModel):
    """Types are exact: "1" is not a number, and 1.0 not a whole number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(_Body):
    """What a stream contains besides text."""

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against observers of encrypted streams; none is sent


class GenerationBody(_Body):
    """The fields of both endpoints."""

    model: str
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(1, ge=0, le=2)
    top_p: float = Field(1, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stop: Annotated[list[str], BeforeValidator(_stops)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    # Not OpenAI's:
    loops: int | None = Field(None, ge=1, le=MAX_LOOPS)
    exit: Literal["latent", "kl", "halting"] | None = None
    exit_threshold: float | None = Field(None, ge=0)
    top_k: int = Field(0, ge=0, le=1 << 30)
    min_p: float = Field(0, ge=0, le=1)
    repetition_penalty: float = Field(1, gt=0, le=100)


class CompletionBody(GenerationBody):
    """The body of /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)] = Field(default_factory=lambda: [""])
    max_tokens: int = Field(16, ge=0, le=1 << 30)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    best_of: int | None = None


class MessageBody(_Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]
    name: str = ""  # of the author; templates do not render it
    refusal: None = None  # in messages that come from a response


class ChatBody(GenerationBody):
    """The body of /v1/chat/completions."""

    messages: list[MessageBody] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=1 << 30)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 30)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)


BodyType = TypeVar("BodyType", bound=GenerationBody)


def parse_body(content: bytes, body: type[BodyType]) -> BodyType:
    """The request in the JSON text `content`. Raises ApiError with all its problems."""
    try:
        decoded = pydantic_core.from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON ({first_line(error)})") from None
    if not isinstance(decoded, dict):
        raise ApiError(f"the body is {_show(decoded)}; expected a JSON object")
    fields = {name: value for name, value in decoded.items() if value is not None and name not in IGNORED}
    problems = _take_unsupported(fields)
    parsed = None
    try:
        parsed = body.model_validate(fields)
    except ValidationError as error:
        problems += map(_problem, error.errors(include_url=False, include_context=False))
    if parsed is not None:
        problems += _contradictions(parsed)
    if problems or parsed is None:
        raise invalid(problems)
    return parsed


def _take_unsupported(fields: dict[str, Any]) -> list[tuple[str | None, str]]:
    """Remove the fields that have no effect here; the problems of those with a value that asks for one."""
    present = {name: fields.pop(name) for name in UNSUPPORTED if name in fields}
    return [
        (name, f"{name}={_show(value)} is not supported by this server; leave it out")
        for name, value in present.items()
        if value not in UNSUPPORTED[name]
    ]


def _contradictions(body: GenerationBody) -> list[tuple[str | None, str]]:
    """Between fields."""
    problems: list[tuple[str | None, str]] = []
    if body.exit is None and body.exit_threshold is not None:
        problems.append(("exit_threshold", "exit_threshold needs exit"))
    if isinstance(body, CompletionBody):
        if body.best_of not in (None, body.n):
            problems.append(("best_of", f"best_of={body.best_of} is not supported unless it equals n={body.n}"))
        if body.max_tokens == 0 and not body.echo:
            problems.append(("max_tokens", "max_tokens=0 needs echo=true; there would be no text"))
    if isinstance(body, ChatBody):
        if body.top_logprobs and not body.logprobs:
            problems.append(("top_logprobs", "top_logprobs needs logprobs=true"))
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            problems.append(("max_tokens", "max_tokens and max_completion_tokens differ; give one of them"))
    return problems


def _problem(error: Any) -> tuple[str, str]:
    """The field and the message of one of pydantic's errors."""
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return name, f"{name} is not a field of this request; leave it out"
    if error["type"] == "missing":
        return name, f"{name} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return name, f"{name}={_show(error['input'])}: {message[0].lower()}{message[1:]}"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
