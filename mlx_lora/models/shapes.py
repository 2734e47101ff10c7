"""A model's modules from its configuration alone: every shape and dtype, and not one weight.

MLX is lazy: the arrays of a module that was just made are descriptions of random numbers that nobody has drawn yet.
As long as nothing here evaluates one, a model of any size costs some milliseconds and no memory, and its adapters, its
packed layers and its optimizer's state have their true shapes. Knows nothing about what shapes cost.
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
# What nearly every model is published in, where its configuration doesn't say.
USUAL = mx.bfloat16


def network(config: dict[str, Any], *, quantization: dict[str, Any] | None = None, gpu: bool) -> nn.Module:
    """The frozen model that `load` makes of this config.json, without weights; never evaluate its arrays.

    `quantization` is what `Quantize.complete` gives, for a base that is packed on loading. Where it computes on a CPU,
    what isn't packed is float32. Raises ModelError for an architecture that mlx_lm doesn't have, and for a
    configuration that lacks what its architecture needs.
    """
    inner = config.get("text_config")
    packed = any("quantization_config" in part for part in (config, inner) if isinstance(part, dict))
    if packed and not config.get("quantization"):
        raise ModelError("config.json: how this base is packed (quantization_config) is not known here")
    with files.refusing(ModelError, "config.json describes no model"):
        model = _bare(config)
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
    """config.json of a model, with the float dtype that most of its files' bytes have where it says none.

    Raises ModelError as `read_config` does; a directory without weights is as good as one with them.
    """
    opened = open_model(model)
    config, path = opened.config, opened.path
    if _named(config) is not None:
        return config
    # those of nf4 are float32 in a model of any dtype
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
    """The float dtype of a model's files, as its configuration has it."""
    return DTYPES.get(str(_named(config)), USUAL)


def _named(config: dict[str, Any]) -> Any:
    inner = config.get("text_config") or {}
    return next((part[key] for part in (config, inner) for key in ("torch_dtype", "dtype") if part.get(key)), None)


def _bare(config: dict[str, Any]) -> nn.Module:
    model_class, arguments = check_architecture(config)
    with naming_settings(config):
        model: nn.Module = model_class(arguments.from_dict(config))
    if config.get("tie_word_embeddings", True) and hasattr(model, "sanitize"):
        with suppress(Exception):  # some drop a head of their own where the files have none; others want every tensor
            model.sanitize({})
    return model
