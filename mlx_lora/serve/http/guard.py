"""Around every request: who may come in, headers against what browsers do, counting, and errors in OpenAI's form."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from fastapi import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_lora.serve.http.access import Access
from mlx_lora.serve.http.answering import as_bytes
from mlx_lora.serve.openai.errors import ApiError

log = logging.getLogger(__name__)

ALWAYS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
]
# Seconds after which a refused client may ask again, by status.
RETRY_AFTER = {429: 1, 503: 5}
# The star stands for all headers but the first: OpenAI's client in a browser sends some of its own.
ASK, ALLOWED_HEADERS = b"access-control-request-method", b"authorization, *"

# Called with the line of a request that has ended.
OnRequest = Callable[[str], None]


def error_response(error: ApiError) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER[error.status])} if error.status in RETRY_AFTER else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(as_bytes(error.body()), error.status, headers, "application/json")


class Guard:
    """`app` behind `access`. `counts` are requests by route and status; `on_request` gets a line for each."""

    def __init__(self, app: ASGIApp, access: Access, on_request: OnRequest = lambda line: None):
        self.app, self.access, self.on_request = app, access, on_request
        self.counts: Counter[tuple[str, int]] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 0
        headers: dict[bytes, list[bytes]] = defaultdict(list)
        for name, value in scope["headers"]:
            headers[name].append(value)
        extra = [*ALWAYS, *self._for_origin(headers)]

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            await self._answer(scope, headers)(scope, receive, sent)
        except Exception as error:  # its text may hold a prompt
            log.exception("a request to %s failed: %s", route(scope), type(error).__name__)
            if not status:
                failed = ApiError(500, "internal_error", f"the request failed in the server ({type(error).__name__})")
                await error_response(failed)(scope, receive, sent)
        finally:
            self.counts[route(scope), status] += 1
            seconds = time.perf_counter() - start
            self.on_request(f"{scope['method']} {route(scope)} {status or 'client gone'} {seconds:.2f} s")

    def _answer(self, scope: Scope, headers: dict[bytes, list[bytes]]) -> Any:
        """What answers a request: a refusal, what a browser is told before it asks, or the application."""
        asks_before = scope["method"] == "OPTIONS" and ASK in headers
        refusal = self.access.refusal(headers, "/" if asks_before else scope["path"])
        if refusal is not None:
            return error_response(refusal)
        return Response(status_code=204) if asks_before else self.app

    def _for_origin(self, headers: dict[bytes, list[bytes]]) -> list[tuple[bytes, bytes]]:
        """Let pages of an allowed origin read the answer."""
        origin = headers.get(b"origin", [b""])[0]
        if origin.decode("latin-1") not in self.access.origins:
            return []
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-allow-headers", ALLOWED_HEADERS),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"vary", b"Origin"),
        ]


def route(scope: Scope) -> str:
    """The route of a request, as it is written in the code: a path may hold anything."""
    return str(getattr(scope.get("route"), "path", "other"))
