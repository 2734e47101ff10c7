"""Connections: how many, how long one may take to say what it wants, and how long to read what it is sent."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_lora.serve.http.answering import as_bytes
from mlx_lora.serve.http.bounds import Bounds
from mlx_lora.serve.openai.errors import ApiError

REASONS = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}


def within(bounds: Bounds) -> type[asyncio.Protocol]:
    """uvicorn's protocol, within bounds."""
    return type("Bounded", (Bounded,), {"bounds": bounds})


class Bounded(H11Protocol):
    """A connection. `_late` ends it where the next request doesn't come in time, or the last response isn't read."""

    bounds = Bounds()
    _late: asyncio.TimerHandle | None = None
    _unsent = math.inf  # bytes of the last response when it was looked at

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}  # for an answer that isn't read
        if len(self.connections) > self.bounds.connections:
            self._refuse(503, "too_many_connections", f"{self.bounds.connections} connections are open")
        self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def handle_events(self) -> None:
        if not self.transport.is_closing():
            super().handle_events()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "invalid_http", msg)

    def _look(self) -> None:
        """Wait for the next request where none is being answered, and end to wait where one is."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._late is None:
            self._late = self.loop.call_later(self.bounds.header_seconds, self._end)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _end(self) -> None:
        self._late, before = None, self._unsent
        self._unsent = self.transport.get_write_buffer_size() or math.inf
        if self._unsent < before:  # the client still reads its response
            self._look()
        elif self.cycle is None and not self.transport.is_closing():
            self._refuse(408, "timeout", f"no request came within {self.bounds.header_seconds:g} seconds")
        else:
            self.transport.abort()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer before or without a request, and close."""
        content = as_bytes(ApiError(status, code, message).body())
        head = f"HTTP/1.1 {status} {REASONS[status]}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        head += "retry-after: 1\r\n" if status == 503 else ""
        self.transport.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        self.transport.close()
