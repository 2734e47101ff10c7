"""How MLX and the C library may hold memory while we compute, put back afterwards.

Nothing here imports MLX at module level: `file_limits_kept` runs around the first import of mlx_lm.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from mlx_lora.machine import device

# Bytes below its peak from which on MLX's CPU backend waits for each operation, at most an eighth of the way down to
# what stays: below a small peak everything is near it.
HELD_BACK = 20 << 20
# glibc's names for the size from which on memory is taken from the system and given back, and for what is kept on top.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, GLIBC_MOST = -1, -3, 32 << 20


@contextlib.contextmanager
def file_limits_kept() -> Iterator[None]:
    """Keep RLIMIT_NOFILE as it is while importing a package that lowers it, hard limit included."""
    import resource

    original = resource.setrlimit

    def refuse_file_limit(which: int, limits: tuple[int, int]) -> None:
        if which != resource.RLIMIT_NOFILE:
            original(which, limits)

    resource.setrlimit = refuse_file_limit
    try:
        yield
    finally:
        resource.setrlimit = original


def hold_back() -> None:
    """On a CPU, let MLX run ahead of itself only while memory is well below its peak so far.

    The CPU backend prepares operations, and allocates their results, some ten ahead of the one that it computes: free
    while memory is low, a third of the peak where it is high. Above its limit MLX waits for each operation. Called
    after every step, this makes the first step slow, and leaves the others as they would be but for their peaks.
    """
    import mlx.core as mx

    if not device.on_gpu():
        peak = mx.get_peak_memory()
        mx.set_memory_limit(peak - min(HELD_BACK, max(peak - mx.get_active_memory(), 0) // 8))


@contextlib.contextmanager
def _freed_memory_kept() -> Iterator[None]:
    """While the block runs, let glibc keep what MLX's CPU backend frees, for what it allocates next.

    By itself glibc gives every large array back to the system, whose next one is handed out page by page, each filled
    with zeros: half of the time of an operation on single elements. Other C libraries are left as they are.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        yield
        return
    if not library.mallopt(M_MMAP_THRESHOLD, 1 << 30):  # older ones have a limit
        library.mallopt(M_MMAP_THRESHOLD, GLIBC_MOST)
    library.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield
    finally:  # what its own rule arrives at, which mallopt has ended for good
        library.mallopt(M_MMAP_THRESHOLD, GLIBC_MOST)
        library.mallopt(M_TRIM_THRESHOLD, 2 * GLIBC_MOST)
        library.malloc_trim(0)


@contextlib.contextmanager
def memory_limits(*, lean: bool = True) -> Iterator[None]:
    """Wire as much memory as Metal recommends while the block runs, then put the old limits back.

    On a CPU: keep freed memory, and where `lean`, begin as `hold_back` goes on. A limit of 0 makes MLX wait for every
    operation; a token has hundreds of short ones, so generating is several times slower under it than without.
    """
    import mlx.core as mx

    if not device.on_gpu():
        limit = mx.set_memory_limit(0) if lean else None
        try:
            with _freed_memory_kept():
                yield
        finally:
            if limit is not None:
                mx.set_memory_limit(limit)
        return
    recommended = int(mx.device_info().get("max_recommended_working_set_size", 0))
    wired = mx.set_wired_limit(recommended)
    cache = mx.set_cache_limit(max(recommended // 8, 1 << 28))
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(wired)
        mx.set_cache_limit(cache)
