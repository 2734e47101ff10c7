"""LoRA on a convolution: a convolution to r channels with the base's kernel size, then a pointwise convolution.

    y = W₀ * x + s·B (A * x),  s = α/r   (arXiv 2106.09685, eq. 3, with the weight seen as a matrix of its patches)

A (r, k·in) multiplies each patch of the input, and B (out, r) multiplies the result. As a matrix, the update therefore
has rank r, and it merges into the kernel. Conv1d and Conv2d are supported; grouped convolutions aren't, since each
group would need its own factors.
"""

from __future__ import annotations

from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import draw
from mlx_lora.adapters.lora import LoRA
from mlx_lora.config import Adapter


def refusal(layer: nn.Module, config: Adapter, path: str) -> str | None:
    """Why LoRA can't wrap a convolution and what works instead, or None."""
    if layer.groups > 1:
        return f"{path} is a {type(layer).__name__} in {layer.groups} groups; one without groups works"
    if config.init not in ("default", "gaussian"):
        return f"init {config.init} is for linear layers, and {path} is a {type(layer).__name__}; init default works"
    return None


class LoRAConv(LoRA):
    """lora_a (r, *kernel, in), lora_b (r, out); x (n, *positions, in) -> (n, *positions, out), channels last."""

    def __init__(self, layer: nn.Module, config: Adapter, path: str, key: Any):
        super().__init__(layer, config, path)
        outputs, *patch = layer["weight"].shape
        self.convolution = layer
        self.lora_a = draw(config, (self.rank, *patch), fan_in=prod(patch), rank=self.rank, key=key)
        self.lora_b = mx.zeros((self.rank, outputs))

    @property
    def base(self) -> nn.Module:
        return self["convolution"]

    def __call__(self, x: mx.array) -> mx.array:
        base = self.base
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        z = mx.conv_general(self.dropout(x), a, base.stride, base.padding, base.dilation)
        return mx.addmm(base(x), z, b, alpha=self.scale)

    def delta(self) -> mx.array:
        return self.scale * mx.tensordot(self.lora_b.T, self.lora_a, axes=1)

    def fuse(self) -> nn.Module:
        """A convolution with weight W₀ + ΔW in float32."""
        base = self.base
        settings = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation, "bias": False}
        fused: nn.Module = type(base)(1, 1, 1, **settings)
        fused["weight"] = base["weight"].astype(mx.float32) + self.delta()
        if "bias" in base:
            fused["bias"] = base["bias"]
        return fused
