"""BitFit: only biases train (arXiv 2106.10199; a baseline of the LoRA paper, 2106.09685 §5.1).

    y = W₀x + b + shift

A layer without a bias gets one. `shift` starts at zero, so a new adapter changes no bit. The base's bias is frozen. No
weight changes, so a packed base is merged without requantizing.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import EMBEDDINGS, EXPERTS, AdapterLayer, layer_shape
from mlx_lora.config import Adapter
from mlx_lora.models.layers import plain_layer
from mlx_lora.quant.matmul import like
from mlx_lora.quant.quantize import dequantize_layer


class BitFit(AdapterLayer):
    """shift (out,), or (experts, out); float32."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.linear = layer
        self.shift = mx.zeros(layer_shape(layer)[:-1])

    @staticmethod
    def from_base(layer: nn.Module, config: Adapter, *, path: str, key: Any, shared: Any = None) -> BitFit:
        """Wrap a Linear or a SwitchLinear, quantized or not. Nothing here is random."""
        return BitFit(layer)

    @staticmethod
    def refusal(layer: nn.Module, config: Adapter, path: str) -> str | None:
        if isinstance(layer, EMBEDDINGS):
            return f"{path} is an embedding and has no bias; linear layers have, or method lora serves embeddings"
        return AdapterLayer.refusal(layer, config, path)

    @property
    def base(self) -> nn.Module:
        return self["linear"]

    def adapter_params(self) -> tuple[str, ...]:
        return ("shift",)

    def __call__(self, x: mx.array, *indices: mx.array, **sorting: bool) -> mx.array:
        y = self.linear(x, *indices, **sorting)
        shift = mx.expand_dims(self.shift[indices[0]], -2) if isinstance(self.base, EXPERTS) else self.shift
        return y + shift.astype(y.dtype)

    def delta(self) -> mx.array:
        """Zero: no weight changes."""
        return mx.zeros(layer_shape(self.base))

    def fuse(self) -> nn.Module:
        """A plain layer with the shifted bias, in float32."""
        fused = plain_layer(self.base, dequantize_layer(self.base, mx.float32))
        fused["bias"] = self._bias()
        return fused

    def fuse_packed(self) -> nn.Module | None:
        """The packed base with the shifted bias and the same packed weight; None over a plain base.

        The bias keeps its dtype. A new bias has the scales' dtype, or float32 where the scales are integers.
        """
        if "scales" not in self.base:
            return None
        fused: nn.Module = like(self.base, type(self.base))
        dtype = self.base["bias" if "bias" in self.base else "scales"].dtype
        fused["bias"] = self._bias().astype(dtype if mx.issubdtype(dtype, mx.floating) else mx.float32)
        return fused

    def _bias(self) -> mx.array:
        return self.base["bias"].astype(mx.float32) + self.shift if "bias" in self.base else self.shift
