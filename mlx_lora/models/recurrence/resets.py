"""The segments of the packed batch that is running, for functions that mlx-lm's layers call without them.

A recurrence must reset its state at the border between two rows, but mlx-lm's layers have no argument for borders. So
the caller that runs a packed batch sets the segments with `resetting`, and the functions of this folder read them with
`current_segments`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

_segments: list[mx.array] = []


@contextmanager
def resetting(segments: mx.array) -> Iterator[None]:
    """While the block runs, the functions of this folder reset their states at every border of `segments`.

    `segments` int32 (B, T): one number for the positions of a row, rows one after another, 0 for padding. Under
    `mx.compile` or `mx.checkpoint`, enter it inside the function, with an array that is one of the function's inputs.
    """
    _segments.append(segments)
    try:
        yield
    finally:
        _segments.pop()


def current_segments() -> mx.array | None:
    """The segments of the innermost `resetting`, or None outside of one."""
    return _segments[-1] if _segments else None
