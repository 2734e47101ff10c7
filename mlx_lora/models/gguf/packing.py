"""Quantized blocks of a GGUF file in MLX's packed form, without dequantizing them.

Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 have blocks of 32 values d·q + m. That is MLX's affine mode in groups of 32, with the
file's own float16 numbers as scales and biases (Q4_0: m = -8·d; Q5_0: m = -16·d; Q8_0: q + 128 in 8 bits and
m = -128·d). MXFP4 is MLX's mode of that name: 32 values in E2M1 and one power of two in 8 bits.

Q4_K and Q5_K have the same form in groups of 32, but the scale of a group is the product of a float16 and of 6 bits. It
is rounded to float16, so every value changes by about as much as if it became float16 itself.

In GGUF a byte of 4-bit values holds values from the two halves of a block. In MLX, values follow each other from the
lowest bit of a row's first byte on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Kind

from mlx_lora.errors import ModelError
from mlx_lora.models.gguf.tensors import Array

GROUP = 32


@dataclass(frozen=True)
class Form:
    """MLX's form of a matrix in groups of 32; `exact` if no value changes."""

    bits: int
    mode: str = "affine"
    exact: bool = True

    @property
    def settings(self) -> dict[str, Any]:
        """The entry of config.json's `quantization`."""
        return {"group_size": GROUP, "bits": self.bits, "mode": self.mode}


FORMS = {
    Kind.Q4_0: Form(4), Kind.Q4_1: Form(4), Kind.Q5_0: Form(5), Kind.Q5_1: Form(5), Kind.Q8_0: Form(8),
    Kind.MXFP4: Form(4, "mxfp4"), Kind.Q4_K: Form(4, exact=False), Kind.Q5_K: Form(5, exact=False),
}  # fmt: skip
# An exponent of 254 or 255 is infinity or not a number in some programs; values above 2^126 are damage anyway.
_MOST_EXPONENT = 253


@np.errstate(over="ignore", invalid="ignore")  # values that aren't finite are refused below
def pack(name: str, data: Array, kind: Kind) -> dict[str, mx.array]:
    """MLX's `weight` (uint32), `scales` and, in the affine mode, `biases` of (…, bytes) in blocks of a type in FORMS.

    Scales and biases are float16 (uint8 powers of two for MXFP4). Raises ModelError if one is not finite.
    """
    blocks = np.ascontiguousarray(data).reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    shape = (*data.shape[:-1], -1)
    if kind == Kind.MXFP4:
        if (blocks[:, 0] > _MOST_EXPONENT).any():
            raise ModelError(f"{name} has infinite values, or is damaged")
        packed = {"weight": _joined(_nibbles(blocks[:, 1:]), 4), "scales": blocks[:, 0]}
        return {key: mx.array(np.ascontiguousarray(values).reshape(shape)) for key, values in packed.items()}
    values, scales, biases = _super_blocks(blocks, kind) if kind in (Kind.Q4_K, Kind.Q5_K) else _blocks(blocks, kind)
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        raise ModelError(f"{name} goes beyond float16, or is damaged", hint="--dtype float32")
    packed = {"weight": _joined(values, FORMS[kind].bits), "scales": scales, "biases": biases}
    return {key: mx.array(np.ascontiguousarray(values).reshape(shape)) for key, values in packed.items()}


def _blocks(blocks: Array, kind: Kind) -> tuple[Array, Array, Array]:
    """(values (n, 32) uint8, scales (n,), biases (n,) float16) of blocks of 32 values."""
    scales = _float16(blocks[:, :2])
    if kind == Kind.Q8_0:
        return blocks[:, 2:] ^ 0x80, scales, scales * np.float16(-128)
    values = _nibbles(blocks[:, -16:])
    if kind in (Kind.Q5_0, Kind.Q5_1):
        values |= np.unpackbits(blocks[:, -20:-16], axis=-1, bitorder="little") << 4
    if kind in (Kind.Q4_1, Kind.Q5_1):
        return values, scales, _float16(blocks[:, 2:4])
    return values, scales, scales * np.float16(-8 if kind == Kind.Q4_0 else -16)


def _super_blocks(blocks: Array, kind: Kind) -> tuple[Array, Array, Array]:
    """(values (n, 8, 32) uint8, scales (n, 8), biases (n, 8) float16) of blocks of 256 values in 8 groups."""
    scale, minimum = (_float16(blocks[:, at : at + 2])[:, None].astype(np.float32) for at in (0, 2))
    low, middle, high = (blocks[:, at : at + 4] for at in (4, 8, 12))
    # 6-bit factors: the first four of each kind in a byte, the last four in 4 bits of `high` and the bytes' spare bits.
    factors = np.concatenate([low & 0x3F, (high & 0x0F) | (low >> 6 << 4)], axis=-1)
    minimums = np.concatenate([middle & 0x3F, (high >> 4) | (middle >> 6 << 4)], axis=-1)
    halves = blocks[:, -128:].reshape(-1, 4, 32)
    values = np.stack([halves & 0x0F, halves >> 4], axis=2).reshape(-1, 8, 32)
    if kind == Kind.Q5_K:
        fifth = blocks[:, 16:48, None] >> np.arange(8, dtype=np.uint8) & 1
        values |= fifth.swapaxes(1, 2) << 4
    return values, (scale * factors).astype(np.float16), (-minimum * minimums).astype(np.float16)


def _float16(data: Array) -> Array:
    return np.ascontiguousarray(data).view("<f2")[..., 0]


def _nibbles(data: Array) -> Array:
    """The 32 values of each block of 16 bytes: low halves first."""
    return np.concatenate([data & 0x0F, data >> 4], axis=-1)


def _joined(values: Array, bits: int) -> Array:
    """Values of `bits` bits (…, 32) uint8, one after the other from the lowest bit on, as uint32."""
    at_once = 8 // bits if 8 % bits == 0 else 8  # values that fill whole bytes
    parts = np.ascontiguousarray(values).reshape(-1, at_once)
    parts = parts if at_once * bits == 8 else parts.astype("<u8")
    joined = np.zeros(len(parts), parts.dtype)
    for place in range(at_once):
        joined |= parts[:, place] << parts.dtype.type(bits * place)
    return np.ascontiguousarray(joined[:, None].view(np.uint8)[:, : at_once * bits // 8]).reshape(-1).view("<u4")
