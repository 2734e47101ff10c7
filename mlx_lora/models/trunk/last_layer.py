"""Run the last layer only for the positions whose outputs the loss uses.

    layer 30    keys, values    x x x x x x x x       needed at all positions: attention reads them
                the rest        . . . . . q q q       needed only at the positions that have a loss

A layer's output at one position affects other positions only through the next layer's attention. The last layer has
no next layer, so its queries, attention output and MLP are needed only at the positions that have a loss. With a long
prompt and a short answer, that is a small part of the row.

The layer's own code runs twice. The first run is on all positions, but MLX is lazy and evaluates only its keys and
values. The second run is on consecutive columns of each line, with a cache that returns those keys and values.
Layers that cache something else (a state, shared keys, chunks) fail `verify.py`'s comparison; then the trunk runs
unchanged.
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
    takes no mask or no cache, or caches anything other than keys and values.
    """
    layers = layers_of(trunk.model)
    recorder = CallRecorder(layers[-1], names_of(layers[-1]))
    if start:
        trunk.above(x, start, cache, final=recorder)
    else:
        trunk_with(trunk.module, trunk.model, [*layers[:-1], recorder])(x, cache=cache)
    return trunk.above(columns_of_layer(layers[-1], recorder.call, columns), len(layers))


def columns_of_layer(layer: nn.Module, call: dict[str, Any], columns: mx.array) -> mx.array:
    """A layer's output, (B, M, d), for `columns` (B, M) of each line; `call` has all its arguments by name."""
    x = call[names_of(layer)[0]]
    lines, length = x.shape[:2]
    recorder = RecordingCache(call.get("cache"))
    layer(**{**call, "cache": recorder})
    if len(recorder.recorded) != 1:
        raise ModelError("the last layer keeps something else than keys and values")
    indices = columns[..., None]
    arguments = {
        name: mx.take_along_axis(value, indices, axis=1)
        for name, value in call.items()
        if isinstance(value, mx.array) and value.ndim == 3 and value.shape[:2] == (lines, length)
    }
    arguments["mask"] = rows_of_mask(call.get("mask"), columns, length)
    return layer(**{**call, **arguments, "cache": FixedCache(recorder.recorded[0], recorder.offset + columns[:, 0])})


def names_of(layer: nn.Module) -> list[str]:
    """The names of the parameters of a layer's `__call__`. Raises ModelError if no mask or no cache is among them."""
    names = list(inspect.signature(_model_call(layer)).parameters)[1:]
    if not {"mask", "cache"} <= set(names[1:]):
        raise ModelError("the last layer takes no mask or no cache")
    return names


def _model_call(layer: nn.Module) -> Any:
    """The `__call__` of the model's own class, even while the layer has one of our subclasses as its class."""
    for cls in type(layer).__mro__:
        call = cls.__dict__.get("__call__")
        if call is not None and not cls.__module__.startswith("mlx_lora."):
            return call
    raise ModelError("the last layer is never called")


def rows_of_mask(mask: Any, columns: mx.array, length: int) -> mx.array | None:
    """The rows `columns` (B, M) of a mask over `length` positions: (B, …, M, length). None, for no mask, stays None."""
    if mask is None:
        return None
    if isinstance(mask, str):  # causal
        return (columns[..., None] >= mx.arange(length))[:, None]
    if mask.ndim == 2:
        return mask[columns][:, None]
    indices = columns.reshape(columns.shape[0], *(1 for _ in mask.shape[1:-2]), columns.shape[1], 1)
    return mx.take_along_axis(mask, indices, axis=-2)
