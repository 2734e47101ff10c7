"""A packed layer may keep its float32 weight beside the packed one, for generating on a CPU.

A packed weight is unpacked again in every pass, which training needs: no dense copy may live until the backward pass.
Generating makes a pass for every token, and one row times a packed weight takes about twice the time of one row times
a float32 weight on a CPU. `models.unpack` decides which layers keep one, and counts the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class Dense:
    """`weight` (out, in) float32, and the packed layer's arrays that it was made from."""

    weight: mx.array
    made_from: dict[str, mx.array]


def keep_dense(layer: nn.Module, weight: mx.array) -> None:
    """Let `layer` multiply by `weight` (out, in) from now on. It is no parameter: it is neither saved nor trained."""
    vars(layer)["dense"] = Dense(weight, {name: array for name, array in layer.items() if isinstance(array, mx.array)})


def dense_weight(layer: nn.Module) -> mx.array | None:
    """The float32 weight kept beside a layer's packed one; None without one, or once a packed array was replaced."""
    kept: Dense | None = vars(layer).get("dense")
    if kept is None or any(layer.get(name) is not array for name, array in kept.made_from.items()):
        return None
    return kept.weight
