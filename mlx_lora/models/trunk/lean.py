"""Attention, gated activations and recurrences that keep their inputs for the backward pass and compute the rest again.

What a layer keeps decides how long a row fits in memory: attention's scores grow with the square of its length, and a
gated activation holds five arrays of the widest size where two are enough. Both are cheap to compute again, unlike the
matrix products around them. mlx-lm's layers call one function for each, so the layers run here with their own code and
two functions of ours in place of mlx-lm's, object by object and undone on leaving; no class and no module is patched.

Attention runs over a few queries at a time, so no square of scores is ever held; under a causal mask the keys behind a
part are left out, which halves the work of long rows. A mask that is an array (packed rows, some sliding windows) is a
square of its own, of one byte an entry, and leaves no keys out. A mask of numbers is added to the scores and gets a
gradient: latent attention (DeepSeek, GLM, Kimi, LongCat) hands over scores of trained positions that way.

Recurrences run in the exact chunked forms of `models.recurrence`.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import device
from mlx_lora.models.recurrence import (
    CausalConv1d,
    current_segments,
    gated_delta_update,
    is_short,
    recurrent_gla,
    resetting,
    ssm_update,
)
from mlx_lora.models.trunk.segments import segments_of

with device.file_limits_kept():
    from mlx_lm.models import activations, bailing_hybrid, bailing_moe_linear, base, gated_delta, ssm

# Bytes of the scores of one part of the queries; a GPU wants more of them at a time.
SCORES_BYTES, SCORES_BYTES_GPU = 16 << 20, 128 << 20


@contextmanager
def lean(layers: list[nn.Module], *, without: frozenset[str] = frozenset()) -> Iterator[None]:
    """While the block runs, `layers` keep less for the backward pass; on a GPU, evaluation is left as it is.

    Recurrences and short convolutions also stop at the borders of packed rows. `without` names PARTS that stay
    mlx-lm's own.
    """
    modules = {id(module): module for layer in layers for module in layer.modules()}  # some are shared
    classes = {key: cls for key, module in modules.items() if (cls := _lean_class_of(module, without))}
    running = [layer for layer in layers if any(keeps_state(module) for module in layer.modules())]
    classes |= {
        id(layer): _resetting_class(classes.get(id(layer), type(layer)))  # type: ignore[arg-type]
        for layer in running
    }
    originals = {key: type(modules[key]) for key in classes}
    try:
        for key, cls in classes.items():
            modules[key].__class__ = cls
        yield
    finally:
        for key, original in originals.items():
            modules[key].__class__ = original


def _lean_class_of(module: nn.Module, without: frozenset[str]) -> type[nn.Module] | None:
    """The class that a module is given, or None where it stays as it is."""
    if type(module) is nn.Conv1d:
        return CausalConv1d if "convolution" not in without and is_short(module) else None
    return _lean_class(type(module), without)  # type: ignore[arg-type]


def keeps_state(module: nn.Module) -> bool:
    """Whether a module carries something from position to position that isn't attention's."""
    return type(module) is nn.Conv1d or not RUNNING.isdisjoint(_replaced(type(module)))  # type: ignore[arg-type]


@lru_cache
def _resetting_class(original: type[nn.Module]) -> type[nn.Module]:
    """A layer that tells what runs inside it where packed rows begin, which its cache knows."""

    def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        segments = segments_of([*arguments, *named.values()])
        if segments is None:
            return original.__call__(self, *arguments, **named)
        with resetting(segments):
            return original.__call__(self, *arguments, **named)

    return type(f"Resetting{original.__name__}", (original,), {"__call__": call})


@lru_cache
def _lean_class(original: type[nn.Module], without: frozenset[str]) -> type[nn.Module] | None:
    """A subclass whose methods call the lean functions, or None where they would call none."""
    methods = {name: made for name, method in _methods(original) if (made := _changed(method, without))}
    return type(f"Lean{original.__name__}", (original,), methods) if methods else None


@lru_cache
def _replaced(original: type[nn.Module]) -> frozenset[str]:
    """The PARTS that a class's methods call."""
    return frozenset(part for _, method in _methods(original) for part, *_ in _calls(method))


def _methods(original: type[nn.Module]) -> Iterator[tuple[str, types.FunctionType]]:
    for name in dir(original):
        method = inspect.getattr_static(original, name)
        if isinstance(method, types.FunctionType):
            yield name, method


def _calls(method: types.FunctionType) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """(part, name, ours) of each function that a method calls by name and that has one in its place."""
    for part, name, theirs, ours in FUNCTIONS:
        if name in method.__code__.co_names and method.__globals__.get(name) is theirs:
            yield part, name, ours


def _changed(method: types.FunctionType, without: frozenset[str]) -> Callable[..., Any] | None:
    """A method that calls the lean functions while training, or None where it would call none."""
    ours = {name: function for part, name, function in _calls(method) if part not in without}
    if not ours:
        return None
    again = types.FunctionType(
        method.__code__, {**method.__globals__, **ours}, method.__name__, method.__defaults__, method.__closure__
    )
    again.__kwdefaults__ = method.__kwdefaults__

    def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        own = device.on_gpu() and not self.training and current_segments() is None
        return (method if own else again)(self, *arguments, **named)

    return call


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) · x, keeping gate and x."""
    return _swiglu(gate, x)  # type: ignore[no-any-return]


@mx.custom_function  # type: ignore[untyped-decorator]
def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return gate * device.sigmoid(gate) * x


@_swiglu.vjp  # type: ignore[untyped-decorator]
def _swiglu_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, _: Any) -> tuple[mx.array, mx.array]:
    gate, x = mx.depends(list(primals), [cotangent])  # or a compiled graph would keep what it has computed before
    switch = device.sigmoid(gate)
    passed = gate * switch
    return cotangent * x * (switch + passed * (1 - switch)), cotangent * passed


def scaled_dot_product_attention(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, sinks: Any = None
) -> mx.array:
    """softmax(scale · q kᵀ + mask) v, keeping q, k and v; (B, heads, T, d) with fewer heads of keys and values.

    Quantized caches and attention sinks take mlx-lm's own way.
    """
    if hasattr(cache, "bits") or sinks is not None:
        return base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)  # type: ignore[no-any-return]
    masks = [mask] if isinstance(mask, mx.array) else []
    return _attention(scale, mask == "causal" if not masks else False)(queries, keys, values, *masks)


def _parts(queries: mx.array, keys: mx.array, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Which queries run together, and the keys that they may look at."""
    lines, heads, length, _ = queries.shape
    before = keys.shape[2] - length
    size = SCORES_BYTES_GPU if device.on_gpu() else SCORES_BYTES
    count = -(-queries.dtype.size * lines * heads * length * keys.shape[2] // size)
    step = -(-length // count)
    for start in range(0, length, step):
        end = min(start + step, length)
        yield slice(start, end), slice(0, before + end if causal else None)


def _probabilities(
    queries: mx.array, keys: mx.array, here: slice, masks: Sequence[mx.array], scale: float, causal: bool
) -> mx.array:
    """(B, kv heads, queries of a key, part, keys)."""
    scores = (queries * scale) @ keys.swapaxes(-1, -2)
    if causal:
        first = keys.shape[-2] - (here.stop - here.start)
        allowed = mx.arange(first, keys.shape[-2])[:, None] >= mx.arange(keys.shape[-2])
        scores = mx.where(allowed, scores, mx.finfo(scores.dtype).min)
    for mask in masks:
        mask = _grouped(mask, scores)[..., here, :] if mask.shape[-2] > 1 else _grouped(mask, scores)
        boolean = mask.dtype == mx.bool_
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min) if boolean else scores + mask.astype(scores.dtype)
    return device.softmax(scores)


@lru_cache
def _attention(scale: float, causal: bool) -> Callable[..., mx.array]:
    @mx.custom_function  # type: ignore[untyped-decorator]
    def attend(queries: mx.array, keys: mx.array, values: mx.array, *masks: mx.array) -> mx.array:
        if device.on_gpu():  # its kernel holds no square either
            mask = "causal" if causal else masks[0] if masks else None
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
        grouped, k, v = _by_key(queries, keys), keys[:, :, None], values[:, :, None]
        made = [grouped]
        for here, seen in _parts(queries, keys, causal):
            (part,) = mx.depends([grouped[..., here, :]], made[-1:])  # one after another
            made.append(_probabilities(part, k[..., seen, :], here, masks, scale, causal) @ v[..., seen, :])
        return _joined(made[1:]).reshape(*queries.shape[:-1], values.shape[-1])

    @attend.vjp  # type: ignore[untyped-decorator]
    def attend_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        queries, keys, values, *masks = mx.depends(list(primals), [cotangent])
        grouped, k, v = _by_key(queries, keys), keys[:, :, None], values[:, :, None]
        out = cotangent.reshape(*grouped.shape[:-1], values.shape[-1])
        by_queries: list[mx.array] = []
        by_masks: list[list[mx.array]] = [[] for _ in masks]
        by_keys = by_values = None
        after, length = [grouped], keys.shape[2]
        for here, seen in _parts(queries, keys, causal):
            (part,) = mx.depends([grouped[..., here, :]], after)
            chosen = _probabilities(part, k[..., seen, :], here, masks, scale, causal)
            by_chosen = out[..., here, :] @ v[..., seen, :].swapaxes(-1, -2)
            by_sums = chosen * (by_chosen - (chosen * by_chosen).sum(axis=-1, keepdims=True))  # of scores and mask
            by_scores = by_sums * scale
            by_queries.append(by_scores @ k[..., seen, :])
            by_keys = _added(by_keys, (by_scores.swapaxes(-1, -2) @ part).sum(axis=2), length)
            by_values = _added(by_values, (chosen.swapaxes(-1, -2) @ out[..., here, :]).sum(axis=2), length)
            for of_mask, mask in zip(by_masks, masks, strict=True):
                of_mask.append(_summed_like(mask, by_sums))
            after = [by_queries[-1], by_keys, by_values]
        of_masks = (_gradient_of(mask, parts) for mask, parts in zip(masks, by_masks, strict=True))
        return (_joined(by_queries).reshape(queries.shape), by_keys, by_values, *of_masks)

    return attend  # type: ignore[no-any-return]


def _by_key(queries: mx.array, keys: mx.array) -> mx.array:
    """Queries (B, heads, T, d) by the head of keys that they look at: (B, kv heads, queries of a key, T, d)."""
    lines, heads, length, width = queries.shape
    return queries.reshape(lines, keys.shape[1], heads // keys.shape[1], length, width)


def _grouped(mask: mx.array, scores: mx.array) -> mx.array:
    """A mask that fits scores (B, heads, T, T), as one that fits them by head of keys."""
    if mask.ndim < 3 or mask.shape[-3] == 1:
        return mask if mask.ndim < 3 else mask[..., None, :, :]
    return mask.reshape(*mask.shape[:-3], *scores.shape[1:3], *mask.shape[-2:])


def _summed_like(mask: mx.array, by_sums: mx.array) -> mx.array:
    """What a part of the queries (B, kv heads, queries of a key, part, keys) adds to a mask's gradient.

    (B, heads, part, keys), summed over the axes along which the mask is broadcast.
    """
    lines, _, _, part, seen = by_sums.shape
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    broadcast = [axis for axis in range(4) if shape[axis] == 1]
    return by_sums.reshape(lines, -1, part, seen).sum(axis=broadcast, keepdims=True)


def _gradient_of(mask: mx.array, parts: list[mx.array]) -> mx.array:
    """A mask's gradient from its parts; zeros for a boolean one. It is computed only where something asks for it."""
    if mask.dtype == mx.bool_:
        return mx.broadcast_to(mx.zeros((), mask.dtype), mask.shape)
    whole = _joined(parts) if mask.shape[-2] > 1 else sum(parts[1:], start=parts[0])
    return whole.reshape(mask.shape).astype(mask.dtype)


def _added(total: mx.array | None, part: mx.array, length: int) -> mx.array:
    """`total` plus what the first keys of `length` get."""
    missing = length - part.shape[2]
    part = mx.pad(part, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else part
    return part if total is None else total + part


def _joined(parts: list[mx.array]) -> mx.array:
    """Parts of the queries behind one another."""
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-2)


# part, the name that mlx-lm's layers call a function by, mlx-lm's function, and the one in its place
FUNCTIONS: list[tuple[str, str, Any, Callable[..., Any]]] = [
    ("activation", "swiglu", activations.swiglu, swiglu),
    ("attention", "scaled_dot_product_attention", base.scaled_dot_product_attention, scaled_dot_product_attention),
    ("recurrence", "gated_delta_update", gated_delta.gated_delta_update, gated_delta_update),
    ("recurrence", "ssm_update", ssm.ssm_update, ssm_update),
    ("recurrence", "recurrent_gla", bailing_moe_linear.recurrent_gla, recurrent_gla),
    ("recurrence", "recurrent_gla", bailing_hybrid.recurrent_gla, recurrent_gla),
]
# What runs along the row, and stops at the borders of packed rows only in our form.
RUNNING = frozenset({"recurrence", "convolution"})
PARTS = frozenset(part for part, *_ in FUNCTIONS) | RUNNING
