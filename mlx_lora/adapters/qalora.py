"""QA-LoRA (arXiv 2309.14717): a low-rank update that merges into the zero-points of an affine base.

    y = W̃x + s·B A·pool_L(x),  s = α/r   (section 3.3, algorithm 1)

pool_L is the mean over each group of L inputs that share a scale and a zero-point in W̃. The inputs of a group get the
same update, so merging adds one number per group, s/L·(B A), to the zero-points: nothing is requantized and no byte of
the packed weights changes. pool_L is a mean and not a sum, so that the effect of s doesn't depend on L.

In half precision a zero-point holds about three digits, and the update of a short training is smaller than the distance
to the next one. With `adapter.zero_points: stored` the forward pass therefore adds the update to the zero-points and
rounds the sum as `fuse` stores it (`quant.zero_points`); A and B are float32 and get their gradients straight through
the rounding (`adapters.rounded`). What was trained is then what is merged, bit for bit. Zero-points in float32 and a
plain base have nothing to round.

A is (r, in/L), so a rank above in/L adds parameters but no capacity. Modes without zero-points (mxfp4, mxfp8, nvfp4,
nf4) aren't supported, nor are embeddings, whose input is a token and not a vector that can be pooled.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import EMBEDDINGS, EXPERTS, LINEARS, AdapterLayer, draw, layer_shape
from mlx_lora.adapters.rounded import multiply, straight_through, update_of
from mlx_lora.config import Adapter
from mlx_lora.models.trunk.dropout import Dropout
from mlx_lora.quant.matmul import like
from mlx_lora.quant.zero_points import added, difference, rounds

# L for a layer that isn't packed: the affine mode's smallest group size, which restricts the update least.
GROUP_SIZE = 32


class QALoRA(AdapterLayer, abstract=True):
    """The common base of both classes. `QALoRA.from_base` chooses the class for a layer.

    `rounds` says that the zero-points are rounded in the forward pass. The factors are stored in float32, because in
    bf16 they would round to other zero-points.
    """

    PRECISE: ClassVar[frozenset[str]] = frozenset({"lora_a", "lora_b"})

    def __init__(self, layer: nn.Module, config: Adapter, path: str):
        super().__init__()
        self.rank = config.rank_of(path)
        self.scale = config.scale_of(path)
        self.dropout = Dropout(config.dropout)
        self.linear = layer
        self.group_size = group_size(layer)
        self.rounds = config.zero_points == "stored" and "scales" in layer and rounds(layer["biases"])

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
    def masters(self) -> tuple[mx.array, mx.array]:
        """A (in/L, r) and B (r, out), float32; with experts before them where there are some."""

    def rounded_product(self, pooled: mx.array, *indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """What the update of the rounded zero-points adds: pooled (…, in/L) -> (…, out), in its dtype."""
        if not {"lora_a", "lora_b"} <= self._no_grad:
            through = straight_through(self.scale, self.group_size, sorted_indices)
            return through(pooled, *self.masters(), self.base["biases"], *indices)
        update = self.group_size * difference(self._merged(), self.base["biases"])
        return multiply(pooled, update.swapaxes(-1, -2).astype(pooled.dtype), *indices, sorted_indices=sorted_indices)

    def _merged(self) -> mx.array:
        """The zero-points with the update, in their dtype; kept until one of the arrays they are made of is another."""
        made_of = (self["lora_a"], self["lora_b"], self.base["biases"])
        kept = self.__dict__.get("merged")  # no parameter: it is neither saved nor trained
        if kept is None or any(then is not now for then, now in zip(kept[0], made_of, strict=True)):
            self.__dict__["merged"] = kept = (made_of, added(made_of[2], self._exact()))
        merged: mx.array = kept[1]
        return merged

    def _exact(self) -> mx.array:
        return update_of(*self.masters(), self.scale / self.group_size)

    def zero_points(self) -> mx.array:
        """What the update adds to the zero-points: (out, in/L) or (experts, out, in/L), float32.

        That is s/L·(B A), or as much of it as there is once their sum is rounded.
        """
        return difference(self._merged(), self.base["biases"]) if self.rounds else self._exact()

    def delta(self) -> mx.array:
        return mx.repeat(self.zero_points(), self.group_size, axis=-1)

    def fuse_packed(self) -> nn.Module | None:
        """The packed base with new zero-points; None over a plain base.

        They keep their dtype, because float32 zero-points beside half-precision scales would make every output float32.
        """
        if "scales" not in self.base:
            return None
        merged: nn.Module = like(self.base, type(self.base))
        before = self.base["biases"]
        merged["biases"] = self._merged() if self.rounds else (before + self._exact()).astype(before.dtype)
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
        pooled = self.dropout(self.pool(x))
        if self.rounds:
            return self.linear(x) + self.rounded_product(pooled)
        z = pooled @ self.lora_a.astype(x.dtype)
        return mx.addmm(self.linear(x), z, self.lora_b.astype(x.dtype), alpha=self.scale)

    def masters(self) -> tuple[mx.array, mx.array]:
        return self.lora_a, self.lora_b


class QALoRASwitchLinear(QALoRA):
    """A factor pair per expert: lora_a (E, r, in/L), lora_b (E, out, r)."""

    def __init__(self, layer: nn.Module, config: Adapter, path: str, key: Any):
        super().__init__(layer, config, path)
        experts, outputs, inputs = layer_shape(layer)
        groups = inputs // self.group_size
        self.lora_a = draw(config, (experts, self.rank, groups), fan_in=groups, rank=self.rank, key=key)
        self.lora_b = mx.zeros((experts, outputs, self.rank))

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        base, pooled = self.linear(x, indices, sorted_indices=sorted_indices), self.dropout(self.pool(x))
        if self.rounds:
            return base + self.rounded_product(pooled, indices, sorted_indices=sorted_indices)
        z = multiply(pooled, self.lora_a.swapaxes(-1, -2).astype(x.dtype), indices, sorted_indices=sorted_indices)
        z = multiply(z, self.lora_b.swapaxes(-1, -2).astype(x.dtype), indices, sorted_indices=sorted_indices)
        return base + self.scale * z

    def masters(self) -> tuple[mx.array, mx.array]:
        return self.lora_a.swapaxes(-1, -2), self.lora_b.swapaxes(-1, -2)


def group_size(layer: nn.Module) -> int:
    """L for a layer: its group size if it is packed, else GROUP_SIZE."""
    return int(layer.group_size) if "scales" in layer else GROUP_SIZE
