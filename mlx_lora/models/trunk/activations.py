"""Gated activations and SiLU that keep their inputs for the backward pass, and compute the rest again.

What is computed on single elements is compiled, also where the step around it isn't: a sigmoid is many operations.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_lora.machine import elementary

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
    return _gated(gate, x)  # type: ignore[no-any-return]


@_swiglu.vjp  # type: ignore[untyped-decorator]
def _swiglu_vjp(primals: Pair, cotangent: mx.array, _: Any) -> Pair:
    return _by_gated(*_after(primals, cotangent), cotangent)  # type: ignore[no-any-return]


@mx.custom_function  # type: ignore[untyped-decorator]
def _precise_swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return _gated(gate.astype(mx.float32), x.astype(mx.float32))  # type: ignore[no-any-return]


@_precise_swiglu.vjp  # type: ignore[untyped-decorator]
def _precise_swiglu_vjp(primals: Pair, cotangent: mx.array, _: Any) -> Pair:
    gate, x = (primal.astype(mx.float32) for primal in _after(primals, cotangent))
    by_gate, by_x = _by_gated(gate, x, cotangent)
    return by_gate.astype(primals[0].dtype), by_x.astype(primals[1].dtype)


@mx.custom_function  # type: ignore[untyped-decorator]
def _silu(x: mx.array) -> mx.array:
    return _switched(x)  # type: ignore[no-any-return]


@_silu.vjp  # type: ignore[untyped-decorator]
def _silu_vjp(x: mx.array, cotangent: mx.array, _: Any) -> mx.array:
    return _by_switched(*_after([x], cotangent), cotangent)  # type: ignore[no-any-return]


def _after(primals: Any, cotangent: mx.array) -> list[mx.array]:
    """The inputs, once the cotangent is there: else a compiled graph would keep what the forward pass has computed."""
    return list(mx.depends(list(primals), [cotangent]))


@mx.compile  # type: ignore[untyped-decorator]
def _gated(gate: mx.array, x: mx.array) -> mx.array:
    return gate * elementary.sigmoid(gate) * x


@mx.compile  # type: ignore[untyped-decorator]
def _by_gated(gate: mx.array, x: mx.array, cotangent: mx.array) -> Pair:
    switch = elementary.sigmoid(gate)
    passed = gate * switch
    return cotangent * x * (switch + passed * (1 - switch)), cotangent * passed


@mx.compile  # type: ignore[untyped-decorator]
def _switched(x: mx.array) -> mx.array:
    return x * elementary.sigmoid(x)


@mx.compile  # type: ignore[untyped-decorator]
def _by_switched(x: mx.array, cotangent: mx.array) -> mx.array:
    switch = elementary.sigmoid(x)
    return cotangent * switch * (1 + x * (1 - switch))
