"""Keys and values in 8 or 4 bits: a long prompt takes a quarter of float32's memory, or an eighth, and some accuracy.

mlx_lm's quantized caches hold one row, so requests are answered one by one then.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.errors import ModelError
from mlx_lora.machine import allocation
from mlx_lora.serve.ways import divergence, log_probabilities

with allocation.file_limits_kept():
    from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

BITS = (8, 4)
GROUPS = (64, 32)
# In 8 bits the answer is nearly the same; a model that is further off reads its caches in some other way.
TOLERANCE = 0.05
TOKENS = (5, 17, 3, 41, 8, 29, 11, 23, 2, 37, 19, 7)


class QuantizedCaches:
    """Makes caches of `bits` bits for a model; nothing is evaluated.

    Raises ModelError, by `name`, where its caches are no keys and values, or have a size that can't be quantized.
    """

    def __init__(self, model: nn.Module, name: str, bits: int):
        if bits not in BITS:
            raise ModelError(f"a cache of {bits} bits isn't known; known: {', '.join(map(str, BITS))}")
        layers = make_prompt_cache(model)
        if others := sorted({type(layer).__name__ for layer in layers if type(layer) is not KVCache}):
            raise ModelError(f"{name}: its caches can't be quantized ({', '.join(others)})", hint="leave --kv-bits out")
        model(mx.array([TOKENS[:1]]), cache=layers)
        sizes = {array.shape[-1] for layer in layers for array in (layer.keys, layer.values)}
        groups = [group for group in GROUPS if all(size % group == 0 for size in sizes)]
        if not groups:
            found = ", ".join(map(str, sorted(sizes)))
            raise ModelError(
                f"{name}: its caches can't be quantized: heads have a size of {found}, a multiple of {GROUPS[-1]} is "
                "needed", hint="leave --kv-bits out",
            )  # fmt: skip
        self.name, self.bits, self.group_size, self.layers = name, bits, groups[0], len(layers)

    def __call__(self, model: Any) -> list[Any]:
        return [QuantizedKVCache(group_size=self.group_size, bits=self.bits) for _ in range(self.layers)]

    @property
    def note(self) -> str:
        """Why rows don't share passes."""
        return f"{self.name}: requests are answered one by one, because caches have {self.bits} bits"

    def check(self, model: nn.Module) -> None:
        """Raise ModelError unless the model, without adapters, answers with 8 bits nearly as without."""
        plain, packed = make_prompt_cache(model), [QuantizedKVCache(self.group_size, 8) for _ in range(self.layers)]
        try:
            for part in (TOKENS[:7], TOKENS[7:]):
                tokens = mx.array([part])
                expected, found = (log_probabilities(model(tokens, cache=cache)[0]) for cache in (plain, packed))
            away = divergence(found, expected)
        except Exception as error:  # a model may do anything with keys and values
            raise ModelError(
                f"{self.name}: its caches can't be quantized ({type(error).__name__}: {error})",
                hint="leave --kv-bits out",
            ) from None
        if not away <= TOLERANCE:
            raise ModelError(
                f"{self.name}: its caches can't be quantized: answers are off by a KL divergence of {away:.2g}",
                hint="leave --kv-bits out",
            )


def quantized(model: nn.Module, name: str, bits: int | None) -> QuantizedCaches | None:
    """Caches of `bits` bits that have been tried on the model, None for None. Raises as QuantizedCaches."""
    if bits is None:
        return None
    caches = QuantizedCaches(model, name, bits)
    caches.check(model)
    return caches
