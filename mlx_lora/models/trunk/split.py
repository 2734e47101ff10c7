"""A causal language model seen as trunk | head: hidden states, and what turns them into logits.

The loss needs hidden states at every position but logits only where there is loss. mlx-lm's models don't expose
that, and each has its own ending (tied embeddings, soft caps, logit scales). The head here is therefore the whole
model with its trunk replaced by a box holding the hidden states, so every ending is the model's own, and the split is
checked numerically against the whole before it is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.errors import ModelError

# Names that mlx-lm's models give the part before the output head.
TRUNKS = ("model", "backbone", "transformer")
TOLERANCE = 1e-3


class _Holding:
    """Stands in for a trunk: returns the hidden states it was given, lends the trunk's own attributes."""

    def __init__(self, trunk: nn.Module):
        self._trunk = trunk
        self.hidden: mx.array | None = None

    def __call__(self, *_: Any, **__: Any) -> mx.array | None:
        return self.hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)


@dataclass
class Split:
    """`trunk(tokens (B, T)) -> hidden (B, T, d)` and `head(hidden (N, d)) -> logits (N, V)`; V is `vocabulary`."""

    model: nn.Module
    name: str
    language: str | None = None
    vocabulary: int = 0

    @property
    def _whole(self) -> nn.Module:
        return self.model[self.language] if self.language else self.model

    def trunk(self, tokens: mx.array, cache: Any = None) -> mx.array:
        """Hidden states after the final norm, (B, T, d)."""
        return self._whole[self.name](tokens, cache=cache)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (N, V) of hidden states (N, d), through the model's own ending."""
        whole = self._whole
        shell = copy.copy(whole)
        holding = _Holding(whole[self.name])
        holding.hidden = hidden[None]
        setattr(shell, self.name, holding)
        return shell(mx.zeros((1, 1), dtype=mx.int32))[0]


def split(model: nn.Module) -> Split | None:
    """The split of `model`, verified on a few tokens against the whole model, or None when it doesn't hold.

    The head gets the rows in another order: one that looks at neighbouring positions, or at the tokens, shows.
    """
    tokens = mx.arange(1, 10)[None]
    order = mx.arange(9)[::-1]
    whole = model(tokens)
    language = "language_model" if "language_model" in model else None
    outer = model[language] if language else model
    for name in TRUNKS:
        if not isinstance(outer.get(name), nn.Module):
            continue
        parts = Split(model, name, language, whole.shape[-1])
        try:
            logits = parts.head(parts.trunk(tokens)[0][order])
        except Exception:  # an architecture whose trunk or head takes something else: not splittable
            continue
        if logits.shape == whole[0].shape and _close(logits, whole[0][order]):
            return parts
    return None


def logits_at(model: nn.Module, parts: Split | None) -> Callable[[mx.array, mx.array], mx.array]:
    """A function (tokens (B, T), positions (N,) in the flattened batch) -> logits (N, V).

    Only those positions enter the output head; without a split the whole model runs and they are picked afterwards.
    """

    def logits(tokens: mx.array, positions: mx.array) -> mx.array:
        if parts is None:
            whole = model(tokens)
            return whole.reshape(-1, whole.shape[-1])[positions]
        hidden = parts.trunk(tokens)
        return parts.head(hidden.reshape(-1, hidden.shape[-1])[positions])

    return logits


def _close(a: mx.array, b: mx.array) -> bool:
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return bool((mx.abs(a - b).max() <= TOLERANCE * mx.abs(b).max()).item())


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in order. Raises ModelError for a model without any."""
    layers = getattr(model, "layers", None)
    if not layers:
        raise ModelError(f"{type(model).__name__} has no layers to adapt")
    return list(layers)
