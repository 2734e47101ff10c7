"""The last layer, run for the positions that lead to a loss alone.

    layer 30    keys, values    x x x x x x x x       attention looks at all of them
                the rest        . . . . . q q q       whose outputs the loss reads

What a layer makes of a position reaches other positions only through the next layer's attention. Behind the last one
there is none: queries, attention's output and the MLP are needed only where there is loss, which on rows of a long
prompt and a short answer is a small part. The model's own code runs twice: once on all positions, of which only keys
and values are ever evaluated, since MLX is lazy; and once on consecutive columns of each line, as if they came after
the others, with a cache that holds those keys and values. Layers that keep something else (a state, shared keys,
chunks) fail the comparison that is made before any of this is used, and the trunk runs as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.errors import ModelError
from mlx_lora.models.trunk.prefix import Below, trunk_with
from mlx_lora.models.trunk.split import Split, layers_of

# Largest distance of a position's states from the trunk's own, relative to their norm: other shapes round differently.
TOLERANCE, TOLERANCE_HALF = 1e-4, 5e-2


class _Entry:
    """Stands in for the last layer: notes what it is called with, computes nothing, lends the layer's attributes."""

    def __init__(self, layer: nn.Module, names: list[str]):
        self._layer, self._names = layer, names
        self.call: dict[str, Any] = {}

    def __call__(self, *arguments: Any, **named: Any) -> mx.array:
        if self.call:
            raise ModelError("the trunk runs its last layer more than once")
        self.call = dict(zip(self._names, arguments, strict=False)) | named
        return mx.stop_gradient(self.call[self._names[0]])  # another object: some trunks change theirs in place

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class NotingCache:
    """Stands in for a layer's cache: notes the keys and values that attention gives it, and hands them back."""

    def __init__(self, cache: Any = None):
        self.offset = 0 if cache is None else cache.offset
        self.fetched: list[tuple[mx.array, mx.array]] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.fetched.append((keys, values))
        return keys, values


class _Held:
    """A cache whose keys and values are there already; `offset` (B,) is where each line's columns begin."""

    def __init__(self, held: tuple[mx.array, mx.array], offset: mx.array):
        self.offset, self._held = offset, held

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return self._held


@dataclass(frozen=True)
class LastLayer:
    """`forward` is the last layer's own forward pass, whatever its class becomes later; `names` are its parameters'."""

    parts: Split
    forward: Callable[..., mx.array]
    names: list[str]

    def trunk(
        self, columns: mx.array, tokens: mx.array | None, cache: Any = None, kept: tuple[Below, mx.array] | None = None
    ) -> mx.array:
        """Hidden states after the final norm, (B, M, d), of consecutive `columns` (B, M) of each line.

        The lines are `tokens` (B, T), or `kept`: the trunk above a layer and the states (B, T, d) that enter it.
        """
        layer = layers_of(self.parts.model)[-1]
        entry = _Entry(layer, self.names)
        if kept is not None:
            kept[0].trunk(kept[1], cache, last=entry)
        else:
            trunk_with(self.parts, [*layers_of(self.parts.model)[:-1], entry])(tokens, cache=cache)
        first, call = self.names[0], entry.call
        noted = NotingCache(call.get("cache"))
        self.forward(layer, **{**call, "cache": noted})
        (held,) = noted.fetched
        x = mx.take_along_axis(call[first], columns[..., None], axis=1)
        chosen = {first: x, "mask": rows_of_mask(call.get("mask"), columns, call[first].shape[1])}
        hidden = self.forward(layer, **{**call, **chosen, "cache": _Held(held, noted.offset + columns[:, 0])})
        return Below(self.parts, len(layers_of(self.parts.model))).trunk(hidden)  # the final norm


def rows_of_mask(mask: Any, columns: mx.array, length: int) -> mx.array | None:
    """The rows `columns` (B, M) of a mask over `length` positions: (B, …, M, length). None hides nothing, and stays."""
    if mask is None:
        return None
    if isinstance(mask, str):  # causal
        return (columns[..., None] >= mx.arange(length))[:, None]
    if mask.ndim == 2:
        return mask[columns][:, None]
    places = columns.reshape(columns.shape[0], *(1 for _ in mask.shape[1:-2]), columns.shape[1], 1)
    return mx.take_along_axis(mask, places, axis=-2)


def last_layer(parts: Split) -> LastLayer | None:
    """The last layer on its own, verified on a few tokens against the trunk, or None where it can't be had.

    Needs the model in evaluation mode. `forward` is the method that the layer's class has now. The trial has five
    lines, so that no mask fits where a model has another axis.
    """
    layer = layers_of(parts.model)[-1]
    names = list(inspect.signature(type(layer).__call__).parameters)[1:]
    if not {"mask", "cache"} <= set(names[1:]):
        return None
    last = LastLayer(parts, type(layer).__call__, names)
    starts = mx.array([[3], [6], [0], [5], [2]])
    tokens, columns = (mx.arange(9) * 7 + starts) % 31 + 1, starts + mx.arange(3)
    whole = mx.take_along_axis(parts.trunk(tokens), columns[..., None], axis=1)
    try:
        output = last.trunk(columns, tokens)
        return last if output.shape == whole.shape and _close(output, whole) else None
    except Exception:  # a layer that keeps something else, or takes something else
        return None


def _close(output: mx.array, whole: mx.array) -> bool:
    tolerance = TOLERANCE if whole.dtype == mx.float32 else TOLERANCE_HALF
    output, whole = output.astype(mx.float32), whole.astype(mx.float32)
    distance = mx.linalg.norm(output - whole, axis=-1) / mx.linalg.norm(whole, axis=-1)
    return bool((distance <= tolerance).all().item())
