"""Errors of the API: a status code, and OpenAI's error object as the body."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse


class ApiError(Exception):
    """An error that is the client's to read. `param`: the field of the request that it is about."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body: dict[str, Any] = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body, self.status, self.headers)


def invalid(problems: Sequence[tuple[str | None, str]]) -> ApiError:
    """Status 400 for (field, problem) pairs, all of them in one message."""
    return ApiError("; ".join(problem for _, problem in problems), param=problems[0][0])


def model_not_found(name: str) -> ApiError:
    """Status 404: this server has one model."""
    message = f"the model {name[:200]!r} does not exist; GET /v1/models lists the name"
    return ApiError(message, status=404, param="model", code="model_not_found")


def context_exceeded(prompt: int, new: int, max_seq_len: int, param: str) -> ApiError:
    """Status 400: a prompt of `prompt` tokens and `new` more do not fit into `max_seq_len`."""
    message = (
        f"the context of this model is {max_seq_len} tokens, but the request needs {prompt + new} ({prompt} in the "
        f"prompt and {new} to generate); shorten the prompt or ask for fewer tokens"
    )
    return ApiError(message, param=param, code="context_length_exceeded")


def too_many_requests(most: int) -> ApiError:
    """Status 429: `most` sequences are in progress."""
    message = f"the server is at its limit of {most} sequences; try again later"
    return ApiError(
        message, status=429, type="rate_limit_error", code="rate_limit_exceeded", headers={"retry-after": "1"}
    )


def server_error(message: str, status: int = 500) -> ApiError:
    """A failure that is not the client's."""
    return ApiError(message, status=status, type="server_error")
