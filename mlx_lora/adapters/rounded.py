"""QA-LoRA's product with an update that is rounded as the merged zero-points will be, trained straight through.

    y = L · pooled (round(z + u) − z)ᵀ,  u = s/L·(B A)

z are the base's zero-points in their stored dtype. The gradient of A and B is that of the product without rounding
(the straight-through estimator, arXiv 1308.3432), through two thin matrices; the pooled inputs' is the exact one. The
rounded update is made again in the backward pass: over experts it would be gigabytes for a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import mlx.core as mx

from mlx_lora.quant.zero_points import added, difference

Product = Callable[..., mx.array]


def multiply(x: mx.array, matrix: mx.array, *indices: mx.array, sorted_indices: bool = False) -> mx.array:
    """x (…, in) times matrix (in, out); with `indices`, times the matrix (E, in, out) of each one's expert."""
    if indices:
        return mx.gather_mm(x, matrix, rhs_indices=indices[0], sorted_indices=sorted_indices)
    return x @ matrix


@lru_cache
def straight_through(scale: float, group_size: int, sorted_indices: bool = False) -> Product:
    """y of (pooled, a, b, zero_points, *indices): pooled (…, groups) -> y (…, out), in the dtype of `pooled`.

    a (groups, r) and b (r, out) are float32 masters, zero_points are (out, groups). With `indices` each of the three
    has experts before that. Everything is an explicit input: a custom function gives silent zeros for what its closure
    holds.
    """
    times = partial(multiply, sorted_indices=sorted_indices)

    def thin(pooled: mx.array, a: mx.array, b: mx.array, *indices: mx.array) -> mx.array:
        z = times(pooled, a.astype(pooled.dtype), *indices)
        return scale * times(z, b.astype(pooled.dtype), *indices)

    def rounded(a: mx.array, b: mx.array, zero_points: mx.array, dtype: mx.Dtype) -> mx.array:
        update = difference(added(zero_points, update_of(a, b, scale / group_size)), zero_points)
        return (group_size * update).swapaxes(-1, -2).astype(dtype)

    @mx.custom_function  # type: ignore[untyped-decorator]
    def product(pooled: mx.array, a: mx.array, b: mx.array, zero_points: mx.array, *indices: mx.array) -> mx.array:
        return times(pooled, rounded(a, b, zero_points, pooled.dtype), *indices)

    @product.vjp  # type: ignore[untyped-decorator]
    def product_vjp(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        pooled, a, b, zero_points, *indices = primals
        _, (of_a, of_b) = mx.vjp(lambda a, b: thin(pooled, a, b, *indices), [a, b], [cotangent])
        a, b = mx.depends([a, b], [cotangent])  # or a compiled graph would keep what the forward pass has made
        update = rounded(a, b, zero_points, pooled.dtype)
        _, (of_pooled,) = mx.vjp(lambda pooled: times(pooled, update, *indices), [pooled], [cotangent])
        frozen = (mx.broadcast_to(mx.zeros((), array.dtype), array.shape) for array in (zero_points, *indices))
        return (of_pooled, of_a, of_b, *frozen)

    return product  # type: ignore[return-value, no-any-return]


def update_of(a: mx.array, b: mx.array, scale: float) -> mx.array:
    """scale · (A B)ᵀ, (…, out, groups), float32."""
    return scale * (a @ b).swapaxes(-1, -2)
