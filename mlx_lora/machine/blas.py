"""The BLAS underneath MLX on Linux: loaded ahead of MLX's own, which is slow.

Nothing here imports MLX: a BLAS that is already bound can't be replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

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
