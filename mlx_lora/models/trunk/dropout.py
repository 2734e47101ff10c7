"""Dropout that can draw the same mask twice, for layers that run a second time in the backward pass."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class Dropout(nn.Module):
    """Dropout whose mask can be drawn again: `drawn_from(key)` fixes the key of the next passes, None unfixes it.

    Gradient checkpointing runs a layer twice a step and needs the same mask both times, but MLX's global random state
    can't be rewound.
    """

    def __init__(self, probability: float):
        super().__init__()
        self._keep = 1 - probability
        self.__dict__["key"] = None  # outside the module's dict: not a parameter, not part of the compiled state

    def drawn_from(self, key: mx.array | None) -> None:
        self.__dict__["key"] = key

    def __call__(self, x: mx.array) -> mx.array:
        if self._keep == 1 or not self.training:
            return x
        return mx.random.bernoulli(self._keep, x.shape, key=self.__dict__["key"]) * x / self._keep
