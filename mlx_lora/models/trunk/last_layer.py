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
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.errors import ModelError
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.standins import CallRecorder, FixedCache, RecordingCache, trunk_with

if TYPE_CHECKING:
    from mlx_lora.models.trunk.trunk import Trunk


def columns_of(trunk: Trunk, x: mx.array, columns: mx.array, start: int = 0, cache: Any = None) -> mx.array:
    """Hidden states after the final norm, (B, M, d), of consecutive `columns` (B, M) of each line.

    `x` are tokens (B, T), or the states (B, T, d) that enter layer `start`. Raises ModelError for a last layer that
    takes no mask and no cache, or keeps something else than keys and values.
    """
    layers = layers_of(trunk.model)
    entry = CallRecorder(layers[-1], names_of(layers[-1]))
    if start:
        trunk.above(x, start, cache, final=entry)
    else:
        trunk_with(trunk.module, trunk.model, [*layers[:-1], entry])(x, cache=cache)
    return trunk.above(columns_of_layer(layers[-1], entry.call, columns), len(layers))


def columns_of_layer(layer: nn.Module, call: dict[str, Any], columns: mx.array) -> mx.array:
    """What a layer makes of `columns` (B, M) of each line, (B, M, d), where it is called with `call`, by name."""
    x = call[names_of(layer)[0]]
    lines, length = x.shape[:2]
    noted = RecordingCache(call.get("cache"))
    layer(**{**call, "cache": noted})
    if len(noted.noted) != 1:
        raise ModelError("the last layer keeps something else than keys and values")
    places = columns[..., None]
    of_columns = {
        name: mx.take_along_axis(value, places, axis=1)
        for name, value in call.items()
        if isinstance(value, mx.array) and value.ndim == 3 and value.shape[:2] == (lines, length)
    }
    of_columns["mask"] = rows_of_mask(call.get("mask"), columns, length)
    return layer(**{**call, **of_columns, "cache": FixedCache(noted.noted[0], noted.offset + columns[:, 0])})


def names_of(layer: nn.Module) -> list[str]:
    """The names of a layer's parameters. Raises ModelError where no mask or no cache is among them."""
    names = list(inspect.signature(_own_call(layer)).parameters)[1:]
    if not {"mask", "cache"} <= set(names[1:]):
        raise ModelError("the last layer takes no mask or no cache")
    return names


def _own_call(layer: nn.Module) -> Any:
    """The forward pass of a layer as the model wrote it, whatever subclass the layer has been given here."""
    for cls in type(layer).__mro__:
        call = cls.__dict__.get("__call__")
        if call is not None and not cls.__module__.startswith("mlx_lora."):
            return call
    raise ModelError("the last layer is never called")


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
