"""A layer that is packed already goes into a file without a second loss, where both have the same numbers.

MLX's affine 4 bits are q·scale + bias, Q4_1's q·d + m with d and m in float16 for every 32 values. A group of 64 or
128 becomes several blocks with the same d and m.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

BLOCK = 32


def exactly(layer: nn.Module, kind: Kind) -> NDArray[np.uint8] | None:
    """A packed layer's weight as bytes (…, bytes of a row) of `kind`, rows in MLX's order; None where it has no such.

    The values that are read back are those of the layer, to the last bit.
    """
    if kind != Kind.Q4_1 or "scales" not in layer or layer.get("biases") is None or layer.mode != "affine":
        return None
    if layer.bits != 4 or layer.group_size % BLOCK:
        return None
    steps, offsets = (_halves(layer[name]) for name in ("scales", "biases"))
    if steps is None or offsets is None:
        return None
    pairs = np.array(layer["weight"]).view(np.uint8)  # two neighbours a byte, the first in its low bits
    values = np.stack([pairs & 0x0F, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], -1, BLOCK)
    packed = values[..., :16] | values[..., 16:] << 4  # values i and i + 16 of a block share a byte
    repeats = layer.group_size // BLOCK
    heads = [np.repeat(part, repeats, axis=-1)[..., None].view(np.uint8) for part in (steps, offsets)]
    blocks = np.concatenate([*heads, packed], axis=-1)
    return blocks.reshape(*blocks.shape[:-2], -1)


def _halves(array: mx.array) -> NDArray[np.float16] | None:
    """The array in float16, None where that changes a value."""
    values = np.array(array.astype(mx.float32))
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    return halves if np.array_equal(halves.astype(np.float32), values) else None
