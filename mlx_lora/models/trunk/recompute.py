"""Gradient checkpointing: a layer keeps only its input, and its forward pass is computed again in the backward pass.

Each layer object gets a subclass of its own class while the block runs; no class is patched. Dropout draws the same
mask in both passes, because its key is drawn before the first one. `mx.checkpoint` alone would draw another mask in
the second pass, and the gradients would be wrong.
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
    """While the block runs, the forward pass of each of `layers` is recomputed in the backward pass."""
    classes = [type(layer) for layer in layers]
    for layer, original in zip(layers, classes, strict=True):  # a layer that is listed twice is wrapped once
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

        inputs, rebuild_arguments = flattened((arguments, named))
        rebuilds: list[Rebuild] = []

        def forward(parameters: Any, inputs: list[mx.array]) -> list[mx.array]:
            self.update(parameters)
            arguments, named = rebuild_arguments(inputs)
            with _fixed_keys(dropouts, keys):
                output = original.__call__(self, *arguments, **named)
            changed = [array_attributes(value) for value in objects_in((arguments, named))]
            outputs, rebuild = flattened((output, changed))
            rebuilds.append(rebuild)
            return outputs

        outputs = mx.checkpoint(forward)(self.trainable_parameters(), inputs)
        output, changed = rebuilds[0](outputs)
        for value, attributes in zip(objects_in((arguments, named)), changed, strict=True):
            vars(value).update(attributes)  # the layer changed a copy; the layers above read the original object
        return output

    return type(f"Recomputed{original.__name__}", (original,), {"__call__": call})


@contextmanager
def _fixed_keys(dropouts: list[Dropout], keys: list[mx.array]) -> Iterator[None]:
    for dropout, key in zip(dropouts, keys, strict=True):
        dropout.drawn_from(key)
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.drawn_from(None)
