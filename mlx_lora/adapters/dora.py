"""DoRA (arXiv 2402.09353): the length of every row of the weight is learned separately from its direction.

    y = b + m/‖W₀ + sBA‖ ⊙ (W₀x + sBAx)   (eq. 5); the norm is over the inputs, without a gradient (eq. 11)

A starts random, B at zero and m at ‖W₀‖, so m/‖·‖ is 1 and the wrapped layer equals its base at the start, bit for bit.
Names and shapes are mlx-lm's: lora_a and lora_b as in LoRA, and `m` (out,), or (experts, out). Dropout acts on the
low-rank path only, as there.

W₀ + sBA is never formed. With the frozen ‖W₀‖² of each row, its squared norm is

    ‖W₀‖² + 2s⟨W₀Aᵀ, B⟩ + s²·B(AAᵀ)Bᵀ

Only W₀Aᵀ reads the weight. It is computed a block of rows at a time, so that a packed weight is never unpacked whole.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import AdapterLayer, by_kind, layer_shape
from mlx_lora.adapters.lora import LoRA, LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lora.config import Adapter
from mlx_lora.quant import nf4
from mlx_lora.quant.matmul import BLOCK_BYTES, like
from mlx_lora.quant.quantize import dequantize_layer


class DoRA(LoRA, abstract=True):
    """LoRA's arrays, and `m`; the common base of the three classes. `DoRA.from_base` chooses the class for a layer."""

    PRECISE: ClassVar[frozenset[str]] = frozenset({"m"})

    @staticmethod
    def from_base(layer: nn.Module, config: Adapter, *, path: str, key: Any, shared: Any = None) -> DoRA:
        """Wrap a Linear, an Embedding or a SwitchLinear, quantized or not. `key` seeds A."""
        kind = by_kind(layer, DoRALinear, DoRAEmbedding, DoRASwitchLinear)
        return kind(layer, config, path, key)  # type: ignore[no-any-return]

    @staticmethod
    def refusal(layer: nn.Module, config: Adapter, path: str) -> str | None:
        """Why the method can't wrap `layer` and what works instead, or None."""
        return AdapterLayer.refusal(layer, config, path)

    def adapter_params(self) -> tuple[str, ...]:
        return ("lora_a", "lora_b", "m")

    def start(self, config: Adapter, key: Any) -> None:
        """Set m to ‖W₀‖ and keep ‖W₀‖² of every row; its name starts with an underscore, so it isn't a parameter."""
        self._squares = by_rows(self.base, lambda _, weight: mx.square(weight).sum(axis=-1))
        self.m = mx.sqrt(self._squares)
        self.__dict__["cached_gain"] = None  # in __dict__, so that it isn't part of the compiled state

    @abstractmethod
    def sides(self) -> tuple[mx.array, mx.array]:
        """left (…, out, r) and right (…, r, in): W₀ + s · left right is the weight that gives the direction."""

    def gain(self, dependency: mx.array | None = None) -> mx.array:
        """m/‖W₀ + sBA‖ of every row, (…, out) float32, computed after `dependency`.

        A frozen wrapper computes it once, not for every token.
        """
        if "m" not in self._no_grad:
            return self._gain(dependency)
        arrays, cache = list(self.adapter_arrays().values()), self.__dict__["cached_gain"]
        if cache is None or any(array is not cached for array, cached in zip(arrays, cache[0], strict=True)):
            cache = self.__dict__["cached_gain"] = (arrays, self._gain(dependency))
        return cache[1]

    def _gain(self, dependency: mx.array | None) -> mx.array:
        """The gain doesn't need the layer's input; only `dependency` keeps MLX from computing it too early."""
        left, right = self.sides()
        transposed = right.swapaxes(-1, -2)
        projected = by_rows(
            self.base, lambda rows, weight: weight @ _expert_rows(transposed, rows), dependency=dependency
        )
        cross = (left * projected).sum(axis=-1)
        update = ((left @ (right @ transposed)) * left).sum(axis=-1)
        return self._divide_by_norm(self.m, self._squares + 2 * self.scale * cross + self.scale**2 * update)

    @staticmethod
    def _divide_by_norm(m: mx.array, squares: mx.array) -> mx.array:
        """m/√squares. A row of zeros, such as a padding row of a vocabulary, is divided by 1 instead of 0."""
        norm = mx.sqrt(mx.maximum(squares, 0))
        return m / mx.stop_gradient(mx.where(norm > 0, norm, 1))

    def delta(self) -> mx.array:
        left, right = self.sides()
        gain = self.gain()[..., None]
        return (gain - 1) * dequantize_layer(self.base, mx.float32) + gain * (self.scale * (left @ right))


class DoRALinear(DoRA, LoRALinear):
    """lora_a (in, r), lora_b (r, out), m (out,); x (…, in) -> (…, out)."""

    def sides(self) -> tuple[mx.array, mx.array]:
        return self.lora_b.T, self.lora_a.T

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        z = self.scale * (self.dropout(x) @ self.lora_a.astype(x.dtype)) @ self.lora_b.astype(x.dtype)
        return _rescaled(y, self.linear.get("bias"), z, self.gain(dependency=y))


class DoRAEmbedding(DoRA, LoRAEmbedding):
    """lora_a (vocabulary, r), lora_b (r, dim), m (vocabulary,); also the output head when embeddings are tied."""

    def sides(self) -> tuple[mx.array, mx.array]:
        return self.lora_a, self.lora_b

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.embedding(tokens)
        z = self.scale * (self.lora_a[tokens] @ self.lora_b)
        squares = self._squares[tokens] + (2 * y.astype(mx.float32) * z + z * z).sum(axis=-1)  # of these rows only
        gain = self._divide_by_norm(self.m[tokens], squares)[..., None]
        return _rescaled(y, None, self.dropout(z), gain)

    def as_linear(self, x: mx.array) -> mx.array:
        y = self.embedding.as_linear(x)
        z = self.scale * (self.dropout(x) @ self.lora_b.T.astype(x.dtype)) @ self.lora_a.T.astype(x.dtype)
        return _rescaled(y, None, z, self.gain(dependency=y))


class DoRASwitchLinear(DoRA, LoRASwitchLinear):
    """Each expert has its own arrays: lora_a (E, r, in), lora_b (E, out, r), m (E, out)."""

    def sides(self) -> tuple[mx.array, mx.array]:
        return self.lora_b, self.lora_a

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        multiply = partial(mx.gather_mm, rhs_indices=indices, sorted_indices=sorted_indices)
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        z = multiply(self.dropout(x), self.lora_a.swapaxes(-1, -2).astype(x.dtype))
        z = self.scale * multiply(z, self.lora_b.swapaxes(-1, -2).astype(x.dtype))
        bias = mx.expand_dims(self.linear["bias"][indices], -2) if "bias" in self.linear else None
        return _rescaled(y, bias, z, mx.expand_dims(self.gain(dependency=y)[indices], -2))


def _rescaled(y: mx.array, bias: mx.array | None, z: mx.array, gain: mx.array) -> mx.array:
    """b + gain ⊙ (y − b + z), computed as y plus two terms that are exactly zero for gain 1 and z 0."""
    plain = y if bias is None else y - bias
    return y + (gain - 1).astype(y.dtype) * plain + gain.astype(y.dtype) * z.astype(y.dtype)


def _expert_rows(array: mx.array, rows: slice) -> mx.array:
    """`array[rows]` for a 3-D array, whose rows are experts, as those of its weight are; a 2-D array whole."""
    return array[rows] if array.ndim == 3 else array


def by_rows(
    layer: nn.Module, function: Callable[[slice, mx.array], mx.array], *, dependency: mx.array | None = None
) -> mx.array:
    """`function(rows, weight[rows])` over blocks of a layer's float32 weight, joined along the first axis.

    A row is an output, a token or a whole expert. Each block is unpacked only after the previous block (for the first:
    `dependency`) is computed. Otherwise MLX could unpack all blocks at once and hold them all in memory.
    """
    count, *rest = layer_shape(layer)
    step = max(BLOCK_BYTES // (4 * prod(rest)), 1)
    parts = []
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        dependency = function(rows, _unpacked(layer, rows, dependency))
        parts.append(dependency)
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)


def _unpacked(layer: nn.Module, rows: slice, dependency: mx.array | None) -> mx.array:
    """Rows of a layer's weight in float32, computed after `dependency`."""
    block: Any = like(layer, type(layer))
    for key, array in layer.items():
        if isinstance(array, mx.array) and dependency is not None:
            block[key] = mx.depends([array], [dependency])[0]
    if layer.get("scales") is not None and layer.mode == nf4.MODE:
        return nf4.unpack(block.arrays(), rows)
    for key in ("weight", "scales", "biases"):
        if block.get(key) is not None:
            block[key] = block[key][rows]
    return dequantize_layer(block, mx.float32)
