"""LoRA (arXiv 2106.09685): a frozen weight plus a trained product of two thin matrices.

    y = W₀x + s·B A x,  s = α/r   (eq. 3);  rsLoRA: s = α/√r (arXiv 2312.03732)

A starts random and B at zero, so the wrapped layer equals its base at the start, bit for bit; `adapters.init` has other
initial values. Arrays keep mlx-lm's names and orientation: for a linear `lora_a` (in, r) and `lora_b` (r, out), so
Δ = s·(lora_a lora_b)ᵀ.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import CONVOLUTIONS, LINEARS, AdapterLayer, by_kind, draw, layer_shape
from mlx_lora.adapters.init import FROM_WEIGHT, from_weight
from mlx_lora.config import Adapter
from mlx_lora.models.trunk.dropout import Dropout


class LoRA(AdapterLayer, abstract=True):
    """The common base of the classes for each kind of layer. `LoRA.from_base` chooses the class for a layer."""

    def __init__(self, layer: nn.Module, config: Adapter, path: str):
        super().__init__()
        self.rank = config.rank_of(path)
        self.scale = config.scale_of(path)
        self.dropout = Dropout(config.dropout)

    @staticmethod
    def from_base(layer: nn.Module, config: Adapter, *, path: str, key: Any, shared: Any = None) -> LoRA:
        """Wrap a Linear, an Embedding or a SwitchLinear, quantized or not, or a convolution. `key` seeds A."""
        from mlx_lora.adapters import lora_conv  # imported here, because it derives from LoRA

        if isinstance(layer, CONVOLUTIONS):
            return lora_conv.LoRAConv(layer, config, path, key)
        kind = by_kind(layer, LoRALinear, LoRAEmbedding, LoRASwitchLinear)
        return kind(layer, config, path, key)  # type: ignore[no-any-return]

    @staticmethod
    def refusal(layer: nn.Module, config: Adapter, path: str) -> str | None:
        """Why the method can't wrap `layer` and what works instead, or None."""
        from mlx_lora.adapters import lora_conv

        if isinstance(layer, CONVOLUTIONS):
            return lora_conv.refusal(layer, config, path)
        if reason := AdapterLayer.refusal(layer, config, path):
            return reason
        alternative = "choose adapter.init default, gaussian, pissa or olora"
        if config.init == "eva" and not isinstance(layer, LINEARS):
            return (
                f"init eva looks at activations that enter a linear layer, and {path} is a {type(layer).__name__}; "
                f"leave it out of adapter.targets, or {alternative}"
            )
        if config.init == "loftq" and mx.issubdtype(layer["weight"].dtype, mx.floating):
            return (
                f"init loftq makes up for what packing loses, and {path} isn't packed; "
                f"quantize: in the recipe packs it, or {alternative}"
            )
        return None

    @property
    def base(self) -> nn.Module:
        return self["embedding"] if "embedding" in self else self["linear"]

    def adapter_params(self) -> tuple[str, ...]:
        return ("lora_a", "lora_b")

    def start(self, config: Adapter, key: Any) -> None:
        """For init pissa and olora, set the factors from the weight; first_a and first_b are A₀ and B₀, frozen."""
        if config.init in FROM_WEIGHT:
            self.set_factors(*from_weight(self.base, config.init, self.rank, self.scale))
            self.first_a, self.first_b = self.lora_a, self.lora_b
            self.freeze(keys=["first_a", "first_b"], recurse=False)

    def set_factors(self, left: mx.array, right: mx.array) -> None:
        """Set the factors so that B A is left (…, m, r) times right (…, r, n), oriented as the weight (…, m, n)."""
        self.lora_a, self.lora_b = right, left

    def factors(self) -> tuple[mx.array, mx.array]:
        """The pair whose product is the update without its scale, oriented like lora_a and lora_b.

        After PiSSA or OLoRA its rank is 2r: BA − B₀A₀ = B(A − A₀) + (B − B₀)A₀.
        """
        if "first_a" not in self:
            return self.lora_a, self.lora_b
        a = mx.concatenate([self.lora_a - self.first_a, self.first_a], axis=1)
        b = mx.concatenate([self.lora_b, self.lora_b - self.first_b], axis=0 if self.lora_b.ndim == 2 else 2)
        return a, b

    def stored_arrays(self) -> dict[str, mx.array]:
        """The update's factors over the original base, as any LoRA loader expects; of rank 2r after PiSSA or OLoRA."""
        a, b = self.factors()
        return {**self.adapter_arrays(), "lora_a": a, "lora_b": b}

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
        self.start(config, key)

    def set_factors(self, left: mx.array, right: mx.array) -> None:
        self.lora_a, self.lora_b = right.T, left.T

    def __call__(self, x: mx.array) -> mx.array:
        a, b = self.factors()
        return mx.addmm(self.linear(x), self.dropout(x) @ a.astype(x.dtype), b.astype(x.dtype), alpha=self.scale)

    def delta(self) -> mx.array:
        a, b = self.factors()
        return self.scale * (a @ b).T


class LoRAEmbedding(LoRA):
    """lora_a (vocabulary, r), lora_b (r, dim); also the output head when embeddings are tied."""

    def __init__(self, layer: nn.Module, config: Adapter, path: str, key: Any):
        super().__init__(layer, config, path)
        vocabulary, dim = layer_shape(layer)
        self.embedding = layer
        self.lora_a = draw(config, (vocabulary, self.rank), fan_in=vocabulary, rank=self.rank, key=key)
        self.lora_b = mx.zeros((self.rank, dim))
        self.start(config, key)

    def set_factors(self, left: mx.array, right: mx.array) -> None:
        self.lora_a, self.lora_b = left, right

    def __call__(self, tokens: mx.array) -> mx.array:
        a, b = self.factors()
        y = self.embedding(tokens)
        return y + (self.scale * self.dropout(a[tokens] @ b)).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        a, b = self.factors()
        z = self.dropout(x) @ b.T.astype(x.dtype)
        return mx.addmm(self.embedding.as_linear(x), z, a.T.astype(x.dtype), alpha=self.scale)

    def delta(self) -> mx.array:
        a, b = self.factors()
        return self.scale * (a @ b)


class LoRASwitchLinear(LoRA):
    """A factor pair per expert: lora_a (E, r, in), lora_b (E, out, r)."""

    def __init__(self, layer: nn.Module, config: Adapter, path: str, key: Any):
        super().__init__(layer, config, path)
        experts, outputs, inputs = layer_shape(layer)
        self.linear = layer
        self.lora_a = draw(config, (experts, self.rank, inputs), fan_in=inputs, rank=self.rank, key=key)
        self.lora_b = mx.zeros((experts, outputs, self.rank))
        self.start(config, key)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        multiply = partial(mx.gather_mm, rhs_indices=indices, sorted_indices=sorted_indices)
        a, b = self.factors()
        z = multiply(self.dropout(x), a.swapaxes(-1, -2).astype(x.dtype))
        z = multiply(z, b.swapaxes(-1, -2).astype(x.dtype))
        return self.linear(x, indices, sorted_indices=sorted_indices) + self.scale * z

    def delta(self) -> mx.array:
        a, b = self.factors()
        return self.scale * (b @ a)
