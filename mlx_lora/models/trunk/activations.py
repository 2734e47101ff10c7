"""Gated activations and SiLU that keep their inputs for the backward pass, and compute the rest again."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_lora import device

Pair = tuple[mx.array, mx.array]


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) · x, keeping gate and x."""
    return _swiglu(gate, x)  # type: ignore[no-any-return]


def precise_swiglu(h: mx.array, gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) · x computed in float32, in h's dtype; keeps gate and x."""
    return _precise_swiglu(gate, x).astype(h.dtype)  # type: ignore[no-any-return]


def silu(x: mx.array) -> mx.array:
    """x · sigmoid(x), keeping x."""
    return _silu(x)  # type: ignore[no-any-return]


@mx.custom_function  # type: ignore[untyped-decorator]
def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return gate * device.sigmoid(gate) * x


@_swiglu.vjp  # type: ignore[untyped-decorator]
def _swiglu_vjp(primals: Pair, cotangent: mx.array, _: Any) -> Pair:
    gate, x = mx.depends(list(primals), [cotangent])
    return _by_swiglu(gate, x, cotangent)


@mx.custom_function  # type: ignore[untyped-decorator]
def _precise_swiglu(gate: mx.array, x: mx.array) -> mx.array:
    gate = gate.astype(mx.float32)
    return gate * device.sigmoid(gate) * x.astype(mx.float32)


@_precise_swiglu.vjp  # type: ignore[untyped-decorator]
def _precise_swiglu_vjp(primals: Pair, cotangent: mx.array, _: Any) -> Pair:
    gate, x = (primal.astype(mx.float32) for primal in mx.depends(list(primals), [cotangent]))
    by_gate, by_x = _by_swiglu(gate, x, cotangent)
    return by_gate.astype(primals[0].dtype), by_x.astype(primals[1].dtype)


def _by_swiglu(gate: mx.array, x: mx.array, cotangent: mx.array) -> Pair:
    """Gradients by gate and x.

    Both have to depend on the cotangent, or a compiled graph would keep what the forward pass has computed.
    """
    switch = device.sigmoid(gate)
    passed = gate * switch
    return cotangent * x * (switch + passed * (1 - switch)), cotangent * passed


@mx.custom_function  # type: ignore[untyped-decorator]
def _silu(x: mx.array) -> mx.array:
    return x * device.sigmoid(x)


@_silu.vjp  # type: ignore[untyped-decorator]
def _silu_vjp(x: mx.array, cotangent: mx.array, _: Any) -> mx.array:
    (x,) = mx.depends([x], [cotangent])
    switch = device.sigmoid(x)
    return cotangent * switch * (1 + x * (1 - switch))
