"""Objects that take the place of a part of a model while the rest of it runs its own code.

    FixedTrunk       a trunk that returns the hidden states it was made with: only the model's own head runs
    PassThrough      a layer that computes nothing: it returns its input, or the hidden states it was made with
    FixedInput       a layer that computes from the hidden states it was made with, whatever it is called with
    CallRecorder     a layer that records what it is called with
    RecordingCache   a layer's cache that records the keys and values which attention gives it
    FixedCache       a layer's cache that returns the keys and values it was made with

What stand-ins leave unused (embedding lookups, for one) is never evaluated, since MLX is lazy.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.errors import ModelError
from mlx_lora.models.trunk.layers import layers_of, name_of_list


class _Lending:
    """Lends the attributes of what it stands for: some models look at their layers' own."""

    def __init__(self, original: nn.Module):
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class FixedTrunk(_Lending):
    """Stands in for a trunk: returns `hidden`."""

    def __init__(self, trunk: nn.Module, hidden: mx.array):
        super().__init__(trunk)
        self._hidden = hidden

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        return self._hidden


class PassThrough(_Lending):
    """Stands in for a layer: computes nothing, returns `hidden` or else its input, which is noted as `entered`."""

    def __init__(self, layer: nn.Module, hidden: mx.array | None = None):
        super().__init__(layer)
        self._hidden = hidden
        self.entered: mx.array | None = None

    def __call__(self, x: mx.array, *_: Any, **__: Any) -> mx.array:
        # both are other array objects: some trunks change theirs in place
        self.entered = mx.stop_gradient(x)
        return x if self._hidden is None else self._hidden.astype(self._hidden.dtype)


class FixedInput(_Lending):
    """Stands in for a layer: the layer itself, but what enters it is `hidden`, whatever it is called with."""

    def __init__(self, layer: nn.Module, hidden: mx.array):
        super().__init__(layer)
        self._hidden = hidden

    def __call__(self, _: Any, *arguments: Any, **named: Any) -> Any:
        return self._original(self._hidden, *arguments, **named)


class CallRecorder(_Lending):
    """Stands in for a layer whose parameters are called `names`: notes what it is called with, computes nothing."""

    def __init__(self, layer: nn.Module, names: list[str]):
        super().__init__(layer)
        self._names = names
        self.call: dict[str, Any] = {}

    def __call__(self, *arguments: Any, **named: Any) -> mx.array:
        if self.call:
            raise ModelError("the trunk runs its last layer more than once")
        self.call = dict(zip(self._names, arguments, strict=False)) | named
        return mx.stop_gradient(self.call[self._names[0]])  # another object: some trunks change theirs in place


class RecordingCache:
    """Stands in for a layer's cache: notes the keys and values that attention gives it, and hands them back."""

    def __init__(self, cache: Any = None):
        self.offset = 0 if cache is None else cache.offset
        self.noted: list[tuple[mx.array, mx.array]] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.noted.append((keys, values))
        return keys, values


class FixedCache:
    """A cache whose keys and values are there already; `offset` (B,) is where each line's columns begin."""

    def __init__(self, held: tuple[mx.array, mx.array], offset: mx.array):
        self.offset, self._held = offset, held

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return self._held


def trunk_with(trunk: nn.Module, model: nn.Module, layers: list[Any]) -> Any:
    """The trunk of a model with other layers; its other parts are the very same objects.

    Raises ModelError for a trunk that doesn't keep its layers in one list.
    """
    name = name_of_list(trunk, layers_of(model))
    if name is None:
        raise ModelError("the model doesn't keep its layers in one list")
    shell = copy.copy(trunk)
    shell[name] = layers
    return shell
