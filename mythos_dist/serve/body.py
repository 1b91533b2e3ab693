"""Reading a request's body within its limits, and noticing that its client is gone.

Decisions: SERVE-4.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from mythos_dist.serve.errors import ApiError
from mythos_dist.serve.requests import BodyType, parse_body
from mythos_dist.serve.service import Limits

Result = TypeVar("Result")


class ClientGone(Exception):
    """The connection was closed before the response was complete."""


async def read_body(request: Request, limits: Limits, body: type[BodyType]) -> BodyType:
    """The request's body. Raises ApiError if it is too large, too slow, of another type, or not valid."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also a defence: a page in a browser cannot send this type to another host without that host's permission.
        raise ApiError(f"the content type is {kind[:80]!r}; send application/json")
    try:
        content = await asyncio.wait_for(_read(request, limits.body_bytes), limits.body_seconds)
    except asyncio.TimeoutError:
        raise ApiError(
            f"the body did not arrive within {limits.body_seconds:g} s",
            status=408,
            code="request_timeout",
            headers={"connection": "close"},
        ) from None
    return parse_body(content, body)


async def _read(request: Request, most: int) -> bytes:
    length = request.headers.get("content-length", "")
    too_large = ApiError(f"the body is larger than {most:,} bytes", status=413, headers={"connection": "close"})
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise too_large
    return bytes(content)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client closes the connection (ClientGone)."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.wait({working, gone})


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
