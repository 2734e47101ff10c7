"""QA-LoRA (arXiv 2309.14717): a low-rank update that merges into the zero-points of an affine base.

    y = W̃x + s·B A·pool_L(x),  s = α/r   (section 3.3, algorithm 1)

pool_L is the mean over each group of L inputs that share a scale and a zero-point in W̃. The inputs of a group get the
same update, so merging adds one number per group, s/L·(B A), to the zero-points: nothing is requantized and no byte of
the packed weights changes. pool_L is a mean and not a sum, so that the effect of s doesn't depend on L.

A is (r, in/L), so a rank above in/L adds parameters but no capacity. Modes without zero-points (mxfp4, mxfp8, nvfp4,
nf4) aren't supported, nor are embeddings, whose input is a token and not a vector that can be pooled.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import EMBEDDINGS, EXPERTS, LINEARS, AdapterLayer, draw, layer_shape
from mlx_lora.config import Adapter
from mlx_lora.models.trunk.dropout import Dropout
from mlx_lora.quant.matmul import like

# L for a layer that isn't packed: the affine mode's smallest group size, which restricts the update least.
GROUP_SIZE = 32


class QALoRA(AdapterLayer, abstract=True):
    """The common base of both classes. `QALoRA.from_base` chooses the class for a layer."""

    def __init__(self, layer: nn.Module, config: Adapter, path: str):
        super().__init__()
        self.rank = config.rank_of(path)
        self.scale = config.scale_of(path)
        self.dropout = Dropout(config.dropout)
        self.linear = layer
        self.group_size = group_size(layer)

    @staticmethod
    def refusal(layer: nn.Module, config: Adapter, path: str) -> str | None:
        mode = getattr(layer, "mode", "affine")
        if isinstance(layer, EMBEDDINGS):
            return f"{path} is an embedding, whose inputs are tokens that can't be pooled; method lora works"
        if mode != "affine":
            return f"{path} is quantized to {mode}, which has no zero-points; quantize.mode affine or method lora works"
        if not isinstance(layer, (*LINEARS, *EXPERTS)):
            return f"QA-LoRA is for linear layers, and {path} is of type {type(layer).__name__}; method lora works"
        inputs = layer_shape(layer)[-1]
        if inputs % group_size(layer):
            return f"{path} has {inputs} inputs, which groups of {GROUP_SIZE} don't divide; method lora works"
        return None

    @staticmethod
    def from_base(layer: nn.Module, config: Adapter, *, path: str, key: Any, shared: Any = None) -> QALoRA:
        """Wrap a Linear or a SwitchLinear, plain or packed in affine mode. `key` seeds A; B starts at zero."""
        kind = QALoRASwitchLinear if isinstance(layer, EXPERTS) else QALoRALinear
        return kind(layer, config, path, key)

    @property
    def base(self) -> nn.Module:
        return self["linear"]

    def adapter_params(self) -> tuple[str, ...]:
        return ("lora_a", "lora_b")

    def pool(self, x: mx.array) -> mx.array:
        """The mean over each group of L inputs: x (…, in) -> (…, in/L)."""
        return x.reshape(*x.shape[:-1], -1, self.group_size).mean(-1)

    @abstractmethod
    def zero_points(self) -> mx.array:
        """What the update adds to the zero-points, s/L·(B A): (out, in/L) or (experts, out, in/L), float32."""

    def delta(self) -> mx.array:
        return mx.repeat(self.zero_points(), self.group_size, axis=-1)

    def fuse_packed(self) -> nn.Module | None:
        """The packed base with new zero-points; None over a plain base.

        They keep their dtype, because float32 zero-points beside half-precision scales would make every output float32.
        Half precision therefore rounds the update once.
        """
        if "scales" not in self.base:
            return None
        merged: nn.Module = like(self.base, type(self.base))
        zero_points = self.base["biases"]
        merged["biases"] = (zero_points.astype(mx.float32) + self.zero_points()).astype(zero_points.dtype)
        return merged

    def _extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, group_size={self.group_size}"


class QALoRALinear(QALoRA):
    """lora_a (in/L, r), lora_b (r, out); x (…, in) -> (…, out)."""

    def __init__(self, layer: nn.Module, config: Adapter, path: str, key: Any):
        super().__init__(layer, config, path)
        outputs, inputs = layer_shape(layer)
        groups = inputs // self.group_size
        self.lora_a = draw(config, (groups, self.rank), fan_in=groups, rank=self.rank, key=key)
        self.lora_b = mx.zeros((self.rank, outputs))

    def __call__(self, x: mx.array) -> mx.array:
        z = self.dropout(self.pool(x)) @ self.lora_a.astype(x.dtype)
        return mx.addmm(self.linear(x), z, self.lora_b.astype(x.dtype), alpha=self.scale)

    def zero_points(self) -> mx.array:
        return (self.scale / self.group_size) * (self.lora_a @ self.lora_b).T


class QALoRASwitchLinear(QALoRA):
    """A factor pair per expert: lora_a (E, r, in/L), lora_b (E, out, r)."""

    def __init__(self, layer: nn.Module, config: Adapter, path: str, key: Any):
        super().__init__(layer, config, path)
        experts, outputs, inputs = layer_shape(layer)
        groups = inputs // self.group_size
        self.lora_a = draw(config, (experts, self.rank, groups), fan_in=groups, rank=self.rank, key=key)
        self.lora_b = mx.zeros((experts, outputs, self.rank))

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        multiply = partial(mx.gather_mm, rhs_indices=indices, sorted_indices=sorted_indices)
        z = multiply(self.dropout(self.pool(x)), self.lora_a.swapaxes(-1, -2).astype(x.dtype))
        z = multiply(z, self.lora_b.swapaxes(-1, -2).astype(x.dtype))
        return self.linear(x, indices, sorted_indices=sorted_indices) + self.scale * z

    def zero_points(self) -> mx.array:
        return (self.scale / self.group_size) * (self.lora_b @ self.lora_a)


def group_size(layer: nn.Module) -> int:
    """L for a layer: its group size if it is packed, else GROUP_SIZE."""
    return int(layer.group_size) if "scales" in layer else GROUP_SIZE
