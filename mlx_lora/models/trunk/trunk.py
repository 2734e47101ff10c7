"""A causal language model taken apart: hidden states, by several ways, and the head that makes logits of them.

    run(tokens)                         the trunk's own hidden states, after the final norm
    run(states, start=n)                the same, from what enters layer n: layers below it are frozen and ran before
    run(tokens, columns=places)         the last layer for some positions alone (`last_layer.py`)
    run(tokens, segments=ids)           several training rows in one line, none of which sees another (`segments.py`)
    head(hidden)                        logits

Every way is the model's own code with stand-ins for some of its parts, so that embeddings, masks, norms and endings
(tied embeddings, soft caps, logit scales) stay the model's own. Not every way holds for every model: `verify.py`
compares each with the whole model before it is used. A model that can't be taken apart has no `name`: `run` then gives
logits, and `head` hands them on.
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
    """`name` is the model's attribute that holds the trunk, inside its attribute `language` where it has one.

    The model is looked up anew in every call and never changed, so adapters put on later are part of every way.
    """

    model: nn.Module
    name: str | None = None
    language: str | None = None
    vocabulary: int = 0
    shares_keys: bool = False  # in its cache: it is another model without one
    finite: bool = True  # its logits, on the few tokens that `take_apart` ran
    trial: Trial | None = field(default=None, repr=False, compare=False)  # for `verify`, once

    @property
    def apart(self) -> bool:
        """Whether hidden states and head are known apart."""
        return self.name is not None

    @property
    def whole(self) -> nn.Module:
        """The language model: what maps tokens to logits."""
        return self.model[self.language] if self.language else self.model

    @property
    def module(self) -> nn.Module:
        """What maps tokens to hidden states; the language model itself where it can't be taken apart."""
        return self.whole[self.name] if self.name else self.whole

    def run(
        self, x: mx.array, *, start: int = 0, columns: mx.array | None = None, segments: mx.array | None = None
    ) -> mx.array:
        """Hidden states after the final norm, (B, T, d); (B, M, d) of consecutive `columns` (B, M) of each line.

        `x` are tokens (B, T), or with a `start` the states (B, T, d) that enter that layer. `segments` int32 (B, T) has
        one number for the positions of a row, and 0 for padding.
        """
        return self.run_with(x, self._caches(segments), start, columns)

    def run_with(self, x: mx.array, cache: Any, start: int = 0, columns: mx.array | None = None) -> mx.array:
        """`run` with the caller's own caches, one for each layer, or None for none."""
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
        """Logits (N, V) of hidden states (N, d), through the model's own ending."""
        if not self.apart:
            return hidden
        shell = copy.copy(self.whole)
        setattr(shell, str(self.name), FixedTrunk(self.module, hidden[None]))
        return shell(mx.zeros((1, 1), dtype=mx.int32))[0]

    def entering(self, tokens: mx.array, layer: int, *, segments: mx.array | None = None) -> mx.array:
        """Hidden states entering `layer`, (B, T, d), without gradients."""
        layers = layers_of(self.model)
        boxes = [PassThrough(above) for above in layers[layer:]]
        with arrays_kept(self.model):
            trunk_with(self.module, self.model, [*layers[:layer], *boxes])(tokens, cache=self._caches(segments))
        return boxes[0].entered

    def above(self, hidden: mx.array, start: int, cache: Any = None, *, final: Any = None) -> mx.array:
        """Hidden states after the final norm, from those entering layer `start`; `final` takes the last layer's place.

        With as many layers as there are for `start`, it is the final norm alone.
        """
        layers = layers_of(self.model)
        rest = layers[start:] if final is None else [*layers[start:-1], final]
        boxes = [PassThrough(layer, hidden) for layer in layers[:start]]
        tokens = mx.zeros(hidden.shape[:2], mx.int32)
        return trunk_with(self.module, self.model, [*boxes, *rest])(tokens, cache=cache)  # type: ignore[no-any-return]
