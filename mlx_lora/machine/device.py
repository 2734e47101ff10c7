"""Which device MLX computes on, and what follows from it.

Decisions are made from the device MLX uses, never from the platform's name. Nothing here imports MLX at module level:
the BLAS has to be loaded before (`machine.blas`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx


def on_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal for the users, the CPU backend in tests)."""
    import mlx.core as mx

    return bool(mx.default_device().type == mx.gpu)


def activation_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The dtype to compute in: the model's own on a GPU, float32 on a CPU, where halves are emulated."""
    import mlx.core as mx

    return stored if on_gpu() else mx.float32
