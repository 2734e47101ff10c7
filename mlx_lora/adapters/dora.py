"""DoRA (arXiv 2402.09353): the length of every row of the weight is learned apart from its direction.

    y = b + m/‖W₀ + sBA‖ ⊙ (W₀x + sBAx)   (eq. 5), the norm over the inputs and a constant to the gradient (eq. 11)

A starts random, B at zero and m at ‖W₀‖, so m/‖·‖ is 1 and the wrapped layer equals its base at the start, bit for bit.
Names and shapes are mlx-lm's: lora_a and lora_b as in LoRA, and `m` (out,), or (experts, out). Dropout acts on the
low-rank path only, as it does there.

W₀ + sBA is never formed. With the frozen ‖W₀‖² of each row, its squared norm is

    ‖W₀‖² + 2s⟨W₀Aᵀ, B⟩ + s²·B(AAᵀ)Bᵀ

where only W₀Aᵀ reads the weight: a block of rows at a time, so that no dense copy of a packed weight lives.
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
    """What the three kinds of layers share: LoRA's arrays, and `m`. Call `DoRA.from_base` to get the right one."""

    PRECISE: ClassVar[frozenset[str]] = frozenset({"m"})

    @staticmethod
    def from_base(layer: nn.Module, config: Adapter, *, path: str, key: Any, shared: Any = None) -> DoRA:
        """Wrap a Linear, an Embedding or a SwitchLinear, quantized or not. `key` seeds A."""
        kind = by_kind(layer, DoRALinear, DoRAEmbedding, DoRASwitchLinear)
        return kind(layer, config, path, key)  # type: ignore[no-any-return]

    @staticmethod
    def refusal(layer: nn.Module, config: Adapter, path: str) -> str | None:
        """Why `layer` can't be served and what works instead, or None."""
        return AdapterLayer.refusal(layer, config, path)

    def adapter_params(self) -> tuple[str, ...]:
        return ("lora_a", "lora_b", "m")

    def start(self, config: Adapter, key: Any) -> None:
        """m at ‖W₀‖, whose squares are kept: frozen, no parameter."""
        self._squares = by_rows(self.base, lambda _, weight: mx.square(weight).sum(axis=-1))
        self.m = mx.sqrt(self._squares)
        self.__dict__["kept"] = None  # no part of the compiled state

    @abstractmethod
    def sides(self) -> tuple[mx.array, mx.array]:
        """(left (…, out, r), right (…, r, in)) with W₀ + s · left right the weight whose direction is used."""

    def gain(self, after: mx.array | None = None) -> mx.array:
        """m/‖W₀ + sBA‖ of every row, (…, out) float32; of a frozen wrapper it is computed once, not for every token."""
        if "m" not in self._no_grad:
            return self._gain(after)
        arrays, kept = list(self.adapter_arrays().values()), self.__dict__["kept"]
        if kept is None or any(one is not other for one, other in zip(arrays, kept[0], strict=True)):
            kept = self.__dict__["kept"] = (arrays, self._gain(after))
        return kept[1]

    def _gain(self, after: mx.array | None) -> mx.array:
        """Computed only when `after` is there: nothing else here depends on what the layer is given."""
        left, right = self.sides()
        transposed = right.swapaxes(-1, -2)
        read = by_rows(self.base, lambda rows, weight: weight @ _of(transposed, rows), after=after)
        cross = (left * read).sum(axis=-1)
        update = ((left @ (right @ transposed)) * left).sum(axis=-1)
        return self._over(self._squares + 2 * self.scale * cross + self.scale**2 * update, self.m)

    @staticmethod
    def _over(squares: mx.array, m: mx.array) -> mx.array:
        """m over the root of `squares`; a row of zeros, such as padding of a vocabulary, has no direction to divide."""
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
        return _rescaled(y, self.linear.get("bias"), z, self.gain(after=y))


class DoRAEmbedding(DoRA, LoRAEmbedding):
    """lora_a (vocabulary, r), lora_b (r, dim), m (vocabulary,); serves as output head too when embeddings are tied."""

    def sides(self) -> tuple[mx.array, mx.array]:
        return self.lora_a, self.lora_b

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.embedding(tokens)
        z = self.scale * (self.lora_a[tokens] @ self.lora_b)
        squares = self._squares[tokens] + (2 * y.astype(mx.float32) * z + z * z).sum(axis=-1)  # of these rows only
        return _rescaled(y, None, self.dropout(z), self._over(squares, self.m[tokens])[..., None])

    def as_linear(self, x: mx.array) -> mx.array:
        y = self.embedding.as_linear(x)
        z = self.scale * (self.dropout(x) @ self.lora_b.T.astype(x.dtype)) @ self.lora_a.T.astype(x.dtype)
        return _rescaled(y, None, z, self.gain(after=y))


class DoRASwitchLinear(DoRA, LoRASwitchLinear):
    """One of each for every expert: lora_a (E, r, in), lora_b (E, out, r), m (E, out)."""

    def sides(self) -> tuple[mx.array, mx.array]:
        return self.lora_b, self.lora_a

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        multiply = partial(mx.gather_mm, rhs_indices=indices, sorted_indices=sorted_indices)
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        z = multiply(self.dropout(x), self.lora_a.swapaxes(-1, -2).astype(x.dtype))
        z = self.scale * multiply(z, self.lora_b.swapaxes(-1, -2).astype(x.dtype))
        bias = mx.expand_dims(self.linear["bias"][indices], -2) if "bias" in self.linear else None
        return _rescaled(y, bias, z, mx.expand_dims(self.gain(after=y)[indices], -2))


def _rescaled(y: mx.array, bias: mx.array | None, z: mx.array, gain: mx.array) -> mx.array:
    """b + gain ⊙ (y − b + z) as the base's own output y and what is added to it: nothing at all for gain 1 and z 0."""
    plain = y if bias is None else y - bias
    return y + (gain - 1).astype(y.dtype) * plain + gain.astype(y.dtype) * z.astype(y.dtype)


def _of(array: mx.array, rows: slice) -> mx.array:
    """The part of per-expert arrays that belongs to `rows` of the weight; anything else belongs to all of it."""
    return array[rows] if array.ndim == 3 else array


def by_rows(
    layer: nn.Module, function: Callable[[slice, mx.array], mx.array], *, after: mx.array | None = None
) -> mx.array:
    """`function(rows, weight[rows])` over blocks of a layer's float32 weight, joined along the first axis.

    A row is an output, a token or a whole expert. Each block is unpacked only when the one before, or `after`, is
    there: MLX would evaluate them side by side and hold them all.
    """
    count, *rest = layer_shape(layer)
    step = max(BLOCK_BYTES // (4 * prod(rest)), 1)
    parts = []
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        after = function(rows, _unpacked(layer, rows, after))
        parts.append(after)
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)


def _unpacked(layer: nn.Module, rows: slice, after: mx.array | None) -> mx.array:
    """Rows of a layer's weight in float32, once `after` is there."""
    block: Any = like(layer, type(layer))
    for key, array in layer.items():
        if isinstance(array, mx.array) and after is not None:
            block[key] = mx.depends([array], [after])[0]
    if layer.get("scales") is not None and layer.mode == nf4.MODE:
        return nf4.unpack(block.arrays(), rows)
    for key in ("weight", "scales", "biases"):
        if block.get(key) is not None:
            block[key] = block[key][rows]
    return dequantize_layer(block, mx.float32)
