"""What a step keeps for its backward pass, by arithmetic, and whether that fits this machine.

    kept = positions · Σ over the linear layers at and above the lowest adapted one of (inputs + outputs)

That is what attention, gated activations and adapters leave when each keeps only its inputs (see `models.lean`). It
decides `grad_checkpoint: auto`; it isn't a forecast of the peak.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import psutil

from mlx_lora import device
from mlx_lora.adapters.base import EXPERTS, LINEARS, layer_shape

# The share of the free memory that activations may take: the loss, the optimizer and other programs need the rest.
SHARE = 0.7


def kept_bytes(layers: list[nn.Module], positions: int, dtype: mx.Dtype) -> int:
    """Bytes of activations that `layers` keep for the backward pass of a batch with so many positions.

    Of a layer of experts one expert a position is counted.
    """
    linears = [module for layer in layers for module in layer.modules() if isinstance(module, LINEARS + EXPERTS)]
    return positions * int(dtype.size) * sum(sum(layer_shape(linear)[-2:]) for linear in linears)


def free_bytes() -> int:
    """Memory that a step may take on top of what is in use: of the GPU's working set, or of the machine's memory."""
    if device.on_gpu():
        return int(mx.device_info()["max_recommended_working_set_size"]) - int(mx.get_active_memory())
    return int(psutil.virtual_memory().available)
