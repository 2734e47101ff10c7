"""Recurrences to compare with: mlx_lm's own loops, and a loop in float64 with a backward pass written by hand.

S ← S Diag(α);  δ = β (v - S k), or v where there is no β;  S ← S + δ kᵀ;  y = S q
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import bailing_hybrid, bailing_moe_linear, gated_delta, ssm

from mlx_lora.models import recurrence

Inputs = dict[str, mx.array]
Numbers = dict[str, np.ndarray]


@dataclass(frozen=True)
class Kind:
    """`inputs` by name in the order of the arguments; those of `rows` have a time axis, at `axis`; one is the state."""

    inputs: Callable[..., Inputs]
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    rows: tuple[str, ...]
    state: str
    axis: int = 1
    options: dict[str, Any] = field(default_factory=dict)


def gated(*, channels: bool = False, **options: Any) -> Kind:
    def inputs(length: int, *, lines: int = 2, keys: int = 2, heads: int = 4, k: int = 16, v: int = 12) -> Inputs:
        mx.random.seed(length)
        r = mx.random.normal
        q, keyed = gated_delta.normalize_qk(
            r((lines, length, keys, k)), r((lines, length, keys, k)), inv_scale=k**-0.5, eps=1e-6
        )
        gate = (heads, k) if channels else (heads,)
        return {
            "q": q, "k": keyed, "v": r((lines, length, heads, v)), "a": r((lines, length, *gate)),
            "b": r((lines, length, heads)), "A_log": r((heads, 1) if channels else (heads,)), "dt_bias": r(gate),
            "state": r((lines, heads, v, k)) * 0.3,
        }  # fmt: skip

    def theirs(*arrays: mx.array, mask: mx.array | None = None) -> Any:
        return gated_delta.gated_delta_update(*arrays, mask, use_kernel=False, **options)

    def ours(*arrays: mx.array, mask: mx.array | None = None, segments: mx.array | None = None) -> Any:
        found = {"use_kernel": False, "segments": segments, **options}
        return recurrence.gated_delta_update(*arrays, mask, **found)

    return Kind(inputs, ours, theirs, ("q", "k", "v", "a", "b"), "state", options=options)


def mamba() -> Kind:
    def inputs(length: int, *, lines: int = 2, keys: int = 2, heads: int = 4, k: int = 16, v: int = 12) -> Inputs:
        mx.random.seed(length)
        r = mx.random.normal
        return {
            "x": r((lines, length, heads, v)), "A_log": r((heads,)), "B": r((lines, length, keys, k)),
            "C": r((lines, length, keys, k)), "D": r((heads,)), "dt": r((lines, length, heads)), "dt_bias": r((heads,)),
            "state": r((lines, heads, v, k)),
        }  # fmt: skip

    def theirs(*arrays: mx.array, mask: mx.array | None = None) -> Any:
        return ssm.ssm_attn(*arrays, mask=mask)

    def ours(*arrays: mx.array, mask: mx.array | None = None, segments: mx.array | None = None) -> Any:
        return recurrence.ssm_update(*arrays, (0.001, 100.0), mask, segments=segments)

    return Kind(inputs, ours, theirs, ("x", "B", "C", "dt"), "state")


def lightning(*, masked: bool) -> Kind:
    def inputs(length: int, *, lines: int = 2, keys: int = 4, heads: int = 4, k: int = 16, v: int = 12) -> Inputs:
        mx.random.seed(length)
        r = mx.random.normal
        return {
            "q": r((lines, heads, length, k)), "k": r((lines, heads, length, k)), "v": r((lines, heads, length, v)),
            "g": -mx.exp(mx.linspace(-6, -0.5, heads)), "h": r((lines, heads, k, v)),
        }  # fmt: skip

    def theirs(q: mx.array, k: mx.array, v: mx.array, g: mx.array, h: mx.array, mask: mx.array | None = None) -> Any:
        if masked:
            return bailing_hybrid.recurrent_gla(q, k, v, g, scale=0.25, h=h, mask=mask)
        return bailing_moe_linear.recurrent_gla(q, k, v, g, 0.25, h)

    def ours(
        q: mx.array, k: mx.array, v: mx.array, g: mx.array, h: mx.array, mask: Any = None, segments: Any = None
    ) -> Any:
        return recurrence.recurrent_gla(q, k, v, g, scale=0.25, h=h, mask=mask, segments=segments)

    return Kind(inputs, ours, theirs, ("q", "k", "v"), "h", axis=2)


KINDS = {
    "gated": gated(),
    "gated, negative": gated(allow_neg_eigval=True),
    "channels": gated(channels=True),
    "channels, bounded": gated(channels=True, lower_bound=-5.0),
    "mamba": mamba(),
    "lightning": lightning(masked=False),
    "lightning, masked": lightning(masked=True),
}


def exact(name: str, inputs: Inputs, weights: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, Numbers]:
    """y, the state and all gradients of Σ y w₀ + Σ state w₁ in float64, of the kind of this name."""
    found = {key: np.array(x).astype(np.float64) for key, x in inputs.items()}
    family = {"m": _exact_mamba, "l": _exact_lightning}.get(name[0], _exact_gated)
    return family(found, weights, KINDS[name].options)


def _exact_gated(x: Numbers, weights: Any, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, Numbers]:
    z, rate, bound = x["a"] + x["dt_bias"], np.exp(x["A_log"]), options.get("lower_bound")
    if bound is None:
        logarithm, by_rate = -rate * np.logaddexp(z, 0), -rate * np.logaddexp(z, 0)
        by_z = -rate / (1 + np.exp(-z))
    else:
        switch = 1 / (1 + np.exp(-rate * z))
        logarithm, slope = bound * switch, bound * switch * (1 - switch)
        by_z, by_rate = slope * rate, slope * rate * z
    alpha, most = np.exp(logarithm), 2.0 if options.get("allow_neg_eigval") else 1.0
    beta = most / (1 + np.exp(-x["b"]))
    wide = alpha if alpha.ndim == 4 else alpha[..., None]
    y, state, by = loop(x["q"], x["k"], x["v"], wide, beta, x["state"], *weights)
    by_log = by["alpha"].sum(axis=-1, keepdims=True) if alpha.ndim == 3 else by["alpha"]
    by_log = by_log.reshape(alpha.shape) * alpha
    by_a = by_log * by_z
    gradients = {
        **by, "a": by_a, "b": by["beta"] * beta * (1 - beta / most), "dt_bias": by_a.sum(axis=(0, 1)),
        "A_log": (by_log * by_rate).sum(axis=(0, 1)).reshape(len(rate), -1).sum(axis=1).reshape(rate.shape),
    }  # fmt: skip
    return y, state, gradients


def _exact_mamba(x: Numbers, weights: Any, _: Any) -> tuple[np.ndarray, np.ndarray, Numbers]:
    z, rate = x["dt"] + x["dt_bias"], np.exp(x["A_log"])
    step = np.clip(np.logaddexp(z, 0), 0.001, 100.0)
    alpha = np.exp(-rate * step)
    y, state, by = loop(x["C"], x["B"], step[..., None] * x["x"], alpha[..., None], None, x["state"], *weights)
    by_log = by["alpha"].sum(axis=-1) * alpha
    by_dt = (by_log * -rate + (by["v"] * x["x"]).sum(axis=-1)) / (1 + np.exp(-z)) * (np.logaddexp(z, 0) > 0.001)
    skip = x["D"][:, None]
    gradients = {
        "C": by["q"], "B": by["k"], "state": by["state"], "dt": by_dt, "dt_bias": by_dt.sum(axis=(0, 1)),
        "x": by["v"] * step[..., None] + weights[0] * skip, "D": (weights[0] * x["x"]).sum(axis=(0, 1, 3)),
        "A_log": (by_log * -rate * step).sum(axis=(0, 1)),
    }  # fmt: skip
    return y + x["x"] * skip, state, gradients


def _exact_lightning(x: Numbers, weights: Any, _: Any) -> tuple[np.ndarray, np.ndarray, Numbers]:
    def turned(array: np.ndarray) -> np.ndarray:
        return array.swapaxes(1, 2)

    q, k, v = (turned(x[key]) for key in "qkv")
    alpha = np.broadcast_to(np.exp(x["g"]), q.shape[:3])[..., None]
    state_weights = weights[1].swapaxes(-1, -2)
    y, state, by = loop(q * 0.25, k, v, alpha, None, x["h"].swapaxes(-1, -2), turned(weights[0]), state_weights)
    gradients = {
        "q": turned(by["q"]) * 0.25, "k": turned(by["k"]), "v": turned(by["v"]), "h": by["state"].swapaxes(-1, -2),
        "g": (by["alpha"].sum(axis=-1) * alpha[..., 0]).sum(axis=(0, 1)),
    }  # fmt: skip
    return turned(y), state.swapaxes(-1, -2), gradients


def loop(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, alpha: np.ndarray, beta: np.ndarray | None, state: np.ndarray,
    by_y: np.ndarray, by_state: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, Numbers]:  # fmt: skip
    """y (B, T, H, Dv), the state (B, H, Dv, Dk), gradients by name, given those of the two; α (B, T, H, 1 or Dk)."""
    groups = v.shape[2] // q.shape[2]
    q, k = np.repeat(q, groups, axis=2), np.repeat(k, groups, axis=2)
    rates = np.ones(v.shape[:3]) if beta is None else beta
    known = 0.0 if beta is None else 1.0
    states, made, deltas = [state], [], []
    for t in range(q.shape[1]):
        decayed = states[-1] * alpha[:, t, :, None, :]
        deltas.append(v[:, t] - known * np.einsum("bhvk,bhk->bhv", decayed, k[:, t]))
        states.append(decayed + np.einsum("bhv,bhk->bhvk", deltas[-1] * rates[:, t, :, None], k[:, t]))
        made.append(np.einsum("bhvk,bhk->bhv", states[-1], q[:, t]))
    by = {name: np.zeros(x.shape) for name, x in {"q": q, "k": k, "v": v, "beta": rates, "alpha": k}.items()}
    for t in reversed(range(q.shape[1])):
        by["q"][:, t] = np.einsum("bhvk,bhv->bhk", states[t + 1], by_y[:, t])
        by_state = by_state + np.einsum("bhv,bhk->bhvk", by_y[:, t], q[:, t])
        rate = rates[:, t, :, None]
        by_delta = np.einsum("bhvk,bhk->bhv", by_state, k[:, t])
        by["beta"][:, t] = (by_delta * deltas[t]).sum(axis=-1)
        by["v"][:, t] = by_delta * rate
        decayed = states[t] * alpha[:, t, :, None, :]
        by["k"][:, t] = np.einsum("bhvk,bhv->bhk", by_state, deltas[t] * rate)
        by["k"][:, t] -= known * np.einsum("bhvk,bhv->bhk", decayed, by_delta * rate)
        by_state = by_state - known * np.einsum("bhv,bhk->bhvk", by_delta * rate, k[:, t])
        by["alpha"][:, t] = (by_state * states[t]).sum(axis=-2)
        by_state = by_state * alpha[:, t, :, None, :]
    shape = (*q.shape[:2], -1, groups, q.shape[-1])
    by["q"], by["k"] = by["q"].reshape(shape).sum(axis=3), by["k"].reshape(shape).sum(axis=3)
    return np.stack(made, axis=1), states[-1], {**by, "state": by_state}
