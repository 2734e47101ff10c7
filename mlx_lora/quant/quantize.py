"""Quantize a loaded model in place: one walk with a predicate, and an account of what it cost.

Serves MLX's own modes (affine, mxfp4, nvfp4, mxfp8) and nf4. Embeddings and the output head are quantized too: in small
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
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.errors import ModelError
from mlx_lora.methods import MODES
from mlx_lora.quant import nf4
from mlx_lora.quant.matmul import dequantize

# Modes whose packed layers compute in the activations' own dtype.
FLOAT_SCALES = ("affine", nf4.MODE)


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

    For nf4 there is `double_quant` too. Layers whose input dimension the group size doesn't divide are left as they
    are and named in `left_alone`. Raises ModelError when nothing can be quantized.
    """
    if is_quantized(model):
        raise ModelError("the model is quantized already", hint="dequantize it first, or use it as it is")
    chosen, left_alone = choices(model, settings)
    if not chosen:
        raise ModelError(f"no layer can be quantized with group size {settings['group_size']}")
    leaves, error, norm = _leaves(model), 0.0, 0.0
    for path, its in chosen.items():
        layer = leaves.pop(path)
        packed = packed_layer(layer, its)
        layer_error, layer_norm = _squared_error(layer, packed)
        error, norm = error + layer_error, norm + layer_norm
        model.update_modules(tree_unflatten([(path, packed)]))
        on_layer(path)
    if settings["mode"] not in FLOAT_SCALES:  # these unpack to bfloat16: beside float16 activations would be float32
        model.apply(lambda array: array.astype(mx.bfloat16) if array.dtype == mx.float16 else array)
    mx.eval(model.parameters())
    size = model_bytes(model)
    return Quantized(
        settings=dict(settings),
        bits_per_weight=8 * size / parameter_count(model),
        bytes=size,
        relative_error=math.sqrt(error / norm) if norm else 0.0,
        config={**settings, **{path: its for path, its in chosen.items() if its is not settings}},
        left_alone=left_alone,
    )


def choices(
    model: nn.Module, settings: dict[str, Any], of_layers: dict[str, Any] | None = None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """How each layer of `model` is to be packed, by path, and the paths of those that could be but aren't.

    A layer's setting in `of_layers` comes first (`{bits, group_size, …}`, or False), then the model's own
    `quant_predicate` (mlx-lm), which keeps routers at higher precision for example, then `settings`. What the group
    size doesn't divide, or the mode doesn't serve, is left alone.
    """
    own = getattr(model, "quant_predicate", None)
    chosen, left_alone = {}, []
    for path, layer in _leaves(model).items():
        if not hasattr(layer, "to_quantized"):
            continue
        choice = (of_layers or {}).get(path, own(path, layer) if own is not None else True)
        # A model's own choice names bits and group size only; the mode it means is affine.
        its = {"mode": "affine", **choice} if isinstance(choice, dict) else settings
        served = its["mode"] != nf4.MODE or nf4.class_for(layer) is not None
        if choice and served and not layer.weight.shape[-1] % its["group_size"]:
            chosen[path] = its
        else:
            left_alone.append(path)
    return chosen, left_alone


def pack(model: nn.Module, stored: dict[str, Any]) -> None:
    """Give `model` the packed layers that `stored`, config.json's `quantization`, describes; nothing is evaluated.

    Raises KeyError, TypeError or ValueError for a description that can't be followed.
    """
    settings = {"mode": stored.get("mode", "affine"), "bits": stored["bits"], "group_size": stored["group_size"]}
    if settings["mode"] == nf4.MODE:
        settings["double_quant"] = stored.get("double_quant", False)
    of_layers = {path: value for path, value in stored.items() if isinstance(value, dict | bool)}
    chosen, _ = choices(model, settings, of_layers)
    leaves = _leaves(model)
    packed = {path: packed_layer(leaves[path], its) for path, its in chosen.items()}
    model.update_modules(tree_unflatten(list(packed.items())))


def packed_layer(layer: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """The packed form of a Linear, Embedding or SwitchLinear, by `{mode, bits, group_size}`; not evaluated.

    Raises ValueError for settings that the mode doesn't have, or a layer that nf4 doesn't serve.
    """
    if settings["mode"] != nf4.MODE:
        return layer.to_quantized(**settings)  # type: ignore[no-any-return]
    make, (bits, groups) = nf4.class_for(layer), MODES[nf4.MODE]
    if make is None or settings["bits"] not in bits or settings["group_size"] not in groups:
        raise ValueError(f"nf4 doesn't serve a {type(layer).__name__} with {settings}")
    return make(layer, settings["group_size"], settings.get("double_quant", False))


def _leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The modules without children, by path."""
    return dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))


def _squared_error(layer: nn.Module, packed: nn.Module) -> tuple[float, float]:
    weight = layer["weight"].astype(mx.float32)
    restored = dequantize_layer(packed, mx.float32)
    pair = mx.stack([mx.square(weight - restored).sum(), mx.square(weight).sum()])
    error, norm = np.array(pair).tolist()
    return error, norm


def dequantize_layer(layer: nn.Module, dtype: mx.Dtype) -> mx.array:
    """A layer's weight as a float array of shape (out, in), or (experts, out, in), in `dtype`; packed or not.

    Scales are cast before they are used: with half-precision scales MLX computes in half whatever dtype is asked for.
    """
    if "scales" not in layer:
        return layer["weight"].astype(dtype)
    if layer.mode == nf4.MODE:
        return nf4.unpack(layer.arrays()).astype(dtype)
    if layer.get("global_scale") is not None:
        raise ModelError("a layer has nvfp4 weights with a scale per expert, which can't be unpacked here")
    scales, biases = layer["scales"], layer.get("biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return dequantize(layer["weight"], scales, biases, **settings).astype(dtype)


def layer_settings(layer: nn.Module) -> dict[str, Any] | None:
    """`{mode, bits, group_size}` of a packed layer, for nf4 with `double_quant`, or None."""
    if "scales" not in layer:
        return None
    settings = {"mode": layer.mode, "bits": layer.bits, "group_size": layer.group_size}
    return settings | ({"double_quant": layer.double_quant} if layer.mode == nf4.MODE else {})


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
        elif key not in (*nf4.SCALES, "biases"):
            count += array.size
    return count
