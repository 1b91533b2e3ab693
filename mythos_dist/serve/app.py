"""The HTTP endpoints."""

import contextlib
import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.responses import Response as HttpResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from mythos_dist.serve.access import Access
from mythos_dist.serve.body import ClientGone, read_body, unless_disconnected
from mythos_dist.serve.engine_thread import Delta, Generation
from mythos_dist.serve.errors import ApiError, model_not_found, server_error
from mythos_dist.serve.requests import ChatBody, CompletionBody, GenerationBody
from mythos_dist.serve.responses import ChatFormat, CompletionFormat, EventStream, Parts, Response
from mythos_dist.serve.scoring import score
from mythos_dist.serve.service import Service, requested_logprobs

log = logging.getLogger(__name__)


def build_app(service: Service) -> FastAPI:
    """The application of one model; its engine runs while the application does."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await service.engine.stop()

    # Swagger's pages load scripts from elsewhere, so there are none.
    app = FastAPI(title="mythos_dist", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Access, service=service)
    _add_error_handlers(app)
    _add_status_routes(app, service)

    @app.post("/v1/completions", openapi_extra=_schema_of(CompletionBody, "/v1/completions"))
    async def completions(request: Request) -> HttpResponse:
        body = await read_body(request, service.limits, CompletionBody)
        service.check_model(body.model)
        prompts = await service.completion_prompts(body)
        format = CompletionFormat(service.texts, body.logprobs is not None)
        generation = _submit(service, body, prompts, generates=body.max_tokens > 0)
        parts = _completion_parts(service, body, prompts, generation)
        return await _respond(request, service, body, format, prompts, generation, parts)

    @app.post("/v1/chat/completions", openapi_extra=_schema_of(ChatBody, "/v1/chat/completions"))
    async def chat(request: Request) -> HttpResponse:
        body = await read_body(request, service.limits, ChatBody)
        service.check_model(body.model)
        prompts = [await service.chat_prompt(body)]
        format = ChatFormat(service.texts, body.logprobs)
        generation = _submit(service, body, prompts)
        return await _respond(request, service, body, format, prompts, generation, aiter(generation))

    return app


def _submit(service: Service, body: GenerationBody, prompts: list[list[int]], generates: bool = True) -> Generation:
    """Begin `n` choices for each prompt; none if not `generates`, which needs a free place nevertheless."""
    choices = service.choices(body, prompts)
    generation = service.engine.submit(choices if generates else [])
    service.metrics.prompt_tokens.inc(sum(map(len, prompts)))
    return generation


async def _completion_parts(
    service: Service, body: CompletionBody, prompts: list[list[int]], generation: Generation
) -> Parts:
    """With `echo` the prompt first, then what is generated."""
    for i, prompt in enumerate(prompts if body.echo else []):
        given = body.prompt[i]
        text = given if isinstance(given, str) else await service.decode(prompt)
        top = requested_logprobs(body)
        loops = body.loops or service.n_loops
        entries = []
        if top is not None:
            entries = await service.engine.run(partial(score, service.model, prompt, loops, top))
        for choice in range(body.n):
            yield i * body.n + choice, Delta(text, [], entries, [], None)
    if body.max_tokens == 0:
        for index in range(len(prompts) * body.n):
            yield index, Delta("", [], [], [], "length")
    async for part in generation:
        yield part


async def _respond(
    request: Request,
    service: Service,
    body: GenerationBody,
    format: CompletionFormat | ChatFormat,
    prompts: list[list[int]],
    generation: Generation,
    parts: Parts,
) -> HttpResponse:
    """The response, complete or as a stream."""
    response = Response(format, service.name, sum(map(len, prompts)), len(prompts) * body.n)
    if body.stream:
        return EventStream(response.events(parts, body.stream_options.include_usage), generation)
    try:
        return JSONResponse(await unless_disconnected(request, response.complete(parts)))
    finally:
        generation.cancel()


def _add_status_routes(app: FastAPI, service: Service) -> None:
    """What a server says about itself."""
    card = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "mythos_dist",
        "max_model_len": service.max_seq_len,  # tokens, as vLLM names it
        "loops": service.n_loops,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise model_not_found(name)
        return card

    @app.get("/health")
    async def health() -> JSONResponse:
        healthy = service.engine.healthy
        return JSONResponse({"status": "ok" if healthy else "failed"}, 200 if healthy else 503)

    @app.get("/metrics")
    async def metrics() -> HttpResponse:
        return HttpResponse(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_error_handlers(app: FastAPI) -> None:
    """Every error has the API's form."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> HttpResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> HttpResponse:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return ApiError(message, status=error.status_code, headers=error.headers).response()

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: ClientGone) -> HttpResponse:
        return HttpResponse(status_code=499)  # of nginx, for the metrics: there is no client to receive it

    @app.exception_handler(Exception)
    async def failure(request: Request, error: Exception) -> HttpResponse:
        return server_error("the server has failed; its log says why").response()


def _schema_of(body: type[GenerationBody], path: str) -> dict[str, Any]:
    """For /openapi.json: bodies are read by `read_body`, which FastAPI does not see."""
    place = ["paths", path, "post", "requestBody", "content", "application/json", "schema", "$defs", "{model}"]
    pointer = "#/" + "/".join(part.replace("/", "~1") for part in place)
    schema = body.model_json_schema(ref_template=pointer)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
