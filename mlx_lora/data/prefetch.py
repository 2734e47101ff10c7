"""Run an iterator some items ahead in a separate thread, so that numpy prepares batches while the device computes.

The thread never touches MLX: arrays built lazily in one thread can't be evaluated in another.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
DEPTH = 2
_END = object()


def prefetch(items: Iterable[T], depth: int = DEPTH) -> Generator[T, None, None]:
    """The same items in the same order, at most `depth` of them in advance. Raises what `items` raises."""
    buffer: queue.Queue[Any] = queue.Queue(depth)
    closed = threading.Event()

    def produce() -> None:
        try:
            for item in items:
                if not _put(buffer, (item, None), closed):
                    return
            _put(buffer, (_END, None), closed)
        except BaseException as error:  # raised again in the caller's thread
            _put(buffer, (_END, error), closed)

    thread = threading.Thread(target=produce, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = buffer.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        closed.set()
        if threading.current_thread() is not thread:  # the garbage collector may close the generator in that thread
            thread.join()


def _put(buffer: queue.Queue[Any], item: Any, closed: threading.Event) -> bool:
    """Put `item` as soon as there is room. False if the caller has closed the generator."""
    while not closed.is_set():
        try:
            buffer.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
