"""The routes: JSON in, what `serve.openai` makes of it out. Nothing here knows models or arrays.

What takes time runs in threads beside the event loop: parsing, templates, the store's files.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from mlx_lora.errors import MlxLoraError
from mlx_lora.serve.http import metrics, page
from mlx_lora.serve.http.access import Access
from mlx_lora.serve.http.answering import Answering, as_bytes
from mlx_lora.serve.http.body import ClientGone, parse, read
from mlx_lora.serve.http.bounds import Bounds
from mlx_lora.serve.http.guard import Guard, OnRequest, error_response
from mlx_lora.serve.http.models import Models
from mlx_lora.serve.http.watch import fault, watch
from mlx_lora.serve.openai.asked import Kind
from mlx_lora.serve.openai.errors import ApiError, api_error
from mlx_lora.serve.openai.prepare import prepare
from mlx_lora.serve.service import Service

# Seconds that bringing an adapter into memory may take.
LOAD_SECONDS = 120.0


def make_app(service: Service, access: Access, bounds: Bounds, on_request: OnRequest = lambda line: None) -> Guard:
    """The ASGI application that serves `service` to those whom `access` lets in."""

    @asynccontextmanager
    async def watching(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(watch(service.scheduler, bounds.stuck_seconds))
        yield
        task.cancel()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=watching)
    app.add_exception_handler(MlxLoraError, _failed)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(Exception, _failed)  # and raised again, for the guard to log it
    guard = Guard(app, access, on_request)
    _add_answers(app, service, bounds)
    _add_models(app, service, bounds)
    _add_state(app, service, bounds, guard)
    return guard


def _add_answers(app: FastAPI, service: Service, bounds: Bounds) -> None:
    async def answer(request: Request, kind: Kind) -> Response:
        if (refusal := service.scheduler.refusal()) is not None:  # before its body takes any work
            raise refusal
        body = await read(request, bounds)
        asked = await run_in_threadpool(lambda: prepare(service, parse(body, bounds), kind))
        return Answering(asked, service.scheduler, bounds)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, "chat")

    @app.post("/v1/completions")
    async def completion(request: Request) -> Response:
        return await answer(request, "completion")


def _add_models(app: FastAPI, service: Service, bounds: Bounds) -> None:
    models = Models(service)

    @app.get("/v1/models")
    async def listed() -> Response:
        return _json(await run_in_threadpool(models.list))

    @app.get("/v1/models/{name:path}")
    async def one(name: str) -> Response:
        return _json(await run_in_threadpool(models.one, name))

    async def change(request: Request, do: Callable[..., None], done: str) -> Response:
        body = await read(request, bounds)
        name = await run_in_threadpool(lambda: _adapter_name(parse(body, bounds), models))
        try:
            await run_in_threadpool(partial(do, name, timeout=LOAD_SECONDS))
        except TimeoutError:
            raise ApiError(503, "busy", f"{name} isn't {done} after {LOAD_SECONDS:g} s; other work goes on") from None
        return PlainTextResponse(f"Success: LoRA adapter '{name}' {done} successfully.")

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        return await change(request, service.scheduler.load, "added")

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        return await change(request, service.scheduler.unload, "removed")


def _adapter_name(body: dict[str, Any], models: Models) -> str:
    """The name in a request to load or unload. vLLM takes a path beside it: here that may only be the name again."""
    name = body.get("lora_name")
    if body.get("lora_path", name) != name:
        raise ApiError(400, "invalid_value", "lora_path may only be the adapter's name: paths aren't read", "lora_path")
    return models.known(name)


def _add_state(app: FastAPI, service: Service, bounds: Bounds, guard: Guard) -> None:
    @app.get("/health")
    async def health() -> Response:
        status = service.scheduler.status()
        wrong = fault(status, bounds.stuck_seconds)
        found = {"status": "ok" if wrong is None else "failed", "reason": wrong} | {
            "running": status.running, "waiting": status.waiting,
        }  # fmt: skip
        return _json(found, 200 if wrong is None else 503)

    @app.get("/metrics")
    async def measured() -> Response:
        text = metrics.as_text(service.scheduler.status(), guard.counts)
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)

    @app.get("/")
    async def start() -> Response:
        if not page.PAGE.is_file():
            raise ApiError(404, "not_found", "this installation has no page")
        text = await run_in_threadpool(page.PAGE.read_text, "utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": page.policy(text)})


def _json(value: Any, status: int = 200) -> Response:
    return Response(as_bytes(value), status, media_type="application/json")


async def _failed(request: Request, error: Exception) -> Response:
    return error_response(api_error(error))


class _Nothing(Response):
    """The response to a client that isn't there any more."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pass


async def _gone(request: Request, error: Exception) -> Response:
    return _Nothing()


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    found = ApiError(error.status_code, code, f"{request.method} {request.url.path[:200]}: {error.detail}")
    response = error_response(found)
    response.headers.update(error.headers or {})
    return response
