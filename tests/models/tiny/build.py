"""Tiny random models of mlx_lm's modules, from their configurations."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def build(name: str, config: dict[str, Any], *, seed: int = 0) -> nn.Module:
    """A frozen float32 model in evaluation mode, its weights random and large enough that logits differ."""
    module = import_module(f"mlx_lm.models.{name}")
    mx.random.seed(seed)
    model: nn.Module = module.Model(module.ModelArgs.from_dict(dict(config)))
    noise = [
        (path, array + 0.1 * mx.random.normal(array.shape) if mx.issubdtype(array.dtype, mx.floating) else array)
        for path, array in tree_flatten(model.parameters())
    ]
    model.load_weights(noise)
    model.set_dtype(mx.float32)
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return model
