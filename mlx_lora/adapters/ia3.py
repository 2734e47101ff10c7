"""IA³ (arXiv 2205.05638, §3.3): trained vectors that multiply activations.

    keys and values      y = l ⊙ (W₀x + b)       attention's projections, and any other layer: outputs are multiplied
    feed-forward         y = W₀(l ⊙ x) + b       the last linear of an MLP: its inputs are multiplied

The vectors start at one, so a new adapter changes no bit. Outputs are multiplied with their bias, as in PEFT. The path
of a layer decides between the two: a linear outside attention with a name in FEED_FORWARD has its inputs multiplied.
"""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import EMBEDDINGS, EXPERTS, AdapterLayer, layer_shape
from mlx_lora.config import Adapter
from mlx_lora.models.architectures import ATTENTION
from mlx_lora.models.layers import plain_layer
from mlx_lora.quant.matmul import like
from mlx_lora.quant.quantize import dequantize_layer

# Names of the last linear of an MLP or an expert in mlx-lm's models.
FEED_FORWARD = {"down_proj", "w2", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "ff_out", "proj_2", "output_linear"}


def is_feed_forward(path: str) -> bool:
    """Whether the layer at `path` is the last linear of an MLP, by its name: `c_proj` is one only outside attention."""
    *blocks, name = path.split(".")
    return name in FEED_FORWARD and not any(ATTENTION.search(block) for block in blocks)


class IA3(AdapterLayer):
    """vector (out,), or (in,) where it multiplies inputs; (experts, …) for experts; float32.

    `columns` is True where inputs are multiplied, which has the same effect as multiplying the weight's columns.
    """

    PRECISE: ClassVar[frozenset[str]] = frozenset({"vector"})

    def __init__(self, layer: nn.Module, *, columns: bool):
        super().__init__()
        *experts, outputs, inputs = layer_shape(layer)
        self.columns = columns
        self.layer = layer
        self.vector = mx.ones((*experts, inputs if columns else outputs))

    @staticmethod
    def from_base(layer: nn.Module, config: Adapter, *, path: str, key: Any, shared: Any = None) -> IA3:
        """Wrap a Linear, an Embedding or a SwitchLinear, quantized or not. Nothing here is random."""
        if isinstance(layer, EMBEDDINGS):
            return IA3Embedding(layer, columns=True)
        return IA3(layer, columns=is_feed_forward(path))

    @property
    def base(self) -> nn.Module:
        return self["layer"]

    def adapter_params(self) -> tuple[str, ...]:
        return ("vector",)

    def __call__(self, x: mx.array, *indices: mx.array, **sorting: bool) -> mx.array:
        vector = mx.expand_dims(self.vector[indices[0]], -2) if isinstance(self.base, EXPERTS) else self.vector
        if self.columns:
            return self.layer(x * vector.astype(x.dtype), *indices, **sorting)
        y = self.layer(x, *indices, **sorting)
        return y * vector.astype(y.dtype)

    def delta(self) -> mx.array:
        return dequantize_layer(self.base, mx.float32) * (self._broadcast_vector() - 1)

    def fuse(self) -> nn.Module:
        """A plain layer with the vector multiplied into its weight, and into its bias where outputs are multiplied."""
        fused = plain_layer(self.base, dequantize_layer(self.base, mx.float32) * self._broadcast_vector())
        if "bias" in fused and not self.columns:
            fused["bias"] = fused["bias"].astype(mx.float32) * self.vector
        return fused

    def fuse_packed(self) -> nn.Module | None:
        """The affine base with its rows' scales and zero-points multiplied; the packed weight doesn't change.

        Scales and zero-points keep their dtype: half precision rounds each of them once. None where inputs are
        multiplied, since a group of columns shares one scale.
        """
        if getattr(self.base, "mode", None) != "affine" or self.columns:
            return None
        fused: nn.Module = like(self.base, type(self.base))
        for name in ("scales", "biases", "bias"):
            if name in self.base:
                array, vector = self.base[name], self.vector if name == "bias" else self.vector[..., None]
                fused[name] = (array.astype(mx.float32) * vector).astype(array.dtype)
        return fused

    def _broadcast_vector(self) -> mx.array:
        """The vector in a shape that multiplies the weight's columns or rows."""
        return mx.expand_dims(self.vector, -2 if self.columns else -1)

    def _extra_repr(self) -> str:
        return "on inputs" if self.columns else "on outputs"


class IA3Embedding(IA3):
    """vector (dim,): multiplies a token's embedding, and the hidden states that enter a tied output head."""

    def __call__(self, x: mx.array, *indices: mx.array, **sorting: bool) -> mx.array:
        y = self.layer(x)  # token ids
        return y * self.vector.astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        return self.layer.as_linear(x * self.vector.astype(x.dtype))
