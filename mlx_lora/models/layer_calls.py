"""The shapes that each layer of a model passes to attention and to recurrences, for any architecture.

The model is called on a few tokens. Recording functions replace the functions that `trunk.lean` replaces. Nothing is
evaluated: MLX is lazy, and `mx.vmap` traces the call first, which ends with an exception before anything else is done
(`mx.compile` traces too, but not where there is no compiler). A model whose code needs a value during the call raises,
so its layers have incomplete records. No class and no module is patched.
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

# More than one token, because some layers compute a single position in another way; and more than a short convolution
# reads.
TOKENS = 8


@dataclass(frozen=True)
class Scan:
    """A recurrence in chunks, by counts of numbers: `inputs` and `output` for each position, `state` for each span.

    `chunk_bytes` are the bytes that a chunk holds in the backward pass; `chunk` is its number of positions on this
    device.
    """

    inputs: int
    output: int
    state: int
    chunk_bytes: int
    chunk: int = chunks.CHUNK

    def span(self, lines: int, *, gpu: bool) -> int:
        """Positions of a span of `lines` lines, as `recurrence.chunks.span_length` chooses them on a CPU or a GPU.

        If that isn't the kind of this device, a chunk is assumed to hold as many bytes a position as on this one.
        """
        span_bytes, chunk = (chunks.SPAN_BYTES_GPU, chunks.CHUNK_GPU) if gpu else (chunks.SPAN_BYTES, chunks.CHUNK)
        return chunk * max(span_bytes * self.chunk // (lines * self.chunk_bytes * chunk), 1)


@dataclass
class LayerCalls:
    """What one layer computes.

    `attends`: whether it calls mlx-lm's attention. `scans`: its recurrences. `masked`: its attention calls with a
    floating-point mask, which is a (T, T) matrix for each head, as (heads, numbers of queries, keys and values for each
    position). `convolved`: channels of its short convolutions. `looped`: numbers in the state of a recurrence that runs
    in mlx-lm's own loop.
    """

    attends: bool = False
    scans: list[Scan] = field(default_factory=list)
    masked: list[tuple[int, int]] = field(default_factory=list)
    convolved: int = 0
    looped: int = 0


class _Recorded(Exception):
    """Ends the trace: all calls are recorded."""


def layer_calls(model: nn.Module) -> list[LayerCalls]:
    """The calls of each layer of `model`; incomplete if the model can't be called without evaluating something."""
    layers = layers_of(model)
    records = {id(layer): LayerCalls(convolved=_convolution_channels(layer)) for layer in layers}

    def run(tokens: mx.array) -> mx.array:
        caches = make_prompt_cache(model)
        with _recording(layers, records):
            model(tokens, cache=caches)
        raise _Recorded

    with training(model), suppress(Exception):
        mx.vmap(run)(mx.ones((1, 1, TOKENS), dtype=mx.int32))
    return [records[id(layer)] for layer in layers]


def _convolution_channels(layer: nn.Module) -> int:
    """Channels of a layer's short convolutions."""
    return sum(conv.weight.shape[0] for conv in layer.modules() if isinstance(conv, nn.Conv1d) and is_short(conv))


@contextmanager
def _recording(layers: list[nn.Module], records: dict[int, LayerCalls]) -> Iterator[None]:
    """While the block runs, layers and the modules in them record their calls."""
    running: list[LayerCalls] = []  # records of the layers that are being called, the innermost last
    modules = {id(module): module for layer in layers for module in layer.modules()}
    originals = {key: type(module) for key, module in modules.items()}
    try:
        for key, module in modules.items():
            kind = _recording_class(type(module), running)
            module.__class__ = _recording_layer(kind, running, records[key]) if key in records else kind
        yield
    finally:
        for key, original in originals.items():
            modules[key].__class__ = original


def _recording_layer(original: type[nn.Module], running: list[LayerCalls], record: LayerCalls) -> type[nn.Module]:
    """A subclass of a layer that puts its record into `running` while it runs, and records the state in its cache."""

    def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        running.append(record)
        try:
            output = original.__call__(self, *arguments, **named)
        finally:
            running.pop()
        if not record.scans:
            record.looped = sum(_state_size(value, self) for value in [*arguments, *named.values()])
        return output

    return type(original.__name__, (original,), {"__call__": call})


def _state_size(cache: Any, layer: nn.Module) -> int:
    """Count of numbers in the states of a layer's cache, without keys, values and inputs of short convolutions."""
    if hasattr(cache, "caches"):
        return sum(_state_size(part, layer) for part in cache.caches)
    states = getattr(cache, "cache", None)
    if not isinstance(states, list):
        return 0
    windows = {
        (1, conv.weight.shape[1] - 1, conv.weight.shape[0]) for conv in layer.modules() if isinstance(conv, nn.Conv1d)
    }
    return sum(state.size for state in states if isinstance(state, mx.array) and state.shape not in windows)


def _recording_class(original: type[nn.Module], running: list[LayerCalls]) -> type[nn.Module]:
    """A subclass whose methods call recording functions in place of those in `trunk.lean.FUNCTIONS`."""
    attributes: dict[str, Any] = {}
    for base in reversed(original.__mro__):
        attributes.update(vars(base))
    methods = {
        name: _with_globals(method, functions)
        for name, method in attributes.items()
        if isinstance(method, types.FunctionType) and (functions := _recording_functions(method, running))
    }
    return type(original.__name__, (original,), methods) if methods else original


def _recording_functions(method: types.FunctionType, running: list[LayerCalls]) -> dict[str, Callable[..., Any]]:
    """Recording functions, by name, for the functions of mlx-lm that a method calls."""
    return {
        name: _recording_attention(ours, running) if part == "attention" else _recording_scan(ours, running)
        for part, name, theirs, ours in FUNCTIONS
        if part in ("attention", "recurrence") and method.__globals__.get(name) is theirs
    }


def _recording_attention(attend: Callable[..., mx.array], running: list[LayerCalls]) -> Callable[..., mx.array]:
    def call(*positional: Any, **named: Any) -> mx.array:
        arguments = inspect.signature(attend).bind(*positional, **named).arguments
        mask = arguments.get("mask")
        if running:
            running[-1].attends = True
        if running and isinstance(mask, mx.array) and mask.ndim == 4 and mx.issubdtype(mask.dtype, mx.floating):
            arrays = [arguments[name] for name in ("queries", "keys", "values")]
            running[-1].masked.append((mask.shape[1], sum(array.size for array in arrays) // TOKENS))
        return attend(*positional, **named)

    return call


def _recording_scan(update: Any, running: list[LayerCalls]) -> Callable[..., Any]:
    """One of our recurrences that records what it passes to `scan` and to `chunks.span_length`."""
    held_bytes: list[int] = []

    def span_length(chunk_bytes: int) -> int:
        held_bytes.append(chunk_bytes)
        return chunks.span_length(chunk_bytes)

    def scan(step: Any, state: mx.array, sequences: Sequence[mx.array], *rest: Any, **named: Any) -> Any:
        y, final_state = update.__globals__["scan"](step, state, sequences, *rest, **named)
        if running:
            inputs, output = (sum(math.prod(array.shape[2:]) for array in arrays) for arrays in (sequences, [y]))
            running[-1].scans.append(Scan(inputs, output, state.size, held_bytes[-1], chunks.longest()))
        return y, final_state

    recording_chunks = types.SimpleNamespace(**{**vars(chunks), "span_length": span_length})
    return _with_globals(update, {"scan": scan, "chunks": recording_chunks})


def _with_globals(function: types.FunctionType, replacements: dict[str, Any]) -> Any:
    """A copy of a function in which `replacements` override global names."""
    replaced = types.FunctionType(
        function.__code__, {**function.__globals__, **replacements}, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    replaced.__kwdefaults__ = function.__kwdefaults__
    return replaced
