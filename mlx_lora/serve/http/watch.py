"""Looks whether the generating thread still moves, and gives every request an error where it doesn't."""

from __future__ import annotations

import asyncio
import logging

from mlx_lora.serve.scheduler import Scheduler, Status

# Seconds between two looks.
LOOK = 0.5
# A machine whose passes take long is stuck when one takes so many times the longest before it, up to a limit.
TIMES_SLOWEST, MOST = 10, 600.0

log = logging.getLogger(__name__)


def fault(status: Status, stuck_seconds: float) -> str | None:
    """What is wrong with the generating thread, or None."""
    if not status.alive:
        return "the thread that generates has ended"
    patience = max(stuck_seconds, min(TIMES_SLOWEST * status.slowest_seconds, MOST))
    if status.quiet_seconds > patience:
        return f"the thread that generates hasn't moved for {status.quiet_seconds:.0f} s"
    return "the thread that generates doesn't move" if status.stuck else None


async def watch(scheduler: Scheduler, stuck_seconds: float) -> None:
    """Give the scheduler up where it is stuck or dead, as long as this runs: what is open ends with an error."""
    while True:
        await asyncio.sleep(LOOK)
        status = scheduler.status()
        if (status.running or status.waiting) and (found := fault(status, stuck_seconds)) is not None:
            log.error("%s: every open request ends with an error", found)
            scheduler.give_up(found)
