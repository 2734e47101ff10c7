"""Grids of an earlier packing are found, and held without a second loss; weights that were never packed have none."""

from __future__ import annotations

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.quant.grid import grid_of, pack_on_grid

Kind = gguf.GGMLQuantizationType
WEIGHT = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)


def once_packed(kind: Kind) -> mx.array:
    return mx.array(gguf.quants.dequantize(gguf.quants.quantize(WEIGHT, kind), kind)).astype(mx.float16)


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q4_0, 4), (Kind.Q4_1, 4), (Kind.Q8_0, 8)])
def test_what_came_from_a_gguf_file_keeps_its_grid(kind: Kind, bits: int) -> None:
    weight = once_packed(kind)
    assert grid_of(weight, 8) == {"mode": "affine", "bits": bits, "group_size": 32}
    packed, scales, biases = pack_on_grid(weight, bits)
    restored = mx.dequantize(packed, *(a.astype(mx.float32) for a in (scales, biases)), group_size=32, bits=bits)
    away = mx.linalg.norm(restored - weight.astype(mx.float32)) / mx.linalg.norm(weight.astype(mx.float32))
    anew = mx.dequantize(*mx.quantize(weight, group_size=64, bits=bits), group_size=64, bits=bits)
    lost = mx.linalg.norm(anew.astype(mx.float32) - weight.astype(mx.float32)) / mx.linalg.norm(
        weight.astype(mx.float32)
    )
    assert away.item() < 6e-4 and lost.item() > 5 * away.item()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_weights_that_were_never_packed_have_no_grid(dtype: mx.Dtype) -> None:
    assert grid_of(mx.array(WEIGHT).astype(dtype), 4) is None


def test_a_grid_wider_than_what_is_asked_for_is_not_kept() -> None:
    assert grid_of(once_packed(Kind.Q8_0), 6) is None and grid_of(once_packed(Kind.Q4_0), 3) is None


def test_zeros_have_no_grid_and_rows_of_zeros_are_on_every_one() -> None:
    assert grid_of(mx.zeros((4, 64), mx.float16), 8) is None
    weight = mx.concatenate([once_packed(Kind.Q4_1), mx.zeros((3, 256), mx.float16)])
    assert grid_of(weight, 4) is not None
    packed, scales, biases = pack_on_grid(weight, 4)
    assert not mx.dequantize(packed, scales, biases, group_size=32, bits=4)[-3:].any().item()
