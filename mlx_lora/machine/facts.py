"""Facts about this machine, for `doctor` and for what a benchmark records."""

from __future__ import annotations

import platform
import shutil
import sys
from typing import Any

import mlx.core as mx
import psutil

from mlx_lora.machine import device
from mlx_lora.machine.blas import blas_loaded


def collect() -> dict[str, Any]:
    """Facts for `doctor` and for the record: device, memory, BLAS, versions."""
    info = mx.device_info() if device.on_gpu() else {}
    return {
        "device": "gpu" if device.on_gpu() else "cpu",
        "name": str(info.get("device_name", "")) or _processor(),
        "memory_bytes": psutil.virtual_memory().total,
        "available_bytes": psutil.virtual_memory().available,
        "working_set_bytes": info.get("max_recommended_working_set_size"),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "openblas": blas_loaded() if sys.platform.startswith("linux") else None,
        "compiled_kernels": device.on_gpu() or _find_compiler() is not None,
    }


def _processor() -> str:
    return platform.processor() or platform.machine()


def _find_compiler() -> str | None:
    """MLX's CPU backend compiles fused kernels with g++ and falls back quietly without one."""
    return shutil.which("g++")
