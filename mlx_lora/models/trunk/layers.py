"""A model's layers: the list of them, the trunk's attribute that holds it, and the lowest layer that is trained."""

from __future__ import annotations

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.errors import ModelError


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in order. Raises ModelError for a model without any."""
    layers = getattr(model, "layers", None)
    if not layers:
        raise ModelError(f"{type(model).__name__} has no layers to adapt")
    return list(layers)


def name_of_list(trunk: nn.Module, layers: list[nn.Module]) -> str | None:
    """The trunk's attribute that holds exactly these layers as a list, or None; in most models it is `layers`."""
    for name, value in trunk.items():
        if isinstance(value, list) and [id(item) for item in value] == [id(layer) for layer in layers]:
            return str(name)
    return None


def lowest_trainable(model: nn.Module) -> int | str:
    """Index of the lowest layer with trainable parameters; training doesn't change that layer's input.

    Where there is no such layer, the reason as a sentence: a module outside the layers is trained, or nothing is.
    """
    layers = [tree_flatten(layer.trainable_parameters()) for layer in layers_of(model)]
    inside = {id(array) for layer in layers for _, array in layer}
    outside = [path for path, array in tree_flatten(model.trainable_parameters()) if id(array) not in inside]
    if outside:
        return f"{outside[0].rpartition('.')[0]} is trained, which is outside the layers"
    return next((index for index, layer in enumerate(layers) if layer), "nothing is trained")
