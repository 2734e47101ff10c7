"""`pytest --as-gpu`: this process believes that MLX computes on a GPU. Importing this file is what does it.

With `--as-gpu`, tests/conftest.py imports it in pytest's processes and puts its folder on PYTHONPATH: Python imports a
module of this name whenever it starts, so that the processes which tests start believe it too. The package itself
reads no variable for it.

Every branch behind `device.on_gpu()` then runs, on MLX's CPU backend: dtypes, sizes of parts, the order of steps. No
kernel of Metal runs, no memory is wired, and half precision is emulated; what those do is what `mlx-lora selftest`
looks at on a Mac.
"""

from __future__ import annotations

import mlx_lora.machine.device

# What mx.device_info() says on a MacBook with an M2 and 16 GB. The CPU backend gives the first two keys alone.
MAC: dict[str, str | int] = {
    "architecture": "applegpu_g14g",
    "device_name": "Apple M2",
    "max_buffer_length": 9_534_832_640,
    "max_recommended_working_set_size": 11_453_251_584,
    "memory_size": 17_179_869_184,
    "resource_limit": 499_000,
}


def on_gpu() -> bool:
    """In place of the package's own. Asking it is what the package does before it asks for a GPU's facts."""
    import mlx.core as mx  # not earlier: the package loads its BLAS before

    mx.device_info = lambda *_: dict(MAC)
    return True


mlx_lora.machine.device.on_gpu = on_gpu
