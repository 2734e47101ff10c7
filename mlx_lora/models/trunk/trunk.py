"""A causal language model split into a trunk, which computes hidden states, and a head, which computes logits.

    run(tokens)                         the trunk's hidden states, after the final norm
    run(states, start=n)                the same from the states that enter layer n, computed earlier: frozen below n
    run(tokens, columns=columns)        the last layer only for some positions (`last_layer.py`)
    run(tokens, segments=ids)           several training rows in one line that don't affect each other (`segments.py`)
    head(hidden)                        logits

All of them run the model's own code with stand-ins for some of its parts. So embeddings, masks, norms and heads (tied
embeddings, soft caps, logit scales) are computed exactly as the model does. Not every call works for every model:
`verify.py` compares each with the whole model before it is used. If a model can't be split, `name` is None; then `run`
returns logits, and `head` returns its argument.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.models.trunk import last_layer
from mlx_lora.models.trunk.arrays import arrays_kept
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.segments import caches, row_caches
from mlx_lora.models.trunk.standins import FixedTrunk, PassThrough, trunk_with

if TYPE_CHECKING:
    from mlx_lora.models.trunk.trial import Trial


@dataclass
class Trunk:
    """`name` is the attribute that holds the trunk: of `model`, or of its attribute `language` if that isn't None.

    Every call reads the model's modules again and none changes the model, so adapters attached later take effect.
    """

    model: nn.Module
    name: str | None = None
    language: str | None = None
    vocabulary: int = 0
    shares_keys: bool = False  # layers share keys through the cache; without a cache the outputs differ
    finite: bool = True  # whether the logits of `take_apart`'s trial tokens are finite
    trial: Trial | None = field(default=None, repr=False, compare=False)  # `take_apart`'s run; `verify` uses it once

    @property
    def apart(self) -> bool:
        """Whether the model could be split into trunk and head."""
        return self.name is not None

    @property
    def whole(self) -> nn.Module:
        """The language model, which maps tokens to logits."""
        return self.model[self.language] if self.language else self.model

    @property
    def module(self) -> nn.Module:
        """The module that maps tokens to hidden states; the language model itself if it can't be split."""
        return self.whole[self.name] if self.name else self.whole

    def run(
        self, x: mx.array, *, start: int = 0, columns: mx.array | None = None, segments: mx.array | None = None
    ) -> mx.array:
        """Hidden states after the final norm, (B, T, d); (B, M, d) of consecutive `columns` (B, M) of each line.

        `x` are tokens (B, T), or with `start` the states (B, T, d) that enter that layer. `segments` int32 (B, T) has
        one number for all positions of a row, and 0 for padding.
        """
        return self.run_with(x, self._caches(segments), start, columns)

    def run_with(self, x: mx.array, cache: Any, start: int = 0, columns: mx.array | None = None) -> mx.array:
        """`run` with the caller's own caches, one for each layer; None runs without caches."""
        with arrays_kept(self.model):
            if not self.apart:
                return self.model(x) if cache is None else self.model(x, cache=cache)
            if columns is not None:
                return last_layer.columns_of(self, x, columns, start, cache)
            return self.above(x, start, cache) if start else self.module(x, cache=cache)

    def _caches(self, segments: mx.array | None) -> list[Any] | None:
        if segments is not None:
            return caches(self.model, segments, shares_keys=self.shares_keys)
        return row_caches(self.model) if self.shares_keys else None

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (N, V) of hidden states (N, d), by the model's own head."""
        if not self.apart:
            return hidden
        shell = copy.copy(self.whole)
        setattr(shell, str(self.name), FixedTrunk(self.module, hidden[None]))
        return shell(mx.zeros((1, 1), dtype=mx.int32))[0]

    def entering(self, tokens: mx.array, layer: int, *, segments: mx.array | None = None) -> mx.array:
        """Hidden states that enter `layer`, (B, T, d), without gradients."""
        layers = layers_of(self.model)
        skipped = [PassThrough(above) for above in layers[layer:]]
        with arrays_kept(self.model):
            trunk_with(self.module, self.model, [*layers[:layer], *skipped])(tokens, cache=self._caches(segments))
        return skipped[0].entered

    def above(self, hidden: mx.array, start: int, cache: Any = None, *, final: Any = None) -> mx.array:
        """Hidden states after the final norm, from those that enter layer `start`; `final` replaces the last layer.

        If `start` is the number of layers, only the final norm is applied.
        """
        layers = layers_of(self.model)
        rest = layers[start:] if final is None else [*layers[start:-1], final]
        skipped = [PassThrough(layer, hidden) for layer in layers[:start]]
        tokens = mx.zeros(hidden.shape[:2], mx.int32)
        return trunk_with(self.module, self.model, [*skipped, *rest])(tokens, cache=cache)  # type: ignore[no-any-return]
