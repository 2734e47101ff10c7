"""LoRA (arXiv 2106.09685): a frozen weight plus a trained product of two thin matrices.

    y = W₀x + s·B A x,  s = α/r   (eq. 3);  rsLoRA: s = α/√r (arXiv 2312.03732)

A starts random and B at zero, so the wrapped layer equals its base at the start, bit for bit. Arrays keep mlx-lm's
names and orientation: for a linear `lora_a` (in, r) and `lora_b` (r, out), so Δ = s·(lora_a lora_b)ᵀ.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import EMBEDDINGS, EXPERTS, AdapterLayer, Dropout, draw, layer_shape
from mlx_lora.config import Adapter


class LoRA(AdapterLayer):
    """What the three kinds of layers share. Call `LoRA.from_base` to get the right one."""

    def __init__(self, layer: nn.Module, config: Adapter, path: str):
        super().__init__()
        self.rank = config.rank_of(path)
        self.scale = config.scale_of(path)
        self.dropout = Dropout(config.dropout)

    @staticmethod
    def from_base(layer: nn.Module, config: Adapter, *, path: str, key: Any) -> LoRA:
        """Wrap a Linear, an Embedding or a SwitchLinear, quantized or not. `key` seeds A."""
        if isinstance(layer, EMBEDDINGS):
            return LoRAEmbedding(layer, config, path, key)
        if isinstance(layer, EXPERTS):
            return LoRASwitchLinear(layer, config, path, key)
        return LoRALinear(layer, config, path, key)

    @property
    def base(self) -> nn.Module:
        return self["embedding"] if "embedding" in self else self["linear"]

    def adapter_params(self) -> tuple[str, ...]:
        return ("lora_a", "lora_b")

    def _extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"


class LoRALinear(LoRA):
    """lora_a (in, r), lora_b (r, out); x (…, in) -> (…, out)."""

    def __init__(self, layer: nn.Module, config: Adapter, path: str, key: Any):
        super().__init__(layer, config, path)
        outputs, inputs = layer_shape(layer)
        self.linear = layer
        self.lora_a = draw(config, (inputs, self.rank), fan_in=inputs, rank=self.rank, key=key)
        self.lora_b = mx.zeros((self.rank, outputs))

    def __call__(self, x: mx.array) -> mx.array:
        z = self.dropout(x) @ self.lora_a.astype(x.dtype)
        return mx.addmm(self.linear(x), z, self.lora_b.astype(x.dtype), alpha=self.scale)

    def delta(self) -> mx.array:
        return self.scale * (self.lora_a @ self.lora_b).T


class LoRAEmbedding(LoRA):
    """lora_a (vocabulary, r), lora_b (r, dim); serves as output head too when embeddings are tied."""

    def __init__(self, layer: nn.Module, config: Adapter, path: str, key: Any):
        super().__init__(layer, config, path)
        vocabulary, dim = layer_shape(layer)
        self.embedding = layer
        self.lora_a = draw(config, (vocabulary, self.rank), fan_in=vocabulary, rank=self.rank, key=key)
        self.lora_b = mx.zeros((self.rank, dim))

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.embedding(tokens)
        z = self.dropout(self.lora_a[tokens] @ self.lora_b)
        return y + (self.scale * z).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        z = self.dropout(x) @ self.lora_b.T.astype(x.dtype)
        return mx.addmm(self.embedding.as_linear(x), z, self.lora_a.T.astype(x.dtype), alpha=self.scale)

    def delta(self) -> mx.array:
        return self.scale * (self.lora_a @ self.lora_b)


class LoRASwitchLinear(LoRA):
    """A factor pair per expert: lora_a (E, r, in), lora_b (E, out, r)."""

    def __init__(self, layer: nn.Module, config: Adapter, path: str, key: Any):
        super().__init__(layer, config, path)
        experts, outputs, inputs = layer_shape(layer)
        self.linear = layer
        self.lora_a = draw(config, (experts, self.rank, inputs), fan_in=inputs, rank=self.rank, key=key)
        self.lora_b = mx.zeros((experts, outputs, self.rank))

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        multiply = partial(mx.gather_mm, rhs_indices=indices, sorted_indices=sorted_indices)
        z = multiply(self.dropout(x), self.lora_a.swapaxes(-1, -2).astype(x.dtype))
        z = multiply(z, self.lora_b.swapaxes(-1, -2).astype(x.dtype))
        return self.linear(x, indices, sorted_indices=sorted_indices) + self.scale * z

    def delta(self) -> mx.array:
        return self.scale * (self.lora_b @ self.lora_a)
