"""What one client may take of the server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """Bytes, seconds and counts; what is over them is refused or ended, and nothing else suffers from it.

    body_bytes       of a request's body; `depth` is how deep its JSON may be nested
    header_seconds   from a connection to its request's last header, and between two requests
    body_seconds     to send a body
    stall_seconds    that a client may read nothing while it is being sent something
    behind           events that may wait for a client that reads slowly
    connections      at once; more than rows that may run and wait, so that a full queue is told as one (429)
    stuck_seconds    without a pass, and TIMES_SLOWEST of the longest one so far, after which the thread is given up
    finish_seconds   that answers have left when the server is stopped
    """

    body_bytes: int = 8 << 20
    depth: int = 64
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    stall_seconds: float = 30.0
    behind: int = 20_000
    connections: int = 512
    stuck_seconds: float = 60.0
    finish_seconds: float = 5.0
