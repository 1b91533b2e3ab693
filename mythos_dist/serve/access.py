"""Every request passes here: its key, its Host header, and the count of responses."""

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mythos_dist.serve.errors import ApiError
from mythos_dist.serve.service import Service

OPEN = ("/health",)  # without a key
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")


class Access:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass requests on, or respond with the error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        requests, label = self._service.metrics.requests, path if path in PATHS else "other"

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                requests.labels(label, message["status"]).inc()
            await send(message)

        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        error = self._host_error(headers.get(b"host", "")) or self._key_error(path, headers.get(b"authorization", ""))
        try:
            await (error.response() if error else self._app)(scope, receive, count)
        except Exception:
            requests.labels(label, 500).inc()
            raise

    def _host_error(self, host: str) -> ApiError | None:
        """A page in a browser could reach a server on loopback under a name of its own ("DNS rebinding")."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if not self._service.hosts or name.lower() in self._service.hosts:
            return None
        return ApiError(f"this server does not respond to the host name {name[:80]!r}; use localhost", status=403)

    def _key_error(self, path: str, authorization: str) -> ApiError | None:
        key = self._service.key
        if key is None or path in OPEN:
            return None
        scheme, _, given = authorization.partition(" ")
        # In constant time, which must not depend on how much of a wrong key is right.
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode()):
            return None
        problem = "the API key is wrong" if authorization else "the request has no API key"
        return ApiError(
            f"{problem}; send the header 'Authorization: Bearer KEY'",
            status=401,
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
