"""GLoRA (arXiv 2306.07967): weight and bias of a linear layer, each scaled and shifted.

    W = W₀ + W₀ ⊙ A + B,   b = b₀ + b₀ ⊙ D + E + W₀C   (eq. 6)

`adapter.glora` chooses the form of each, and what is chosen `none` is left out:

    A, B   lora    glora_a_down (in, r), glora_a_up (r, out), their product transposed; for B glora_b_…
           vector  glora_a (out,), one number for each row of the weight, as in the authors' code; scalar (1,)
    C      lora    glora_c_down (in, r), glora_c_up (r,);   vector  glora_c (in,)
    D, E   vector  glora_d, glora_e (out,);   scalar (1,)

There is no scale. Everything starts with a product or a value of zero, so the wrapped layer equals its base at the
start, bit for bit. Where the layer has no bias, b₀ is zero and D, which would only scale it, is left out; E and C
make a bias then. Knows linear layers only: an expert's bias is chosen for each token, an embedding has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import LINEARS, AdapterLayer, draw, layer_shape
from mlx_lora.config import Adapter
from mlx_lora.quant import nf4
from mlx_lora.quant.matmul import like
from mlx_lora.quant.quantize import dequantize_layer

# Bytes of a dequantized block: a quarter of what `quant.matmul` takes, for here five such arrays are alive at a time.
BLOCK_BYTES = 2 << 20


class GLoRA(AdapterLayer):
    """x (…, in) -> (…, out). The module's docstring names the arrays."""

    PRECISE: ClassVar[frozenset[str]] = frozenset(f"glora_{letter}" for letter in "abcde")

    def __init__(self, layer: nn.Module, config: Adapter, path: str, key: Any):
        super().__init__()
        self.rank = config.rank_of(path)
        self.linear = layer
        outputs, inputs = layer_shape(layer)
        choices = config.glora
        sizes = {"vector": outputs, "scalar": 1}
        keys = mx.random.split(key, 3)
        for letter, choice, own in (("a", choices.a, keys[0]), ("b", choices.b, keys[1])):
            if choice == "lora":
                down = draw(config, (inputs, self.rank), fan_in=inputs, rank=self.rank, key=own)
                self[f"glora_{letter}_down"] = down
                self[f"glora_{letter}_up"] = mx.zeros((self.rank, outputs))
            elif choice != "none":
                self[f"glora_{letter}"] = mx.zeros((sizes[choice],))
        if choices.c == "lora":  # here the first factor is the zero, so that all of it learns at once
            self.glora_c_down = mx.zeros((inputs, self.rank))
            self.glora_c_up = draw(config, (self.rank,), fan_in=1, rank=self.rank, key=keys[2])
        elif choices.c == "vector":
            self.glora_c = mx.zeros((inputs,))
        if choices.d != "none" and "bias" in layer:
            self.glora_d = mx.zeros((sizes[choices.d],))
        if choices.e != "none":
            self.glora_e = mx.zeros((sizes[choices.e],))

    @staticmethod
    def refusal(layer: nn.Module, config: Adapter, path: str) -> str | None:
        if not isinstance(layer, LINEARS):
            return f"GLoRA is for linear layers, and {path} is of type {type(layer).__name__}; method lora works"
        choices = config.glora
        if "bias" not in layer and {choices.a, choices.b, choices.c, choices.e} == {"none"}:
            return f"{path} has no bias for D to scale; choose adapter.glora.e, which adds one, or a, b or c"
        return None

    @staticmethod
    def from_base(layer: nn.Module, config: Adapter, *, path: str, key: Any, shared: Any = None) -> GLoRA:
        """Wrap a Linear, packed or not. `key` seeds the random factors."""
        return GLoRA(layer, config, path, key)

    @property
    def base(self) -> nn.Module:
        return self["linear"]

    def adapter_params(self) -> tuple[str, ...]:
        return tuple(sorted(name for name in self if name.startswith("glora_")))

    def __call__(self, x: mx.array) -> mx.array:
        own = {name: array.astype(x.dtype) for name, array in self.adapter_arrays().items()}
        y = base = self.linear(x)
        if "glora_a" in own:
            y = y + own["glora_a"] * base
            if "bias" in self.linear:  # of which A is no business
                y = y - own["glora_a"] * self.linear["bias"].astype(x.dtype)
        if "glora_a_down" in own:
            y = y + multiply_hadamard(x, self.linear, own["glora_a_down"], own["glora_a_up"])
        if "glora_b" in own:
            y = y + own["glora_b"] * x.astype(mx.float32).sum(-1, keepdims=True).astype(x.dtype)
        if "glora_b_down" in own:
            y = mx.addmm(y, x @ own["glora_b_down"], own["glora_b_up"])
        column = _column(own)
        product = None if column is None else _without_bias(self.linear)(column[None])[0]
        return y + self._bias_update(own, product)

    def delta(self) -> mx.array:
        """W₀ ⊙ A + B. The bias has an update of its own, which `fuse` merges too."""
        own, weight = self.adapter_arrays(), dequantize_layer(self.linear, mx.float32)
        return weight * _matrix(own, "a") + _matrix(own, "b") + mx.zeros_like(weight)

    def fuse(self) -> nn.Module:
        """A plain Linear of weight W and bias b, float32."""
        return self._with_bias(super().fuse())

    def fuse_packed(self) -> nn.Module | None:
        """The packed base with A and B in its scales and zero-points, and the bias b, each in the dtype of the scales.

        scale·q + zero-point takes a factor and a summand for each row, so A and B must be vector, scalar or none, and
        the base affine; None otherwise. C, D and E may be anything.
        """
        own, base = self.adapter_arrays(), self.base
        if getattr(base, "mode", None) != "affine" or "glora_a_down" in own or "glora_b_down" in own:
            return None
        merged: nn.Module = like(base, type(base))
        scales, zero_points, factor = base["scales"], base["biases"], 1 + _matrix(own, "a")
        moved = zero_points.astype(mx.float32) * factor + _matrix(own, "b")
        merged["scales"] = (scales.astype(mx.float32) * factor).astype(scales.dtype)
        merged["biases"] = moved.astype(zero_points.dtype)
        return self._with_bias(merged)

    def _with_bias(self, layer: nn.Module) -> nn.Module:
        """`layer` with the bias b: in float32 beside a plain weight, in the scales' dtype beside a packed one."""
        own = self.adapter_arrays()
        column = _column(own)
        product = None if column is None else dequantize_layer(self.linear, mx.float32) @ column
        bias = self._bias_update(own, product)
        if "bias" in self.linear:
            bias = bias + self.linear["bias"].astype(mx.float32)
        if isinstance(bias, mx.array):
            outputs = layer_shape(self.linear)[0]
            dtype = layer["scales"].dtype if "scales" in layer else mx.float32
            layer["bias"] = mx.broadcast_to(bias, (outputs,)).astype(dtype)
        return layer

    def _bias_update(self, own: dict[str, mx.array], product: mx.array | None) -> mx.array | int:
        """b₀ ⊙ D + E + W₀C, given W₀C; (out,) or (1,) in the dtype of `own`, and the number 0 where all are none."""
        terms = [own[name] for name in ("glora_e",) if name in own] + ([] if product is None else [product])
        if "glora_d" in own:
            terms.append(own["glora_d"] * self.linear["bias"].astype(own["glora_d"].dtype))
        return sum(terms)

    def _extra_repr(self) -> str:
        return f"rank={self.rank}, {', '.join(self.adapter_params())}"


def _matrix(own: dict[str, mx.array], letter: str) -> mx.array:
    """A or B in a shape that broadcasts to the weight's: (out, in), (out, 1) or (1, 1)."""
    if f"glora_{letter}_down" in own:
        return (own[f"glora_{letter}_down"] @ own[f"glora_{letter}_up"]).T
    return own.get(f"glora_{letter}", mx.zeros((1,)))[:, None]


def _column(own: dict[str, mx.array]) -> mx.array | None:
    """C (in,), or None where there is none."""
    if "glora_c_down" in own:
        return own["glora_c_down"] @ own["glora_c_up"]
    return own.get("glora_c")


def _without_bias(layer: nn.Module) -> nn.Module:
    """The same arrays in a layer that adds no bias."""
    bare: nn.Module = like(layer, type(layer))
    bare.pop("bias", None)
    return bare


def multiply_hadamard(x: mx.array, layer: nn.Module, down: mx.array, up: mx.array) -> mx.array:
    """x (…, in) times (W₀ ⊙ A)ᵀ with A = (down up)ᵀ, giving (…, out) in x's dtype.

    down (in, r) and up (r, out) have x's dtype. A product with A needs the weight itself: for A of rank r it could be
    had from r multiplications by W₀, but those cost r times the base's work and keep r times its activations, while
    this costs one more multiplication and a pass over the weight. A dense copy must not live until the backward pass,
    and never as a whole: both passes unpack the weight anew, a block of rows at a time, each after the one before.
    """
    names = [name for name in ("weight", *nf4.SCALES, "biases") if layer.get(name) is not None]
    outputs, inputs = layer_shape(layer)
    step = max(BLOCK_BYTES // (4 * inputs), 1)
    blocks = [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]

    def dense(arrays: Sequence[mx.array], here: slice, after: list[mx.array]) -> tuple[mx.array, mx.array]:
        """The rows `here` of W₀ and of A in x's dtype, made only once all of `after` is there."""
        down, up, *stored = mx.depends(list(arrays), after)
        factor = up[:, here].T @ down.T
        if getattr(layer, "mode", None) == nf4.MODE:  # whose scales aren't all row by row
            return nf4.unpack(stored, here).astype(factor.dtype), factor
        rows: nn.Module = like(layer, type(layer))
        for name, array in zip(names, stored, strict=True):
            rows[name] = array[here]
        return dequantize_layer(rows, factor.dtype), factor

    @mx.custom_function  # type: ignore[untyped-decorator]
    def multiply(x: mx.array, *arrays: mx.array) -> mx.array:
        parts, after = [], x
        for here in blocks:
            weight, factor = dense(arrays, here, [after])
            after = x @ (weight * factor).T
            parts.append(after)
        return mx.concatenate(parts, axis=-1)

    @multiply.vjp  # type: ignore[untyped-decorator]
    def multiply_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        x, *arrays = primals
        down, up, *stored = arrays
        rows, slopes = x.reshape(-1, inputs), cotangent.reshape(-1, outputs)
        to_x, to_down, to_up = mx.zeros_like(rows), mx.zeros_like(down), []
        after = [slopes]
        for here in blocks:
            weight, factor = dense(arrays, here, after)
            to_x = mx.addmm(to_x, slopes[:, here], weight * factor)
            to_a = weight * (slopes[:, here].T @ rows)
            to_down = mx.addmm(to_down, to_a.T, up[:, here].T)
            to_up.append((to_a @ down).T)
            after = [to_x, to_down]
        frozen = tuple(mx.broadcast_to(mx.zeros((), array.dtype), array.shape) for array in stored)
        return (to_x.reshape(x.shape), to_down, mx.concatenate(to_up, axis=1), *frozen)

    return multiply(x, down, up, *(layer[name] for name in names))  # type: ignore[no-any-return]
