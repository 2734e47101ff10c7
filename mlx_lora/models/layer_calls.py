"""What each layer of a model hands to attention and to recurrences: shapes alone, whatever the architecture.

The model is called on a few tokens with functions that note what they are given in place of those that `trunk.lean`
replaces. Nothing is evaluated: MLX is lazy, and the call is traced and left before anything is compiled, so a model
that looks at a value on the way raises and its layers have no notes. No class and no module is patched.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.machine import allocation
from mlx_lora.models.recurrence import chunks, is_short
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.lean import FUNCTIONS
from mlx_lora.models.trunk.trial import training

with allocation.file_limits_kept():
    from mlx_lm.models.cache import make_prompt_cache

# More than one, and more than a short convolution reads: some layers serve single positions in another way.
TOKENS = 8


@dataclass(frozen=True)
class Scan:
    """A recurrence in chunks. Numbers: `inputs` and `output` a position, `state` after a span of chunks.

    `chunk_bytes` is what a chunk holds in the backward pass, of as many positions as it has on this device: `chunk`.
    """

    inputs: int
    output: int
    state: int
    chunk_bytes: int
    chunk: int = chunks.CHUNK

    def span(self, lines: int, *, gpu: bool) -> int:
        """Positions of a span of `lines` lines, as `recurrence.chunks.span_length` chooses them on that device.

        For another kind of device than this one, a chunk is taken to hold as much a position as here.
        """
        most, chunk = (chunks.SPAN_BYTES_GPU, chunks.CHUNK_GPU) if gpu else (chunks.SPAN_BYTES, chunks.CHUNK)
        return chunk * max(most * self.chunk // (lines * self.chunk_bytes * chunk), 1)


@dataclass
class LayerCalls:
    """Of one layer.

    `attends`: it calls mlx-lm's attention. `scans` are its recurrences. `masked` are its attentions with a mask of
    numbers, each a square of its heads: (heads, numbers a position of queries, keys and values). `convolved` are the
    channels of short convolutions, and `looped` the numbers of a state that a loop of mlx-lm's own carries along.
    """

    attends: bool = False
    scans: list[Scan] = field(default_factory=list)
    masked: list[tuple[int, int]] = field(default_factory=list)
    convolved: int = 0
    looped: int = 0


class _Done(Exception):
    """Everything is noted."""


def layer_calls(model: nn.Module) -> list[LayerCalls]:
    """For each layer of `model`; empty ones for a model that can't be called without evaluating something."""
    layers = layers_of(model)
    found = {id(layer): LayerCalls(convolved=_convolved(layer)) for layer in layers}

    def run(tokens: mx.array) -> mx.array:
        caches = make_prompt_cache(model)
        with _noting(layers, found):
            model(tokens, cache=caches)
        raise _Done

    with training(model), suppress(Exception):
        mx.compile(run)(mx.ones((1, TOKENS), dtype=mx.int32))
    return [found[id(layer)] for layer in layers]


def _convolved(layer: nn.Module) -> int:
    """Channels of a layer's short convolutions."""
    return sum(conv.weight.shape[0] for conv in layer.modules() if isinstance(conv, nn.Conv1d) and is_short(conv))


@contextmanager
def _noting(layers: list[nn.Module], found: dict[int, LayerCalls]) -> Iterator[None]:
    """While the block runs, layers and what is in them note what they are called with."""
    open_layers: list[LayerCalls] = []
    modules = {id(module): module for layer in layers for module in layer.modules()}
    originals = {key: type(module) for key, module in modules.items()}
    try:
        for key, module in modules.items():
            kind = _noting_class(type(module), open_layers)
            module.__class__ = _entered(kind, open_layers, found[key]) if key in found else kind
        yield
    finally:
        for key, original in originals.items():
            modules[key].__class__ = original


def _entered(original: type[nn.Module], open_layers: list[LayerCalls], notes: LayerCalls) -> type[nn.Module]:
    """A layer that says that it runs, and notes what it has left in its cache."""

    def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        open_layers.append(notes)
        try:
            made = original.__call__(self, *arguments, **named)
        finally:
            open_layers.pop()
        if not notes.scans:
            notes.looped = sum(_looped(value, self) for value in [*arguments, *named.values()])
        return made

    return type(original.__name__, (original,), {"__call__": call})


def _looped(cache: Any, layer: nn.Module) -> int:
    """Numbers of the states in a layer's cache: what is not keys and values, nor the input of a short convolution."""
    if hasattr(cache, "caches"):
        return sum(_looped(part, layer) for part in cache.caches)
    states = getattr(cache, "cache", None)
    if not isinstance(states, list):
        return 0
    windows = {
        (1, conv.weight.shape[1] - 1, conv.weight.shape[0]) for conv in layer.modules() if isinstance(conv, nn.Conv1d)
    }
    return sum(state.size for state in states if isinstance(state, mx.array) and state.shape not in windows)


def _noting_class(original: type[nn.Module], open_layers: list[LayerCalls]) -> type[nn.Module]:
    """A subclass whose methods call functions that note, in place of those of `trunk.lean.FUNCTIONS`."""
    attributes: dict[str, Any] = {}
    for base in reversed(original.__mro__):
        attributes.update(vars(base))
    methods = {
        name: _with_globals(method, others)
        for name, method in attributes.items()
        if isinstance(method, types.FunctionType) and (others := _others(method, open_layers))
    }
    return type(original.__name__, (original,), methods) if methods else original


def _others(method: types.FunctionType, open_layers: list[LayerCalls]) -> dict[str, Callable[..., Any]]:
    """The noting functions for those that a method calls by name."""
    return {
        name: _noting_attention(ours, open_layers) if part == "attention" else _noting_scan(ours, open_layers)
        for part, name, theirs, ours in FUNCTIONS
        if part in ("attention", "recurrence") and method.__globals__.get(name) is theirs
    }


def _noting_attention(attend: Callable[..., mx.array], open_layers: list[LayerCalls]) -> Callable[..., mx.array]:
    def call(*given: Any, **named: Any) -> mx.array:
        bound = inspect.signature(attend).bind(*given, **named).arguments
        mask = bound.get("mask")
        if open_layers:
            open_layers[-1].attends = True
        if open_layers and isinstance(mask, mx.array) and mask.ndim == 4 and mx.issubdtype(mask.dtype, mx.floating):
            arrays = [bound[name] for name in ("queries", "keys", "values")]
            open_layers[-1].masked.append((mask.shape[1], sum(array.size for array in arrays) // TOKENS))
        return attend(*given, **named)

    return call


def _noting_scan(update: Any, open_layers: list[LayerCalls]) -> Callable[..., Any]:
    """One of our recurrences, which notes what it hands to `scan` and to `chunks.span_length`."""
    held: list[int] = []

    def span_length(chunk_bytes: int) -> int:
        held.append(chunk_bytes)
        return chunks.span_length(chunk_bytes)

    def scan(step: Any, state: mx.array, sequences: Sequence[mx.array], *others: Any, **named: Any) -> Any:
        made = update.__globals__["scan"](step, state, sequences, *others, **named)
        if open_layers:
            inputs, output = (sum(math.prod(array.shape[2:]) for array in part) for part in (sequences, made[:1]))
            open_layers[-1].scans.append(Scan(inputs, output, state.size, held[-1], chunks.longest()))
        return made

    noting = types.SimpleNamespace(**{**vars(chunks), "span_length": span_length})
    return _with_globals(update, {"scan": scan, "chunks": noting})


def _with_globals(function: types.FunctionType, others: dict[str, Any]) -> Any:
    """A function that finds `others` where it looks for these names."""
    again = types.FunctionType(
        function.__code__, {**function.__globals__, **others}, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    again.__kwdefaults__ = function.__kwdefaults__
    return again
