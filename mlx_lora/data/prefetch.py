"""Run an iterator some items ahead, in a thread of its own, so that numpy prepares batches while the device computes.

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
    """The same items in the same order, at most `depth` made in advance. What raises there raises here."""
    made: queue.Queue[Any] = queue.Queue(depth)
    closed = threading.Event()

    def make() -> None:
        try:
            for item in items:
                if not _put(made, (item, None), closed):
                    return
            _put(made, (_END, None), closed)
        except BaseException as error:  # shown where the items are used
            _put(made, (_END, error), closed)

    thread = threading.Thread(target=make, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        closed.set()
        if threading.current_thread() is not thread:  # where the garbage collector may run this
            thread.join()


def _put(made: queue.Queue[Any], item: Any, closed: threading.Event) -> bool:
    """Wait for room, unless nobody takes items any more."""
    while not closed.is_set():
        try:
            made.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
