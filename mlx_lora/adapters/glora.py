"""GLoRA (arXiv 2306.07967): weight and bias of a linear layer, each scaled and shifted.

    W = W₀ + W₀ ⊙ A + B,   b = b₀ + b₀ ⊙ D + E + W₀C   (eq. 6)

`adapter.glora` chooses the form of A to E; `none` leaves one out:

    A, B   lora    glora_a_down (in, r), glora_a_up (r, out), their product transposed; for B glora_b_…
           vector  glora_a (out,), one number for each row of the weight, as in the authors' code; scalar (1,)
    C      lora    glora_c_down (in, r), glora_c_up (r,);   vector  glora_c (in,)
    D, E   vector  glora_d, glora_e (out,);   scalar (1,)

There is no scale. Every product and value is zero at the start, so the wrapped layer equals its base, bit for bit. In
a layer without a bias, b₀ is zero: D, which would only scale it, is left out, and E and C add a bias. Only linear
layers are supported: an expert's bias is chosen for each token, and an embedding has none.
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

# Bytes of a dequantized block: a quarter of `quant.matmul`'s, because five such arrays are alive at a time.
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
        for letter, choice, factor_key in (("a", choices.a, keys[0]), ("b", choices.b, keys[1])):
            if choice == "lora":
                down = draw(config, (inputs, self.rank), fan_in=inputs, rank=self.rank, key=factor_key)
                self[f"glora_{letter}_down"] = down
                self[f"glora_{letter}_up"] = mx.zeros((self.rank, outputs))
            elif choice != "none":
                self[f"glora_{letter}"] = mx.zeros((sizes[choice],))
        if choices.c == "lora":  # the large factor is the zero one: only a zero factor gets a gradient at first
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
        arrays = {name: array.astype(x.dtype) for name, array in self.adapter_arrays().items()}
        y = base = self.linear(x)
        if "glora_a" in arrays:
            y = y + arrays["glora_a"] * base
            if "bias" in self.linear:  # A must not scale the bias
                y = y - arrays["glora_a"] * self.linear["bias"].astype(x.dtype)
        if "glora_a_down" in arrays:
            y = y + multiply_hadamard(x, self.linear, arrays["glora_a_down"], arrays["glora_a_up"])
        if "glora_b" in arrays:
            y = y + arrays["glora_b"] * x.astype(mx.float32).sum(-1, keepdims=True).astype(x.dtype)
        if "glora_b_down" in arrays:
            y = mx.addmm(y, x @ arrays["glora_b_down"], arrays["glora_b_up"])
        column = _column(arrays)
        product = None if column is None else _without_bias(self.linear)(column[None])[0]
        return y + self._bias_update(arrays, product)

    def delta(self) -> mx.array:
        """W₀ ⊙ A + B, without the update of the bias, which `fuse` merges too."""
        arrays, weight = self.adapter_arrays(), dequantize_layer(self.linear, mx.float32)
        return weight * _matrix(arrays, "a") + _matrix(arrays, "b") + mx.zeros_like(weight)

    def fuse(self) -> nn.Module:
        """A plain Linear of weight W and bias b, float32."""
        return self._with_bias(super().fuse())

    def fuse_packed(self) -> nn.Module | None:
        """The packed base with A and B in its scales and zero-points, and the bias b, each in the dtype of the scales.

        A row's scales and zero-points can absorb one factor and one summand, so the base must be affine, and A and B
        vector, scalar or none; otherwise returns None. C, D and E may have any form.
        """
        arrays, base = self.adapter_arrays(), self.base
        if getattr(base, "mode", None) != "affine" or "glora_a_down" in arrays or "glora_b_down" in arrays:
            return None
        merged: nn.Module = like(base, type(base))
        scales, zero_points, factor = base["scales"], base["biases"], 1 + _matrix(arrays, "a")
        new_zero_points = zero_points.astype(mx.float32) * factor + _matrix(arrays, "b")
        merged["scales"] = (scales.astype(mx.float32) * factor).astype(scales.dtype)
        merged["biases"] = new_zero_points.astype(zero_points.dtype)
        return self._with_bias(merged)

    def _with_bias(self, layer: nn.Module) -> nn.Module:
        """`layer` with the bias b: in float32 beside a plain weight, in the scales' dtype beside a packed one."""
        arrays = self.adapter_arrays()
        column = _column(arrays)
        product = None if column is None else dequantize_layer(self.linear, mx.float32) @ column
        bias = self._bias_update(arrays, product)
        if "bias" in self.linear:
            bias = bias + self.linear["bias"].astype(mx.float32)
        if isinstance(bias, mx.array):
            outputs = layer_shape(self.linear)[0]
            dtype = layer["scales"].dtype if "scales" in layer else mx.float32
            layer["bias"] = mx.broadcast_to(bias, (outputs,)).astype(dtype)
        return layer

    def _bias_update(self, arrays: dict[str, mx.array], product: mx.array | None) -> mx.array | int:
        """b₀ ⊙ D + E + W₀C, where `product` is W₀C: (out,) or (1,) in the dtype of `arrays`; 0 without C, D and E."""
        terms = [arrays[name] for name in ("glora_e",) if name in arrays] + ([] if product is None else [product])
        if "glora_d" in arrays:
            terms.append(arrays["glora_d"] * self.linear["bias"].astype(arrays["glora_d"].dtype))
        return sum(terms)

    def _extra_repr(self) -> str:
        return f"rank={self.rank}, {', '.join(self.adapter_params())}"


def _matrix(arrays: dict[str, mx.array], letter: str) -> mx.array:
    """A or B in a shape that broadcasts to the weight's: (out, in), (out, 1) or (1, 1)."""
    if f"glora_{letter}_down" in arrays:
        return (arrays[f"glora_{letter}_down"] @ arrays[f"glora_{letter}_up"]).T
    return arrays.get(f"glora_{letter}", mx.zeros((1,)))[:, None]


def _column(arrays: dict[str, mx.array]) -> mx.array | None:
    """C (in,), or None if the layer has no C."""
    if "glora_c_down" in arrays:
        return arrays["glora_c_down"] @ arrays["glora_c_up"]
    return arrays.get("glora_c")


def _without_bias(layer: nn.Module) -> nn.Module:
    """The same arrays in a layer that adds no bias."""
    bare: nn.Module = like(layer, type(layer))
    bare.pop("bias", None)
    return bare


def multiply_hadamard(x: mx.array, layer: nn.Module, down: mx.array, up: mx.array) -> mx.array:
    """x (…, in) times (W₀ ⊙ A)ᵀ with A = (down up)ᵀ, giving (…, out) in x's dtype.

    down (in, r) and up (r, out) have x's dtype. W₀ ⊙ A is computed from the unpacked weight, which costs one more
    multiplication and a pass over the weight. The alternative, r multiplications by W₀, costs r times the base's work
    and keeps r times its activations. Both passes unpack the weight again, a block of rows at a time, each block after
    the previous one. So there is never a whole dense copy, and nothing dense is kept for the backward pass.
    """
    names = [name for name in ("weight", *nf4.SCALES, "biases") if layer.get(name) is not None]
    out_dim, in_dim = layer_shape(layer)
    step = max(BLOCK_BYTES // (4 * in_dim), 1)
    blocks = [slice(start, min(start + step, out_dim)) for start in range(0, out_dim, step)]

    def dense(arrays: Sequence[mx.array], rows: slice, dependencies: list[mx.array]) -> tuple[mx.array, mx.array]:
        """The given rows of W₀ and of A in x's dtype, computed after `dependencies`."""
        down, up, *stored = mx.depends(list(arrays), dependencies)
        factor = up[:, rows].T @ down.T
        if getattr(layer, "mode", None) == nf4.MODE:  # nf4's scales can't be sliced by row
            return nf4.unpack(stored, rows).astype(factor.dtype), factor
        block: nn.Module = like(layer, type(layer))
        for name, array in zip(names, stored, strict=True):
            block[name] = array[rows]
        return dequantize_layer(block, factor.dtype), factor

    @mx.custom_function  # type: ignore[untyped-decorator]
    def multiply(x: mx.array, *arrays: mx.array) -> mx.array:
        outputs, previous = [], x
        for rows in blocks:
            weight, factor = dense(arrays, rows, [previous])
            previous = x @ (weight * factor).T
            outputs.append(previous)
        return mx.concatenate(outputs, axis=-1)

    @multiply.vjp  # type: ignore[untyped-decorator]
    def multiply_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        x, *arrays = primals
        down, up, *stored = arrays
        flat_x, grad_y = x.reshape(-1, in_dim), cotangent.reshape(-1, out_dim)
        grad_x, grad_down, grad_up = mx.zeros_like(flat_x), mx.zeros_like(down), []
        dependencies = [grad_y]
        for rows in blocks:
            weight, factor = dense(arrays, rows, dependencies)
            grad_x = mx.addmm(grad_x, grad_y[:, rows], weight * factor)
            grad_a = weight * (grad_y[:, rows].T @ flat_x)
            grad_down = mx.addmm(grad_down, grad_a.T, up[:, rows].T)
            grad_up.append((grad_a @ down).T)
            dependencies = [grad_x, grad_down]
        frozen = tuple(mx.broadcast_to(mx.zeros((), array.dtype), array.shape) for array in stored)
        return (grad_x.reshape(x.shape), grad_down, mx.concatenate(grad_up, axis=1), *frozen)

    return multiply(x, down, up, *(layer[name] for name in names))  # type: ignore[no-any-return]
