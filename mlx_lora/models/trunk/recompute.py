"""Gradient checkpointing: a layer keeps its input and computes its inside again in the backward pass.

Scoped to the layers it is given and undone on leaving, by giving each layer object a subclass of its own class; no
class is patched. Dropout draws the same mask twice, because its key is captured before the first pass: `mx.checkpoint`
by itself would draw another mask in the recomputation and make the gradients wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.models.trunk.dropout import Dropout
from mlx_lora.models.trunk.flatten import Rebuild, array_attributes, flattened, objects_in


@contextmanager
def recomputed(layers: list[nn.Module]) -> Iterator[None]:
    """Recompute the inside of each of `layers` in the backward pass while the block runs."""
    classes = [type(layer) for layer in layers]
    for layer, original in zip(layers, classes, strict=True):  # one that is listed twice is computed again once
        layer.__class__ = _checkpointed(original)
    try:
        yield
    finally:
        for layer, original in zip(layers, classes, strict=True):
            layer.__class__ = original


def _checkpointed(original: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        if not self.training:
            return original.__call__(self, *arguments, **named)
        dropouts = [module for module in self.modules() if isinstance(module, Dropout)]
        keys = [mx.random.randint(0, 2**31, (2,)).astype(mx.uint32) for _ in dropouts]

        taken, called_with = flattened((arguments, named))
        made: list[Rebuild] = []

        def inside(parameters: Any, taken: list[mx.array]) -> list[mx.array]:
            self.update(parameters)
            arguments, named = called_with(taken)
            with _drawn_from(dropouts, keys):
                output = original.__call__(self, *arguments, **named)
            changed = [array_attributes(value) for value in objects_in((arguments, named))]
            outputs, rebuild = flattened((output, changed))
            made.append(rebuild)
            return outputs

        outputs = mx.checkpoint(inside)(self.trainable_parameters(), taken)
        output, changed = made[0](outputs)
        for value, attributes in zip(objects_in((arguments, named)), changed, strict=True):
            vars(value).update(attributes)  # what the layer has left there for the layers above
        return output

    return type(f"Recomputed{original.__name__}", (original,), {"__call__": call})


@contextmanager
def _drawn_from(dropouts: list[Dropout], keys: list[mx.array]) -> Iterator[None]:
    for dropout, key in zip(dropouts, keys, strict=True):
        dropout.drawn_from(key)
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.drawn_from(None)
