"""LoRA on stacked experts: mlx_lm has an array each for gate, up and down, PEFT a parameter for gate and up together.

PEFT keeps the factors of all experts in two matrices, of rank r on E experts:

    A (E·r, in)     reshaped to (E, r, in): the expert is the outer index of the rows
    B (out, r·E)    reshaped to (out, r, E): the expert is the inner index of the columns

Gate and up have an A each here. Side by side, with B block-diagonal, they are one pair of rank 2r:

    gate_up = B A,   A = [A_gate; A_up],   B = [[B_gate, 0], [0, B_up]]

Read back, blocks of zeros are left out again. A pair that PEFT trained has no such zeros: gate and up both get its
whole A, and their own rows of B.
"""

from __future__ import annotations

import numpy as np

from mlx_lora.interop.neutral import Array, Module

Pair = tuple[Array, Array]


def unstacked(a: Array, b: Array, experts: int) -> Pair:
    """A (E·r, in) and B (out, r·E) as (E, r, in) and (E, out, r)."""
    rank = a.shape[0] // experts
    return a.reshape(experts, rank, -1), np.ascontiguousarray(b.reshape(-1, rank, experts).transpose(2, 0, 1))


def stacked(a: Array, b: Array) -> Pair:
    """(E, r, in) and (E, out, r) as A (E·r, in) and B (out, r·E)."""
    experts, rank, inputs = a.shape
    return a.reshape(experts * rank, inputs), np.ascontiguousarray(b.transpose(1, 2, 0)).reshape(b.shape[1], -1)


def parted(a: Array, b: Array, *, turns: bool) -> dict[str, Pair]:
    """Factors of gate and up, of one pair (E, r, in), (E, 2·out, r) for both. `turns`: their rows take turns in B."""
    rows = (b[:, ::2], b[:, 1::2]) if turns else tuple(np.split(b, 2, axis=1))
    half = a.shape[1] // 2
    gate, up = (np.ascontiguousarray(part) for part in rows)
    if a.shape[1] % 2 == 0 and not gate[..., half:].any() and not up[..., :half].any():
        first, last = slice(0, half), slice(half, None)
        return {
            "gate_proj": (np.ascontiguousarray(a[:, first]), np.ascontiguousarray(gate[..., first])),
            "up_proj": (np.ascontiguousarray(a[:, last]), np.ascontiguousarray(up[..., last])),
        }
    return {"gate_proj": (a, gate), "up_proj": (a, up)}


def joined(gate: Module | None, up: Module | None, *, turns: bool) -> tuple[Array, Array, float]:
    """A (E, r, in), B (E, 2·out, r) and the scale of one pair for gate and up; one that isn't adapted adds nothing."""
    present = gate or up
    assert present is not None and present.a is not None and present.b is not None
    scale = present.scale
    if gate is None or up is None:
        zeros = np.zeros_like(present.b)
        return present.a, _rows(zeros if gate is None else present.b, zeros if up is None else present.b, turns), scale
    assert gate.a is not None and gate.b is not None and up.a is not None and up.b is not None
    up_b = up.b if up.scale == scale else up.b * np.float32(up.scale / scale)
    if gate.a.shape == up.a.shape and np.array_equal(gate.a, up.a):
        return gate.a, _rows(gate.b, up_b, turns), scale
    rank = max(gate.rank, up.rank)
    pairs = [_padded(gate.a, gate.b, rank), _padded(up.a, up_b, rank)]
    zeros = np.zeros_like(pairs[0][1])
    upper = np.concatenate([pairs[0][1], zeros], axis=2)
    lower = np.concatenate([zeros, pairs[1][1]], axis=2)
    return np.concatenate([pairs[0][0], pairs[1][0]], axis=1), _rows(upper, lower, turns), scale


def _rows(gate: Array, up: Array, turns: bool) -> Array:
    if turns:
        return np.stack([gate, up], axis=2).reshape(gate.shape[0], -1, gate.shape[2])
    return np.concatenate([gate, up], axis=1)


def _padded(a: Array, b: Array, rank: int) -> Pair:
    missing = rank - a.shape[1]
    return np.pad(a, ((0, 0), (0, missing), (0, 0))), np.pad(b, ((0, 0), (0, 0), (0, missing)))
