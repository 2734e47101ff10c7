"""One HTTP request's answers: from the generating thread into the event loop, and out to the client.

    the thread that generates ── call_soon_threadsafe ──> Rows ── Asked.event ──> server-sent events, or one object

A client that goes away takes its rows with it. One that reads slowly waits for itself alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from mlx_lora import ui
from mlx_lora.errors import Stopped
from mlx_lora.serve.http.body import ClientGone
from mlx_lora.serve.http.bounds import Bounds
from mlx_lora.serve.openai.errors import api_error
from mlx_lora.serve.requests import Answer, Event, Failed, Finished, Request
from mlx_lora.serve.scheduler import Scheduler

DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]


class Rows:
    """The open rows of one HTTP request, by index, and their events. For the event loop."""

    def __init__(self, scheduler: Scheduler, requests: Sequence[Request]):
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.open: dict[int, Answer] = {}
        try:
            for index, request in enumerate(requests):
                self.open[index] = scheduler.submit(request, partial(self._deliver, index))
        except BaseException:
            self.cancel()
            raise

    def _deliver(self, index: int, event: Event) -> None:
        """Called by the generating thread, which a loop that has ended must not stop."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
        except RuntimeError:
            pass

    async def next(self) -> list[tuple[int, Event]]:
        """All events that have come, at least one."""
        events = [await self._events.get()]
        while not self._events.empty():
            events.append(self._events.get_nowait())
        for index, event in events:
            if isinstance(event, Finished | Failed):
                self.open.pop(index, None)
        return events

    @property
    def behind(self) -> int:
        return self._events.qsize()

    def cancel(self, *indices: int) -> None:
        """End these rows, or all of them."""
        for index in indices or tuple(self.open):
            if index in self.open:
                self.open[index].cancel()


class Answering(Response):
    """The response that answers `asked`, a prepared request (`serve.openai`)."""

    def __init__(self, asked: Any, scheduler: Scheduler, bounds: Bounds):
        super().__init__()
        self.asked, self.scheduler, self.bounds = asked, scheduler, bounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what the request failed with while nothing has been sent."""
        rows = Rows(self.scheduler, self.asked.requests)
        try:
            await unless_gone(
                receive, self._stream(rows, scope, send) if self.asked.stream else self._whole(rows, send)
            )
        except ClientGone:
            pass
        finally:
            rows.cancel()

    def _chunks(self, rows: Rows, events: Sequence[tuple[int, Event]]) -> list[dict[str, Any]]:
        """What the events add to the answer. Raises what one of the rows failed with."""
        chunks = []
        for index, event in events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished) and event.reason == "cancelled" and not event.generated_tokens:
                raise Stopped("the server was stopped before the answer began", hint="ask again")
            chunks += self.asked.event(index, event)
            if self.asked.wants_cancel(index):
                rows.cancel(index)
        return chunks

    async def _whole(self, rows: Rows, send: Send) -> None:
        while rows.open:
            self._chunks(rows, await rows.next())
        content = as_bytes(self.asked.whole())
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _stream(self, rows: Rows, scope: Scope, send: Send) -> None:
        """Send chunks as they come. What fails before the first event is an error with a status of its own."""
        chunks = self._chunks(rows, await rows.next())
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        last = DONE
        try:
            await self._send(chunks, rows, scope, send)
            while rows.open:
                await self._send(self._chunks(rows, await rows.next()), rows, scope, send)
        except ClientGone:
            raise
        except Exception as error:
            last = _line(api_error(error).body())
        await send({"type": "http.response.body", "body": last})

    async def _send(self, chunks: Sequence[dict[str, Any]], rows: Rows, scope: Scope, send: Send) -> None:
        """Send chunks in one piece; raises ClientGone for a client that doesn't read."""
        try:
            async with asyncio.timeout(self.bounds.stall_seconds):
                body = b"".join(map(_line, chunks))
                await send({"type": "http.response.body", "body": body, "more_body": True})
        except TimeoutError:
            slow = True
        else:
            slow = rows.behind > self.bounds.behind
        if slow:
            scope["state"]["abort"]()
            raise ClientGone


async def unless_gone(receive: Receive, work: Awaitable[None]) -> None:
    """Do `work`, and end it with ClientGone once the client closes its connection."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        working.result()
    finally:
        working.cancel()
        waiting.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


def as_bytes(value: Any) -> bytes:
    return ui.escaped_json(value).encode()


def _line(chunk: dict[str, Any]) -> bytes:
    return b"data: " + as_bytes(chunk) + b"\n\n"
