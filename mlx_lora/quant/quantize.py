"""Quantize a loaded model in place: one walk with a predicate, and an account of what it cost.

Serves MLX's own modes (affine, mxfp4, nvfp4, mxfp8). Embeddings and the output head are quantized too: in small
models they are most of the weights. Knows nothing about files; `models.load` reads and writes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora.errors import ModelError
from mlx_lora.quant.matmul import dequantize


@dataclass
class Quantized:
    """What quantizing did. Sizes in bytes; `relative_error` is ‖W − Q(W)‖ / ‖W‖ over all quantized weights."""

    settings: dict[str, Any]
    bits_per_weight: float
    bytes: int
    relative_error: float
    config: dict[str, Any]
    left_alone: list[str] = field(default_factory=list)


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of `model` is stored in packed form."""
    return any("scales" in module for _, module in model.named_modules())


def quantize(
    model: nn.Module, settings: dict[str, Any], *, on_layer: Callable[[str], None] = lambda path: None
) -> Quantized:
    """Replace every layer that can be quantized by its packed form; `settings` is `{mode, bits, group_size}`.

    Layers whose input dimension the group size doesn't divide are left as they are and named in `left_alone`. A
    model's own `quant_predicate` (mlx-lm) is followed: it keeps routers at higher precision, for example.
    Raises ModelError when nothing can be quantized.
    """
    if is_quantized(model):
        raise ModelError("the model is quantized already", hint="dequantize it first, or use it as it is")
    own_predicate = getattr(model, "quant_predicate", None)
    per_layer: dict[str, Any] = {}
    left_alone: list[str] = []
    error, norm = 0.0, 0.0

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        nonlocal error, norm
        if not hasattr(module, "to_quantized"):
            return False
        choice = own_predicate(path, module) if own_predicate is not None else True
        # A model's own choice names bits and group size only; the mode it means is affine.
        chosen = {"mode": "affine", **choice} if isinstance(choice, dict) else settings
        if not choice or module.weight.shape[-1] % chosen["group_size"]:
            left_alone.append(path)
            return False
        if chosen is not settings:
            per_layer[path] = chosen
        layer_error, layer_norm = _squared_error(module.weight, chosen)
        error, norm = error + layer_error, norm + layer_norm
        on_layer(path)
        return dict(chosen)

    nn.quantize(model, class_predicate=predicate)
    if not norm:
        raise ModelError(f"no layer can be quantized with group size {settings['group_size']}")
    if settings["mode"] != "affine":  # these unpack to bfloat16: beside float16 every activation would be float32
        model.apply(lambda array: array.astype(mx.bfloat16) if array.dtype == mx.float16 else array)
    mx.eval(model.parameters())
    size = model_bytes(model)
    return Quantized(
        settings=dict(settings),
        bits_per_weight=8 * size / parameter_count(model),
        bytes=size,
        relative_error=math.sqrt(error / norm),
        config={**settings, **per_layer},
        left_alone=left_alone,
    )


def _squared_error(weight: mx.array, settings: dict[str, Any]) -> tuple[float, float]:
    packed, scales, *biases = mx.quantize(weight, **settings)
    if biases:
        scales, biases = scales.astype(mx.float32), [biases[0].astype(mx.float32)]
    restored = dequantize(packed, scales, biases[0] if biases else None, **settings)
    weight = weight.astype(mx.float32)
    pair = mx.stack([mx.square(weight - restored).sum(), mx.square(weight).sum()])
    error, norm = np.array(pair).tolist()
    return error, norm


def dequantize_layer(layer: nn.Module, dtype: mx.Dtype) -> mx.array:
    """A layer's weight as a float array of shape (out, in), or (experts, out, in), in `dtype`; packed or not.

    Scales are cast before they are used: with half-precision scales MLX computes in half whatever dtype is asked for.
    """
    if "scales" not in layer:
        return layer["weight"].astype(dtype)
    if layer.get("global_scale") is not None:
        raise ModelError("a layer has nvfp4 weights with a scale per expert, which can't be unpacked here")
    scales, biases = layer["scales"], layer.get("biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return dequantize(layer["weight"], scales, biases, **settings).astype(dtype)


def layer_settings(layer: nn.Module) -> dict[str, Any] | None:
    """`{mode, bits, group_size}` of a packed layer, or None."""
    if "scales" not in layer:
        return None
    return {"mode": layer.mode, "bits": layer.bits, "group_size": layer.group_size}


def named_arrays(model: nn.Module) -> list[tuple[str, mx.array]]:
    """All parameters of a model by their full names."""
    return cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, packed ones as packed."""
    return sum(array.nbytes for _, array in named_arrays(model))


def parameter_count(model: nn.Module) -> int:
    """Number of weights, a packed weight counted as what it stands for; scales and zero-points don't count."""
    packed = {path: module for path, module in model.named_modules() if "scales" in module}
    count = 0
    for name, array in named_arrays(model):
        path, _, key = name.rpartition(".")
        if path not in packed:
            count += array.size
        elif key == "weight":
            # packed · 32 // bits: the order matters for 3, 5 and 6 bits.
            count += array.size * 32 // packed[path].bits
        elif key not in ("scales", "biases"):
            count += array.size
    return count
