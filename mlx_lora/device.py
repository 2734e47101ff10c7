"""The device: Metal or CPU, its dtype, the BLAS underneath, and limits that are put back.

Nothing here imports MLX at module level: `load_blas` must run before `mlx.core` is first imported, because a BLAS
that is already bound can't be replaced. Decisions are made from the device MLX uses, never from the platform's name;
the one exception is the BLAS, which has to be chosen before there is a device to ask.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

BLAS_LIBRARY = "libopenblas.so.0"
BLAS_HINT = "apt-get install libopenblas0-pthread"
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


@contextlib.contextmanager
def memory_limits() -> Iterator[None]:
    """Wire as much memory as Metal recommends while the block runs, then put the old limits back."""
    import mlx.core as mx

    if not on_gpu():
        yield
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
