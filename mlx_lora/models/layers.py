"""Layers put into a model, packed ones taken back to plain ones, and layers whose memory is given back."""

from __future__ import annotations

from collections.abc import Container

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_lora.errors import ModelError
from mlx_lora.models import QuantizedSwitchLinear, SwitchLinear
from mlx_lora.models.load import LoadedModel
from mlx_lora.quant import nf4
from mlx_lora.quant.quantize import dequantize_layer


def half(dtype: mx.Dtype) -> mx.Dtype:
    """`dtype` if it is half precision, else float16."""
    return dtype if dtype in (mx.float16, mx.bfloat16) else mx.float16


def dequantize_model(loaded: LoadedModel, dtype: mx.Dtype = mx.float16, *, keep: Container[str] = ()) -> None:
    """Take every packed layer but those at the paths of `keep` back to a plain one in `dtype`, in place and lazily."""
    replaced = {
        path: plain_layer(module, dequantize_layer(module, dtype))
        for path, module in loaded.model.named_modules()
        if "scales" in module and path not in keep
    }
    set_modules(loaded.model, replaced)
    for key in ("quantization", "quantization_config"):
        loaded.config.pop(key, None)


def plain_layer(layer: nn.Module, weight: mx.array) -> nn.Module:
    """An unquantized layer of the same kind as `layer` around `weight`.

    Raises ModelError for a layer that is no Linear, Embedding or SwitchLinear, packed or not.
    """
    if isinstance(layer, nn.Embedding | nn.QuantizedEmbedding):
        plain: nn.Module = nn.Embedding(1, 1)
    elif isinstance(layer, SwitchLinear | QuantizedSwitchLinear | nf4.NF4SwitchLinear):
        plain = SwitchLinear(1, 1, 1, bias=False)
    elif isinstance(layer, nn.Linear | nn.QuantizedLinear):
        plain = nn.Linear(1, 1, bias=False)
    else:
        raise ModelError(f"a layer of type {type(layer).__name__} can't be unpacked here")
    plain["weight"] = weight
    if "bias" in layer:
        plain["bias"] = layer["bias"]
    return plain


def set_modules(model: nn.Module, replaced: dict[str, nn.Module]) -> None:
    """Put modules at dotted paths; an empty mapping changes nothing."""
    if replaced:
        model.update_modules(tree_unflatten(list(replaced.items())))


def release(module: nn.Module) -> None:
    """Let go of every array of a module and of those inside it; it can't run afterwards.

    Arrays that somebody else refers to stay alive there.
    """
    for inner in module.modules():
        for name, value in inner.items():
            if isinstance(value, mx.array):
                inner[name] = mx.zeros((0,), value.dtype)
