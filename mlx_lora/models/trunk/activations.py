"""Gated activations and SiLU that keep only their inputs for the backward pass and recompute the rest.

The elementwise parts are compiled here even if the training step isn't: a sigmoid consists of many operations.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_lora.machine import elementary

Pair = tuple[mx.array, mx.array]


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) · x; keeps gate and x for the backward pass."""
    return _swiglu(gate, x)  # type: ignore[no-any-return]


def precise_swiglu(h: mx.array, gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) · x computed in float32 and returned in h's dtype; keeps gate and x for the backward pass."""
    return _precise_swiglu(gate, x).astype(h.dtype)  # type: ignore[no-any-return]


def silu(x: mx.array) -> mx.array:
    """x · sigmoid(x); keeps x for the backward pass."""
    return _silu(x)  # type: ignore[no-any-return]


@mx.custom_function  # type: ignore[untyped-decorator]
def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return _compiled_gated(gate, x)  # type: ignore[no-any-return]


@_swiglu.vjp  # type: ignore[untyped-decorator]
def _swiglu_vjp(primals: Pair, cotangent: mx.array, _: Any) -> Pair:
    return _gradients_of_gated(*_depending_on(cotangent, primals), cotangent)  # type: ignore[no-any-return]


@mx.custom_function  # type: ignore[untyped-decorator]
def _precise_swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return _compiled_gated(gate.astype(mx.float32), x.astype(mx.float32))  # type: ignore[no-any-return]


@_precise_swiglu.vjp  # type: ignore[untyped-decorator]
def _precise_swiglu_vjp(primals: Pair, cotangent: mx.array, _: Any) -> Pair:
    gate, x = (primal.astype(mx.float32) for primal in _depending_on(cotangent, primals))
    gate_gradient, x_gradient = _gradients_of_gated(gate, x, cotangent)
    return gate_gradient.astype(primals[0].dtype), x_gradient.astype(primals[1].dtype)


@mx.custom_function  # type: ignore[untyped-decorator]
def _silu(x: mx.array) -> mx.array:
    return _compiled_silu(x)  # type: ignore[no-any-return]


@_silu.vjp  # type: ignore[untyped-decorator]
def _silu_vjp(x: mx.array, cotangent: mx.array, _: Any) -> mx.array:
    return _gradient_of_silu(*_depending_on(cotangent, [x]), cotangent)  # type: ignore[no-any-return]


def _depending_on(cotangent: mx.array, primals: Any) -> list[mx.array]:
    """`primals`, made to depend on the cotangent.

    Without that dependency `mx.compile` merges the recomputation with the forward pass and keeps its intermediates.
    """
    return list(mx.depends(list(primals), [cotangent]))


@mx.compile  # type: ignore[untyped-decorator]
def _compiled_gated(gate: mx.array, x: mx.array) -> mx.array:
    return gate * elementary.sigmoid(gate) * x


@mx.compile  # type: ignore[untyped-decorator]
def _gradients_of_gated(gate: mx.array, x: mx.array, cotangent: mx.array) -> Pair:
    sigmoid = elementary.sigmoid(gate)
    silu_of_gate = gate * sigmoid
    return cotangent * x * (sigmoid + silu_of_gate * (1 - sigmoid)), cotangent * silu_of_gate


@mx.compile  # type: ignore[untyped-decorator]
def _compiled_silu(x: mx.array) -> mx.array:
    return x * elementary.sigmoid(x)


@mx.compile  # type: ignore[untyped-decorator]
def _gradient_of_silu(x: mx.array, cotangent: mx.array) -> mx.array:
    sigmoid = elementary.sigmoid(x)
    return cotangent * sigmoid * (1 + x * (1 - sigmoid))
