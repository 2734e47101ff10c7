"""Attention and recurrences in numpy and float64, a position after another, after their papers' formulas.

What `kernels` holds a device against. As in `reference`, nothing here imports MLX or another room, and nothing is cut
into parts or chunks. Every array has a time axis T, and (B, T, heads, width) is the order of axes but where another is
given.
"""

from __future__ import annotations

import numpy as np


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float, mask: np.ndarray | None = None
) -> np.ndarray:
    """softmax(scale · q kᵀ + mask) v: q (B, heads, T, d), k and v (B, kv heads, S, d), mask of numbers (…, T, S).

    Without a mask a query looks at the keys up to its own position, counted from the last.
    """
    queries, keys = q.shape[2], k.shape[2]
    k, v = (array.repeat(q.shape[1] // k.shape[1], axis=1) for array in (k, v))
    if mask is None:
        mask = np.where(np.tri(queries, keys, keys - queries, dtype=bool), 0, -np.inf)
    scores = scale * q @ k.swapaxes(-1, -2) + mask
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True) @ v)


def gated_delta(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    rate: np.ndarray,
    bias: np.ndarray,
) -> np.ndarray:
    """The gated delta rule (arXiv 2412.06464): S ← α S;  S ← S + β (v - S k) kᵀ;  y = S q.

    log α = -e^rate softplus(a + bias), β = sigmoid(b), both (B, T, heads); q and k have fewer heads.
    """
    q, k = (array.repeat(v.shape[2] // array.shape[2], axis=2) for array in (q, k))
    alpha, beta = np.exp(-np.exp(rate) * np.logaddexp(0, a + bias)), 1 / (1 + np.exp(-b))
    state, made = np.zeros((*v.shape[:1], *v.shape[2:], k.shape[-1])), []
    for t in range(v.shape[1]):
        state = state * alpha[:, t, :, None, None]
        delta = beta[:, t, :, None] * (v[:, t] - np.einsum("bhvk,bhk->bhv", state, k[:, t]))
        state = state + delta[..., None] * k[:, t, :, None]
        made.append(np.einsum("bhvk,bhk->bhv", state, q[:, t]))
    return np.stack(made, axis=1)


def mamba(
    x: np.ndarray,
    rate: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    through: np.ndarray,
    dt: np.ndarray,
    bias: np.ndarray,
) -> np.ndarray:
    """Mamba-2 (arXiv 2405.21060): Δ = softplus(dt + bias);  S ← e^{-e^rate Δ} S + Δ x bᵀ;  y = S c + through · x.

    Δ is at most 100 and at least 0.001; b and c have fewer heads.
    """
    b, c = (array.repeat(x.shape[2] // array.shape[2], axis=2) for array in (b, c))
    wide = np.clip(np.logaddexp(0, dt + bias), 0.001, 100)
    state, made = np.zeros((*x.shape[:1], *x.shape[2:], b.shape[-1])), []
    for t in range(x.shape[1]):
        step = wide[:, t, :, None, None]
        state = np.exp(-np.exp(rate)[:, None, None] * step) * state + step * x[:, t, ..., None] * b[:, t, :, None]
        made.append(np.einsum("bhvk,bhk->bhv", state, c[:, t]) + through[:, None] * x[:, t])
    return np.stack(made, axis=1)


def lightning(q: np.ndarray, k: np.ndarray, v: np.ndarray, decay: np.ndarray, *, scale: float) -> np.ndarray:
    """Lightning attention (arXiv 2401.04658): h ← e^decay h + kᵀ v;  y = scale · q h, all (B, heads, T, width)."""
    state, made = np.zeros((*q.shape[:2], q.shape[-1], v.shape[-1])), []
    for t in range(q.shape[2]):
        state = np.exp(decay)[:, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
        made.append(scale * np.einsum("bhk,bhkv->bhv", q[:, :, t], state))
    return np.stack(made, axis=2)
