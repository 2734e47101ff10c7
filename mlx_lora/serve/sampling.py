"""Choosing a token: a row's own draws, which don't depend on the other rows of its batch.

Every draw has a key of its own, made of the row's seed and of how many tokens it has so far. The filters are those of
mlx_lm without its compilation, which on Linux takes a second for every new value of a setting.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import struct
from collections.abc import Callable

import mlx.core as mx

from mlx_lora.models import finite
from mlx_lora.serve.requests import Sampling

Sampler = Callable[[mx.array], mx.array]

# Below and above, float32 divides by zero or by infinity, and any token may come. Here they draw the same.
COLDEST, HOTTEST = 1e-6, 1e6


def greedy(log_probabilities: mx.array) -> mx.array:
    """The most likely token of each row: (N, V) -> (N,)."""
    return mx.argmax(log_probabilities, axis=-1)


# One object for all greedy rows: mlx_lm samples rows with the same sampler together.
GREEDY = finite.marking(greedy)


class Drawing:
    """The sampler of one row: log-probabilities (1, V) -> a token (1,), NOT_FINITE where they aren't numbers.

    `drawn` is how many tokens it has drawn; a row that begins again at its n-th token sets it to n.
    """

    def __init__(self, sampling: Sampling):
        self.sampling, self.drawn = sampling, 0
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._seed = seed % (1 << 64)
        self._sample = finite.marking(self._draw)

    def __call__(self, log_probabilities: mx.array) -> mx.array:
        return self._sample(log_probabilities)

    def _draw(self, log_probabilities: mx.array) -> mx.array:
        digest = hashlib.blake2b(struct.pack("<QQ", self._seed, self.drawn), digest_size=8).digest()
        key = mx.array(struct.unpack("<II", digest), mx.uint32)
        self.drawn += 1
        kept = filtered(log_probabilities.astype(mx.float32), self.sampling)
        temperature = min(max(self.sampling.temperature, COLDEST), HOTTEST)
        return mx.random.categorical(kept / temperature, key=key)


def sampler(sampling: Sampling) -> Sampler:
    """The sampler of one row."""
    return Drawing(sampling) if sampling.temperature else GREEDY


def filtered(log_probabilities: mx.array, sampling: Sampling) -> mx.array:
    """Log-probabilities (N, V) with minus infinity for the tokens that top-p, min-p and top-k exclude, in this order.

    All three look at the distribution before temperature, as in mlx_lm.
    """
    kept = log_probabilities
    if sampling.top_p < 1:
        ordered = mx.sort(kept, axis=-1)
        probabilities = mx.exp(ordered)
        above = mx.cumsum(probabilities, axis=-1, reverse=True, inclusive=False)
        total = above[:, :1] + probabilities[:, :1]
        dropped = (above >= sampling.top_p * total).sum(axis=-1, keepdims=True)
        kept = mx.where(kept < mx.take_along_axis(ordered, dropped, axis=-1), -mx.inf, kept)
    if sampling.min_p > 0:
        least = kept.max(axis=-1, keepdims=True) + math.log(sampling.min_p)
        kept = mx.where(kept < least, -mx.inf, kept)
    if 0 < sampling.top_k < kept.shape[-1]:
        place = kept.shape[-1] - sampling.top_k
        least = mx.partition(kept, place, axis=-1)[:, place : place + 1]
        kept = mx.where(kept < least, -mx.inf, kept)
    return kept
