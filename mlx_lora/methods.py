"""The names a recipe may use, and where each is built: `module:class`, resolved only when needed.

The command line validates against this table without importing MLX. Adding a method is one file in `adapters/`
and one line here.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

METHODS: dict[str, str] = {
    "lora": "mlx_lora.adapters.lora:LoRA",
}

INITIALISATIONS: tuple[str, ...] = ("default", "gaussian")

# Bits per mode, and the group sizes MLX has kernels for; the first of each is the mode's own default.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}


def resolve(method: str) -> Any:
    """Import and return the class behind a method's name."""
    module, _, attribute = METHODS[method].partition(":")
    return getattr(import_module(module), attribute)
