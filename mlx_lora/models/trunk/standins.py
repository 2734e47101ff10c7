"""Objects that take the place of a part of a model while the rest of it runs its own code.

    FixedTrunk       a trunk that returns the hidden states it was made with: only the model's own head runs
    PassThrough      a layer that computes nothing: it returns its input, or the hidden states it was made with
    FixedInput       a layer that computes from the hidden states it was made with, whatever it is called with
    CallRecorder     a layer that records what it is called with
    RecordingCache   a layer's cache that records the keys and values which attention gives it
    FixedCache       a layer's cache that returns the keys and values it was made with

What a stand-in doesn't use (an embedding lookup, for example) is never evaluated, since MLX is lazy.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.errors import ModelError
from mlx_lora.models.trunk.layers import layers_of, name_of_list


class _StandIn:
    """Forwards attribute access to the module that it replaces: some models read attributes of their layers."""

    def __init__(self, original: nn.Module):
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class FixedTrunk(_StandIn):
    """Replaces a trunk: returns `hidden`."""

    def __init__(self, trunk: nn.Module, hidden: mx.array):
        super().__init__(trunk)
        self._hidden = hidden

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        return self._hidden


class PassThrough(_StandIn):
    """Replaces a layer: returns `hidden`, or its input if there is none. `entered` is the input."""

    def __init__(self, layer: nn.Module, hidden: mx.array | None = None):
        super().__init__(layer)
        self._hidden = hidden
        self.entered: mx.array | None = None

    def __call__(self, x: mx.array, *_: Any, **__: Any) -> mx.array:
        # both arrays are new objects, because some trunks change theirs in place
        self.entered = mx.stop_gradient(x)
        return x if self._hidden is None else self._hidden.astype(self._hidden.dtype)


class FixedInput(_StandIn):
    """Replaces a layer: calls it with `hidden` in place of its input."""

    def __init__(self, layer: nn.Module, hidden: mx.array):
        super().__init__(layer)
        self._hidden = hidden

    def __call__(self, _: Any, *arguments: Any, **named: Any) -> Any:
        return self._original(self._hidden, *arguments, **named)


class CallRecorder(_StandIn):
    """Replaces a layer whose parameters are called `names`: records its arguments by name, computes nothing."""

    def __init__(self, layer: nn.Module, names: list[str]):
        super().__init__(layer)
        self._names = names
        self.call: dict[str, Any] = {}

    def __call__(self, *arguments: Any, **named: Any) -> mx.array:
        if self.call:
            raise ModelError("the trunk runs its last layer more than once")
        self.call = dict(zip(self._names, arguments, strict=False)) | named
        return mx.stop_gradient(self.call[self._names[0]])  # a new object: some trunks change theirs in place


class RecordingCache:
    """Replaces a layer's cache: records the keys and values that attention passes to it, and returns them unchanged."""

    def __init__(self, cache: Any = None):
        self.offset = 0 if cache is None else cache.offset
        self.recorded: list[tuple[mx.array, mx.array]] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.recorded.append((keys, values))
        return keys, values


class FixedCache:
    """A cache that already has its keys and values; `offset` (B,) is the position of each line's first column."""

    def __init__(self, keys_and_values: tuple[mx.array, mx.array], offset: mx.array):
        self.offset, self._keys_and_values = offset, keys_and_values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return self._keys_and_values


def trunk_with(trunk: nn.Module, model: nn.Module, layers: list[Any]) -> Any:
    """A copy of a model's trunk with other layers; its other parts are the same objects.

    Raises ModelError for a trunk that doesn't keep its layers in one list.
    """
    name = name_of_list(trunk, layers_of(model))
    if name is None:
        raise ModelError("the model doesn't keep its layers in one list")
    shell = copy.copy(trunk)
    shell[name] = layers
    return shell
