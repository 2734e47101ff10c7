"""The memory of a machine: how much training may take of it, and when it has taken too much.

Apple's GPU shares the machine's memory and recommends a part of it, beyond which the system swaps. A processor has
what other programs leave. What a step will take is the business of `train.budget.predict`.
"""

from __future__ import annotations

import mlx.core as mx
import psutil

from mlx_lora import ui
from mlx_lora.machine import device

GIB = 1 << 30
# Of what is free, this share is for arrays: the interpreter, its libraries and the allocator's gaps take the rest.
FOR_ARRAYS = 0.9
# Metal's recommendation for machines of this many bytes, and for larger ones.
LARGE, OF_SMALL, OF_LARGE = 36 << 30, 2 / 3, 3 / 4
# A prediction may be off by this much, and a plan that was accepted shouldn't stop its run for it.
SLACK = 1.1
# Below this much free memory a machine is about to swap.
LEAST_FREE = 256 << 20


def limit_bytes(*, memory_gb: float | None = None, setting: float | None = None) -> int:
    """Bytes that training may take: `setting` GiB where that is set, be it more or less than the machine recommends.

    Otherwise what this machine gives, or one with `memory_gb` GiB in all: the part that Metal recommends for that size.
    """
    if setting is not None:
        return int(setting * GIB)
    if memory_gb is not None:
        total = int(memory_gb * GIB)
        return int(total * (OF_LARGE if total >= LARGE else OF_SMALL))
    if device.on_gpu():
        return int(mx.device_info()["max_recommended_working_set_size"])
    available = psutil.virtual_memory().available
    return int(mx.get_active_memory() + min(FOR_ARRAYS * available, available - LEAST_FREE))


def free_bytes() -> int:
    """Bytes that arrays may still take before the machine swaps; less than 0 where it is about to."""
    left = int(psutil.virtual_memory().available) - LEAST_FREE
    if device.on_gpu():
        left = min(left, int(mx.device_info()["max_recommended_working_set_size"]) - mx.get_active_memory())
    return left


def too_large(size: int) -> str | None:
    """Why another program shouldn't load `size` bytes of weights now, or None: the machine would swap."""
    free = int(psutil.virtual_memory().available)
    if size > FOR_ARRAYS * free:
        return f"its weights take {ui.size(size)}, and {ui.size(free)} of this machine's memory are free"
    return None


def exceeded(limit: int | None, *, beside: int = 0) -> str | None:
    """Why training should stop and save, or None, from the highest use so far and what the machine has left.

    `beside` are bytes that training holds outside of MLX. Without a limit only a machine that is about to swap is one.
    """
    peak, free = int(mx.get_peak_memory()) + beside, int(psutil.virtual_memory().available)
    if limit is not None and peak > SLACK * limit:
        return f"a step took {ui.size(peak)}, over the limit of {ui.size(limit)}"
    if free < LEAST_FREE:
        return f"only {ui.size(free)} of this machine's memory is left: it would swap"
    return None
