"""The device: Metal or CPU, its dtype, the BLAS underneath, and limits that are put back.

Nothing here imports MLX at module level: `load_blas` must run before `mlx.core` is first imported, because a BLAS
that is already bound can't be replaced. Decisions are made from the device MLX uses, never from the platform's name;
the one exception is the BLAS, which has to be chosen before there is a device to ask.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

BLAS_LIBRARY = "libopenblas.so.0"
BLAS_HINT = "apt-get install libopenblas0-pthread"
# 2^f = Σ cᵢ fⁱ: the first terms of its series, whose error is below float32's rounding for |f| ≤ ½.
POWERS = [math.log(2) ** i / math.factorial(i) for i in range(8)]
# Bytes below its peak from which on MLX's CPU backend waits for each operation, at most an eighth of the way down to
# what stays: below a small peak everything is near it.
HELD_BACK = 20 << 20
# glibc's names for the size from which on memory is taken from the system and given back, and for what is kept on top.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, GLIBC_MOST = -1, -3, 32 << 20
_blas: str | None = None


def load_blas() -> str | None:
    """Load OpenBLAS ahead of MLX's own reference BLAS on Linux; return the library's name, or None without one.

    MLX's Linux build links the reference BLAS (about 2 GFLOP/s). A library whose `cblas_*` symbols are already
    global when `mlx.core` is loaded takes their place (about 70 times faster). Too late once MLX is imported.
    """
    global _blas
    if _blas is None and sys.platform.startswith("linux") and "mlx.core" not in sys.modules:
        with contextlib.suppress(OSError):
            ctypes.CDLL(BLAS_LIBRARY, mode=ctypes.RTLD_GLOBAL)
            _blas = BLAS_LIBRARY
    return _blas


def blas_loaded() -> bool:
    """Whether this process has an OpenBLAS mapped (loaded by us, or preloaded by the user)."""
    try:
        with open("/proc/self/maps") as maps:
            return any("openblas" in line and "numpy" not in line for line in maps)
    except OSError:
        return False


def on_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal for the users, the CPU backend in tests)."""
    import mlx.core as mx

    return bool(mx.default_device().type == mx.gpu)


def activation_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The dtype to compute in: the model's own on a GPU, float32 on a CPU, where halves are emulated."""
    import mlx.core as mx

    return stored if on_gpu() else mx.float32


def exp_below_one(x: mx.array) -> mx.array:
    """eˣ for x ≤ 0, as exact as MLX's own, which it is on a GPU; on a CPU five times faster than that.

    2^y = 2^n · 2^f with n whole and |f| ≤ ½: a polynomial for 2^f, and n put into the exponent's bits. Only additions
    and products, which a compiled kernel does several at a time. Below 2^-126.5 the result is 0: n is -127 then, whose
    bits are those of 0, and hardly a denormal slows the products that follow. On a CPU it can't be differentiated.
    """
    import mlx.core as mx

    if on_gpu() or x.dtype != mx.float32:
        return mx.exp(x)
    y = mx.maximum(x * math.log2(math.e), -127.0)
    n = (y - 0.5).astype(mx.int32)  # towards zero, so this rounds
    f = y - n.astype(mx.float32)
    power = mx.array(POWERS[-1])
    for coefficient in POWERS[-2::-1]:
        power = power * f + coefficient
    return power * mx.left_shift(n + 127, 23).view(mx.float32)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e⁻ˣ), through `exp_below_one` on a CPU."""
    import mlx.core as mx

    if on_gpu() or x.dtype != mx.float32:
        return mx.sigmoid(x)
    power = exp_below_one(-mx.abs(x))
    return mx.where(x >= 0, 1.0, power) / (1 + power)


def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis, summed in float32, through `exp_below_one` on a CPU."""
    import mlx.core as mx

    if on_gpu() or x.dtype != mx.float32:
        return mx.softmax(x, axis=-1, precise=True)
    power = exp_below_one(x - x.max(axis=-1, keepdims=True))
    return power / power.sum(axis=-1, keepdims=True)


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

    if not on_gpu():
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
def memory_limits() -> Iterator[None]:
    """Wire as much memory as Metal recommends while the block runs, then put the old limits back.

    On a CPU: begin as `hold_back` goes on, and keep freed memory.
    """
    import mlx.core as mx

    if not on_gpu():
        limit = mx.set_memory_limit(0)
        try:
            with _freed_memory_kept():
                yield
        finally:
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


def exclude_from_backups(path: Path) -> None:
    """Keep a directory out of Time Machine, as far as macOS lets us: a backup is a copy that nobody thinks of.

    `tmutil` marks the directory itself, so the mark stays when it is moved. Where there is no such tool, or it fails,
    nothing happens.
    """
    import shutil
    import subprocess

    if tool := shutil.which("tmutil"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run([tool, "addexclusion", str(path)], capture_output=True, timeout=10, check=False)


def describe() -> dict[str, Any]:
    """Facts for `doctor` and for the record: device, memory, BLAS, versions."""
    import mlx.core as mx
    import psutil

    info = mx.device_info() if on_gpu() else {}
    return {
        "device": "gpu" if on_gpu() else "cpu",
        "name": str(info.get("device_name", "")) or _processor(),
        "memory_bytes": psutil.virtual_memory().total,
        "available_bytes": psutil.virtual_memory().available,
        "working_set_bytes": info.get("max_recommended_working_set_size"),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "openblas": blas_loaded() if sys.platform.startswith("linux") else None,
        "compiled_kernels": on_gpu() or _find_compiler() is not None,
    }


def _processor() -> str:
    import platform

    return platform.processor() or platform.machine()


def _find_compiler() -> str | None:
    """MLX's CPU backend compiles fused kernels with g++ and falls back quietly without one."""
    import shutil

    return shutil.which("g++")
