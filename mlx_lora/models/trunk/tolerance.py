"""How far a part of the trunk may be from the whole model, and whether it is."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

# Largest distance from the whole model, relative to the norm of what is compared: in float32, and in half precision,
# where another shape of batch rounds differently and can send a token to another expert. A part that doesn't hold
# moves values or gradients by tens of percent. What is split off runs the same operations on the same numbers.
TOLERANCES = {
    "head": (1e-3, 1e-2),
    "lean": (1e-4, 5e-2),
    "recompute": (1e-4, 5e-2),
    "last layer": (1e-4, 5e-2),
    "start": (1e-5, 1e-5),
    "packing": (1e-3, 5e-2),
}
# Gradients that are this small a part of the largest one are rounding.
SMALL = 1e-2


def agree(
    part: str, pairs: Sequence[tuple[mx.array, mx.array]], *, times: float = 1.0, of: nn.Module | None = None
) -> bool:
    """Whether the first array of each pair equals the second within `times` the tolerance of a part of TOLERANCES.

    The tolerance is that of half precision where an array that is compared is in half precision, or one of the layer
    `of` that made them. NaN agrees with nothing.
    """
    if any(ours.shape != theirs.shape for ours, theirs in pairs):
        return False
    arrays = [theirs for _, theirs in pairs] + [array for _, array in tree_flatten(of.parameters() if of else {})]
    half = any(array.dtype in (mx.float16, mx.bfloat16) for array in arrays)
    tolerance = TOLERANCES[part][half] * times
    norms = mx.stack([mx.linalg.norm(theirs.astype(mx.float32)) for _, theirs in pairs])
    away = [mx.linalg.norm(ours.astype(mx.float32) - theirs.astype(mx.float32)) for ours, theirs in pairs]
    allowed = mx.maximum(norms, SMALL * norms.max())
    return bool((mx.stack(away) <= tolerance * allowed).all().item())
