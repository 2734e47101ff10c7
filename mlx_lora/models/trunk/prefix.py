"""A trunk seen as below | above a layer: what enters that layer, and what the rest makes of it.

With adapters in the last layers only, the hidden states entering the first adapted layer are the same in every epoch.
Both halves are the model's own trunk with some of its layers replaced by boxes that compute nothing, so embeddings,
masks and the final norm stay the model's own. What the boxes leave unused (embedding lookups, for one) is never
evaluated, since MLX is lazy. Nothing here knows which rows there are or where their states are kept.

Layers that take more than hidden states from below, such as shared keys or a part of the embeddings, can't be cut off
like this; that is found out numerically, before the halves are used.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.models.trunk.split import Split, layers_of

# Both sides run the same operations on the same numbers: anything beyond rounding is something else from below.
TOLERANCE = 1e-5


class _Box:
    """Stands in for a layer: computes nothing, returns `hidden` or else its input, lends the layer's attributes."""

    def __init__(self, layer: nn.Module, hidden: mx.array | None = None):
        self._layer, self._hidden = layer, hidden
        self.entered: mx.array | None = None

    def __call__(self, x: mx.array, *_: Any, **__: Any) -> mx.array:
        # both are other array objects: some trunks change theirs in place
        self.entered = mx.stop_gradient(x)
        return x if self._hidden is None else self._hidden.astype(self._hidden.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


@dataclass
class Below:
    """`trunk(states(tokens (B, T)) (B, T, d))` is the trunk's own output; `first` is the lowest layer of the rest.

    `width` and `dtype` are those of the states. The model is looked up anew in every call and never changed, so
    adapters put on later are part of both halves.
    """

    parts: Split
    first: int
    width: int = 0
    dtype: mx.Dtype = mx.float32

    def states(self, tokens: mx.array, cache: Any = None) -> mx.array:
        """Hidden states entering layer `first`, (B, T, d), without gradients."""
        layers = layers_of(self.parts.model)
        boxes = [_Box(layer) for layer in layers[self.first :]]
        trunk_with(self.parts, [*layers[: self.first], *boxes])(tokens, cache=cache)
        return boxes[0].entered

    def trunk(self, hidden: mx.array, cache: Any = None, *, last: Any = None) -> mx.array:
        """Hidden states after the final norm, (B, T, d), from those entering layer `first`.

        `last` takes the last layer's place.
        """
        layers = layers_of(self.parts.model)
        rest = layers[self.first :] if last is None else [*layers[self.first : -1], last]
        boxes = [_Box(layer, hidden) for layer in layers[: self.first]]
        return trunk_with(self.parts, [*boxes, *rest])(mx.zeros(hidden.shape[:2], mx.int32), cache=cache)


def trunk_with(parts: Split, layers: list[Any]) -> Any:
    """The trunk with other layers; its other parts are the very same objects."""
    trunk = _trunk_of(parts)
    shell = copy.copy(trunk)
    shell[_list_of_layers(trunk, layers_of(parts.model))] = layers
    return shell


def below(parts: Split, first: int) -> Below | str:
    """The halves of the trunk around layer `first`, verified on a few tokens, or the reason why there are none.

    Needs the model in evaluation mode: with dropout the two sides draw different masks.
    """
    layers = layers_of(parts.model)
    if not 0 < first < len(layers):
        return f"the model's {len(layers)} layers can't be cut at layer {first}"
    if _list_of_layers(_trunk_of(parts), layers) is None:
        return "the model doesn't keep its layers in one list"
    tokens = mx.stack([mx.arange(1, 10), mx.arange(9, 0, -1)])
    whole = parts.trunk(tokens)
    try:
        halves = Below(parts, first)
        hidden = halves.states(tokens)
        halves.width, halves.dtype = hidden.shape[-1], hidden.dtype
        output = halves.trunk(hidden)
    except Exception as error:  # layers that return or take more than one array
        return f"the layers from {first} on take more than hidden states ({type(error).__name__})"
    if hidden.shape[:2] != tokens.shape or output.shape != whole.shape or not _same(output, whole):
        return f"the layers from {first} on take more than hidden states: with those alone the output differs"
    return halves


def lowest_trainable(model: nn.Module) -> int | str:
    """Index of the lowest layer with trainable parameters, or the reason why what enters it may change."""
    layers = [tree_flatten(layer.trainable_parameters()) for layer in layers_of(model)]
    inside = {id(array) for layer in layers for _, array in layer}
    outside = [path for path, array in tree_flatten(model.trainable_parameters()) if id(array) not in inside]
    if outside:
        return f"{outside[0].rpartition('.')[0]} is trained, which is outside the layers"
    return next((index for index, layer in enumerate(layers) if layer), "nothing is trained")


def _trunk_of(parts: Split) -> nn.Module:
    outer = parts.model[parts.language] if parts.language else parts.model
    return outer[parts.name]


def _list_of_layers(trunk: nn.Module, layers: list[nn.Module]) -> str | None:
    """The attribute of a trunk that lists exactly these layers; most call it `layers`."""
    for name, value in trunk.items():
        if isinstance(value, list) and [id(item) for item in value] == [id(layer) for layer in layers]:
            return str(name)
    return None


def _same(a: mx.array, b: mx.array) -> bool:
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return bool((mx.abs(a - b).max() <= TOLERANCE * mx.abs(b).max()).item())
