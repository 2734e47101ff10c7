"""Flatten a layer's arguments or outputs to a list of arrays, and rebuild them from such a list.

Differentiation and recomputation handle only arrays that are passed explicitly. Most layers take and return arrays,
tuples and dicts of them. Some pass an object from layer to layer and change it in place, as Kimi K3's layers do with
the states of earlier layers. The arrays in such an object are found too, and the layer gets a copy to change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Rebuild = Callable[[Sequence[mx.array]], Any]


def flattened(tree: Any) -> tuple[list[mx.array], Rebuild]:
    """The arrays in `tree` in order, and a function that rebuilds the same tree with other arrays in their place."""
    arrays: list[mx.array] = []
    rebuild = _collect(tree, arrays)
    return arrays, lambda replacements: rebuild(list(replacements))


def _collect(value: Any, arrays: list[mx.array]) -> Callable[[list[mx.array]], Any]:
    """Append the arrays in `value` to `arrays`; returns a function that rebuilds `value` from a list of as many arrays.

    That function gets the replacements of all of `arrays` and picks those at its own positions.
    """
    if isinstance(value, mx.array):
        position = len(arrays)
        arrays.append(value)
        return lambda replacements: replacements[position]
    if isinstance(value, dict):
        entries = {key: _collect(entry, arrays) for key, entry in value.items()}
        return lambda replacements: {key: rebuild(replacements) for key, rebuild in entries.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        items, kind = [_collect(item, arrays) for item in value], type(value)
        return lambda replacements: kind(rebuild(replacements) for rebuild in items)
    if (attributes := array_attributes(value)) is not None:
        rebuild_attributes = _collect(attributes, arrays)

        def rebuild_object(replacements: list[mx.array]) -> Any:
            duplicate = copy.copy(value)
            vars(duplicate).update(rebuild_attributes(replacements))
            return duplicate

        return rebuild_object
    return lambda _: value


def objects_in(tree: Any) -> list[Any]:
    """The objects in `tree` that hold arrays in their attributes, in order."""
    if array_attributes(tree) is not None:
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [holder for part in parts for holder in objects_in(part)]


def array_attributes(value: Any) -> dict[str, Any] | None:
    """The attributes in which an object passes arrays from layer to layer, or None if it passes none.

    For objects and caches of mlx-lm, these are all attributes. Our own caches list theirs in SHARED_ARRAYS.
    """
    if isinstance(value, mx.array | nn.Module):
        return None
    if names := getattr(value, "SHARED_ARRAYS", ()):
        return {name: getattr(value, name) for name in names}
    from_mlx_lm = type(value).__module__.startswith("mlx_lm.models.")
    return dict(vars(value)) if from_mlx_lm and hasattr(value, "__dict__") else None
