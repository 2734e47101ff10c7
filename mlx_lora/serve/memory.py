"""What serving takes of a machine's memory: the base, adapters, prompts that are kept, and rows that run.

Keys, values and states of a row are known by their shapes. MLX is lazy: a pass whose result nobody evaluates takes no
time and no memory, and its caches have their shapes all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora import ui
from mlx_lora.machine import allocation
from mlx_lora.models.unpack import layers_to_unpack, unpacked_bytes
from mlx_lora.serve.quantized import QuantizedCaches
from mlx_lora.serve.status import Limits

with allocation.file_limits_kept():
    from mlx_lm.models.cache import make_prompt_cache

# A row that is counted on: prompt and answer together. Longer ones take the memory of several.
ROW_TOKENS = 2048
MOST_ROWS = 32
# Of what the base leaves: the part for rows that run, for prompts that are kept, and for adapters. What is left is for
# the passes themselves.
FOR_ROWS, FOR_PROMPTS, FOR_ADAPTERS = 0.5, 0.2, 0.15
MOST_FOR_PROMPTS, MOST_FOR_ADAPTERS = 4 << 30, 2 << 30
# Lengths at which a row is looked at: MLX's caches grow by steps of 256 tokens.
STEP = 256

MakeCache = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class ServingPlan:
    """Bytes by what takes them, and how many rows of ROW_TOKENS tokens run at once; the sum is at most `limit`."""

    base: int
    adapters: int
    prompts: int
    row: int
    rows: int
    passes: int
    limit: int

    @property
    def parts(self) -> dict[str, int]:
        return {
            "base": self.base, "rows": self.rows * self.row, "prompt_cache": self.prompts, "adapters": self.adapters,
            "passes": self.passes,
        }  # fmt: skip

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether there is room for one row at least."""
        return self.peak <= self.limit

    @property
    def limits(self) -> Limits:
        """The scheduler's limits."""
        return Limits(rows=self.rows, prompt_cache_bytes=self.prompts, adapter_bytes=self.adapters)

    def as_dict(self) -> dict[str, Any]:
        """The keys of `plan --serve --json`."""
        return {
            "fits": self.fits, "peak_memory_bytes": self.peak, "parts": self.parts, "limit_bytes": self.limit,
            "rows": self.rows, "row_tokens": ROW_TOKENS, "row_bytes": self.row,
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.rows} requests of {ROW_TOKENS:,} tokens at once, {ui.size(self.prompts)} of prompts kept, "
            f"{ui.size(self.adapters)} of adapters"
        )


def row_bytes(model: nn.Module, tokens: int, make_cache: MakeCache | None = None) -> int:
    """Bytes of the keys, values and states of one row of `tokens` tokens, at most. Nothing is evaluated."""
    return row_growth(model, make_cache)(tokens)


def row_growth(model: nn.Module, make_cache: MakeCache | None = None) -> Callable[[int], int]:
    """`row_bytes` of a model for any number of tokens. The model has no adapters now, and may have some later."""
    one, two = _caches(model, 1, make_cache), _caches(model, 2, make_cache)
    layers = [
        (_nbytes(after_one), _nbytes(after_two) - _nbytes(after_one), _window(layer))
        for layer, after_one, after_two in zip(_caches(model, 0, make_cache), one, two, strict=True)
    ]

    def total(tokens: int) -> int:
        steps = -(-tokens // STEP)
        # beside a window, what a chunk of a prompt brings is held
        return sum(first + grows * int(min(steps, held) - 1) for first, grows, held in layers)

    return total


def _window(layer: Any) -> float:
    """How many steps a cache holds at most."""
    window = getattr(layer, "max_size", None) or getattr(layer, "chunk_size", None)
    return -(-window // STEP) + 1 if isinstance(window, int) else math.inf


def _caches(model: nn.Module, steps: int, make_cache: MakeCache | None) -> list[Any]:
    """The caches of the layers after a prompt of so many steps, not evaluated."""
    layers = (make_cache or make_prompt_cache)(model)
    if steps:
        model(mx.zeros((1, steps * STEP), mx.int32), cache=layers)
    return [part for layer in layers for part in getattr(layer, "caches", [layer])]


def _name(model: nn.Module) -> str:
    return str(getattr(model, "model_type", "this model"))


def _nbytes(layer: Any) -> int:
    return sum(array.nbytes for _, array in _arrays(layer.state))


def _arrays(state: Any) -> list[tuple[str, mx.array]]:
    return [(name, array) for name, array in tree_flatten(state) if isinstance(array, mx.array)]


def base_bytes(model: nn.Module, limit: int, *, gpu: bool) -> int:
    """Bytes of the weights, with the copies of packed ones that are unpacked once on a processor where they fit."""
    packed = sum(array.nbytes for _, array in _arrays(model.parameters()))
    return packed if gpu else packed + unpacked_bytes(layers_to_unpack(model), limit - packed)


def plan(model: nn.Module, *, base: int, limit: int, kv_bits: int | None = None) -> ServingPlan:
    """Share what `base` bytes leave of `limit` bytes. `model` may be without weights (`models.shapes`).

    With `kv_bits` one row runs at a time. Where not even one row has room the plan doesn't fit. Raises ModelError where
    the caches can't have so many bits.
    """
    make_cache = None if kv_bits is None else QuantizedCaches(model, _name(model), kv_bits)
    row, free = max(row_bytes(model, ROW_TOKENS, make_cache), 1), max(limit - base, 0)
    rows = min(max(int(FOR_ROWS * free / row), 1), MOST_ROWS if kv_bits is None else 1)
    prompts, adapters = min(FOR_PROMPTS * free, MOST_FOR_PROMPTS), min(FOR_ADAPTERS * free, MOST_FOR_ADAPTERS)
    passes = (1 - FOR_ROWS - FOR_PROMPTS - FOR_ADAPTERS) * free
    return ServingPlan(base, int(adapters), int(prompts), row, rows, int(passes), limit)
