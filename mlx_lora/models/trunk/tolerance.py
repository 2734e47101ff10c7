"""How far the results of a part of `trunk/` may be from the whole model's, and the comparison."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

# Largest distance from the whole model, relative to the norm of the compared array: (in float32, in half precision).
# In half precision, another batch shape rounds differently and can route a token to another expert. A part that is
# wrong for a model changes values or gradients by tens of percent. "start" runs the same operations on the same
# numbers, so its limit is tight.
TOLERANCES = {
    "head": (1e-3, 1e-2),
    "lean": (1e-4, 5e-2),
    "recompute": (1e-4, 5e-2),
    "last layer": (1e-4, 5e-2),
    "start": (1e-5, 1e-5),
    "packing": (1e-3, 5e-2),
    "labels": (1e-3, 5e-2),
}
# Gradients with a norm below this share of the largest one are mostly rounding error, so they are compared relative
# to that share of the largest norm.
SMALL = 1e-2


def agree(
    part: str, pairs: Sequence[tuple[mx.array, mx.array]], *, times: float = 1.0, of: nn.Module | None = None
) -> bool:
    """Whether the first array of each pair equals the second within `times` the tolerance of a part of TOLERANCES.

    The tolerance for half precision applies if a compared array, or a parameter of the layer `of` that computed it, is
    in half precision. NaN agrees with nothing.
    """
    if any(actual.shape != expected.shape for actual, expected in pairs):
        return False
    arrays = [expected for _, expected in pairs] + [array for _, array in tree_flatten(of.parameters() if of else {})]
    half = any(array.dtype in (mx.float16, mx.bfloat16) for array in arrays)
    tolerance = TOLERANCES[part][half] * times
    norms = mx.stack([mx.linalg.norm(expected.astype(mx.float32)) for _, expected in pairs])
    distances = [mx.linalg.norm(actual.astype(mx.float32) - expected.astype(mx.float32)) for actual, expected in pairs]
    scales = mx.maximum(norms, SMALL * norms.max())
    return bool((mx.stack(distances) <= tolerance * scales).all().item())
