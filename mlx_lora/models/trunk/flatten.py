"""What a layer is called with, and gives back, as a flat list of arrays; and the way back from such a list.

Differentiating a layer, or computing it again, sees the arrays that it is handed and no others. Most layers take and
return arrays, tuples and dicts of them. Some hand an object on from layer to layer and change it in place, as Kimi
K3's layers do with the states of earlier ones: its arrays are found too, and the layer gets a copy to change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Rebuild = Callable[[Sequence[mx.array]], Any]


def flattened(tree: Any) -> tuple[list[mx.array], Rebuild]:
    """The arrays in `tree` in order, and a function that makes the same tree around other arrays."""
    arrays: list[mx.array] = []
    shape = _opened(tree, arrays)
    return arrays, lambda others: shape(list(others))


def _opened(value: Any, arrays: list[mx.array]) -> Callable[[list[mx.array]], Any]:
    """A function from a whole list of arrays to `value` around its own part of them; adds its arrays to `arrays`."""
    if isinstance(value, mx.array):
        place = len(arrays)
        arrays.append(value)
        return lambda others: others[place]
    if isinstance(value, dict):
        parts = {key: _opened(part, arrays) for key, part in value.items()}
        return lambda others: {key: part(others) for key, part in parts.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        items, kind = [_opened(part, arrays) for part in value], type(value)
        return lambda others: kind(item(others) for item in items)
    if (attributes := array_attributes(value)) is not None:
        around = _opened(attributes, arrays)

        def again(others: list[mx.array]) -> Any:
            twin = copy.copy(value)
            vars(twin).update(around(others))
            return twin

        return again
    return lambda others: value


def objects_in(tree: Any) -> list[Any]:
    """The objects of `tree` that arrays are carried in, in order."""
    if array_attributes(tree) is not None:
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [found for part in parts for found in objects_in(part)]


def array_attributes(value: Any) -> dict[str, Any] | None:
    """The attributes in which an object carries arrays from layer to layer, or None where it carries none.

    Objects and caches of mlx-lm may do so in any attribute; caches of ours name those that do in SHARED_ARRAYS.
    """
    if isinstance(value, mx.array | nn.Module):
        return None
    if names := getattr(value, "SHARED_ARRAYS", ()):
        return {name: getattr(value, name) for name in names}
    of_a_model = type(value).__module__.startswith("mlx_lm.models.")
    return dict(vars(value)) if of_a_model and hasattr(value, "__dict__") else None
