"""A model's modules from its configuration alone: all shapes and dtypes, without weights.

MLX is lazy: the arrays of a new module are random numbers that haven't been computed yet. As long as nothing evaluates
them, a model of any size takes milliseconds and no memory. Its adapters, quantized layers and optimizer state have the
same shapes as those of the real model.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from safetensors import safe_open

from mlx_lora import files
from mlx_lora.errors import ModelError
from mlx_lora.models.config_faults import naming_settings
from mlx_lora.models.open import Model, check_architecture, open_model, weight_files
from mlx_lora.quant import nf4
from mlx_lora.quant.matmul import use_fast_multiply
from mlx_lora.quant.quantize import pack

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
HEADERS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Assumed dtype if the configuration names none: nearly every model is published in it.
USUAL = mx.bfloat16


def network(config: dict[str, Any], *, quantization: dict[str, Any] | None = None, gpu: bool) -> nn.Module:
    """The frozen model that `load` makes of this config.json, without weights; never evaluate its arrays.

    `quantization` is the result of `Quantize.complete`, for a base that is quantized on loading. On a CPU (not `gpu`),
    arrays that aren't quantized are float32. Raises ModelError for an architecture that mlx_lm doesn't have, and for a
    configuration that lacks a setting of its architecture.
    """
    inner = config.get("text_config")
    packed = any("quantization_config" in part for part in (config, inner) if isinstance(part, dict))
    if packed and not config.get("quantization"):
        raise ModelError("config.json: how this base is packed (quantization_config) is not known here")
    with files.refusing(ModelError, "config.json describes no model"):
        model = _new_model(config)
    model.set_dtype(stored_dtype(config))
    if config.get("quantization"):
        try:
            pack(model, config["quantization"])
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ModelError(
                f"config.json: its quantization can't be followed: {error} ({type(error).__name__})",
                hint="mlx_lm writes bits and group_size there, and for single layers the same by path",
            ) from None
    elif quantization:
        pack(model, quantization)
    if not gpu:
        use_fast_multiply(model)
    model.freeze()
    return model


def summary(model: Model) -> dict[str, Any]:
    """config.json of a model; if it names no dtype, the float dtype of most of the weights is added.

    Raises ModelError as `read_config` does. The directory needs no weight files.
    """
    opened = open_model(model)
    config, path = opened.config, opened.path
    if _configured_dtype(config) is not None:
        return config
    # nf4's scales are float32 in a model of any dtype, so they don't count
    float32_scales = nf4.SCALES if (config.get("quantization") or {}).get("mode") == "nf4" else ()
    sizes: dict[str, int] = {}
    for file in weight_files(path):
        if files.safetensors_fault(file) is None:
            with safe_open(file, framework="numpy") as tensors:
                for part in (tensors.get_slice(name) for name in tensors.keys() if not name.endswith(float32_scales)):
                    sizes[part.get_dtype()] = sizes.get(part.get_dtype(), 0) + math.prod(part.get_shape())
    floats = [kind for kind in sorted(sizes, key=lambda kind: -sizes[kind]) if kind in HEADERS]
    return config | ({"torch_dtype": HEADERS[floats[0]]} if floats else {})


def stored_dtype(config: dict[str, Any]) -> mx.Dtype:
    """The float dtype of a model's files according to its configuration."""
    return DTYPES.get(str(_configured_dtype(config)), USUAL)


def _configured_dtype(config: dict[str, Any]) -> Any:
    """The dtype's name in config.json, or None."""
    inner = config.get("text_config") or {}
    return next((part[key] for part in (config, inner) for key in ("torch_dtype", "dtype") if part.get(key)), None)


def _new_model(config: dict[str, Any]) -> nn.Module:
    """The model with lazy random weights."""
    model_class, arguments = check_architecture(config)
    with naming_settings(config):
        model: nn.Module = model_class(arguments.from_dict(config))
    if config.get("tie_word_embeddings", True) and hasattr(model, "sanitize"):
        # Without a tensor for the head, `sanitize` removes it in some models; others raise because tensors are missing.
        with suppress(Exception):
            model.sanitize({})
    return model
