"""Whether rows may be packed into one line for a model: verified numerically, as they are trained.

A few short rows run through the model packed, and each by itself. Hidden states have to agree, and for one layer of
each kind the gradients of what enters it and of what it trains.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.errors import MlxLoraError
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.lean import lean
from mlx_lora.models.trunk.segments import caches, keeps_state
from mlx_lora.models.trunk.tolerance import agree
from mlx_lora.models.trunk.trial import Call, Function, kinds, recording, training
from mlx_lora.models.trunk.trunk import Trunk

# Lengths of the rows packed into two lines of WIDTH positions: the rest is padding.
PACKED = ((5, 12, 8), (9, 14))
WIDTH = 26
# Positions up to which float32 rotary angles stay well inside the tolerance.
EXACT_POSITIONS = 8192


def packing_refused(trunk: Trunk, *, length: int = WIDTH, without: frozenset[str] = frozenset()) -> str | None:
    """Why rows can't be packed for this model, or None when they can: verified numerically, as they are trained.

    `length` is that of the packed rows to come. The trial is short, but it sits at the end of those positions: some
    models scale attention or rotary frequencies by the absolute position once it is large.
    """
    layers = layers_of(trunk.model)
    first = max(length - WIDTH, 0)
    with training(trunk.model), lean(layers, without=without):
        try:
            if _isolated(trunk, layers, first):
                return None
        except MlxLoraError as error:
            return error.message
        except Exception as error:  # an architecture that wants more of a cache than a mask, or takes none
            return f"it can't be run on packed rows: {error} ({type(error).__name__})"
    state = ": its layers keep a state that runs across rows" if keeps_state(trunk.model) else ""
    return f"packed rows don't give the states of the rows alone{state}"


def _isolated(trunk: Trunk, layers: list[nn.Module], first: int) -> bool:
    """Whether the trial's rows, packed from position `first` on, have the states and gradients that each has alone."""
    lines, rows = _packed_rows()
    tokens = (mx.arange(lines.size) * 7 % 31 + 1).reshape(lines.shape)
    together, apart = dict[int, Call](), dict[int, Call]()
    with recording(layers, together):
        packed = trunk.run_with(tokens, caches(trunk.model, lines, first=first, shares_keys=trunk.shares_keys))
    with recording(layers, apart):  # padding behind a row reaches nothing in it
        alone = trunk.run(_gathered(tokens, rows))
    times = max(1.0, first / EXACT_POSITIONS)
    real = (rows >= 0)[..., None]
    if not agree("packing", [(_gathered(packed, rows) * real, alone * real)], times=times):
        return False
    for call in kinds([together[id(layer)] for layer in layers if id(layer) in together]):
        if isinstance(call.output, mx.array) and call.output.shape[:2] == lines.shape:
            if not agree("packing", _packed_outcomes(call, apart[id(call.layer)], rows), times=times, of=call.layer):
                return False
    return True


def _packed_rows() -> tuple[mx.array, mx.array]:
    """Segment ids (lines, WIDTH), and for each row alone its flat positions there, (rows, longest), -1 for padding."""
    ends = [list(accumulate(row)) for row in PACKED]
    ids = [[1 + bisect_right(line, place) if place < line[-1] else 0 for place in range(WIDTH)] for line in ends]
    longest = max(max(row) for row in PACKED)
    places = [
        [line * WIDTH + end - length + place if place < length else -1 for place in range(longest)]
        for line, row in enumerate(PACKED)
        for end, length in zip(ends[line], row, strict=True)
    ]
    return mx.array(ids), mx.array(places)


def _gathered(packed: mx.array, rows: mx.array) -> mx.array:
    """(lines, WIDTH, …) as the rows alone, (rows, longest, …)."""
    return packed.reshape(-1, *packed.shape[2:])[mx.maximum(rows, 0)]


def _packed_outcomes(together: Call, apart: Call, rows: mx.array) -> list[tuple[mx.array, mx.array]]:
    """What a layer makes of packed rows and of the same rows alone, and the gradients of what enters and is trained."""
    real, trained = (rows >= 0)[..., None], together.layer.trainable_parameters()
    place, x = next(
        (place, value)
        for place, value in _by_place(together).items()
        if isinstance(value, mx.array) and value.ndim == 3 and mx.issubdtype(value.dtype, mx.floating)
    )

    def by(call: Call, shaped: Function, made: Function) -> list[mx.array]:
        def summed(x: mx.array, trained: Any) -> mx.array:
            call.layer.update(trained)
            given = {**_by_place(call), place: shaped(x)}
            arguments = [given.pop(index) for index in range(len(call.arguments))]
            output = made(call.layer(*arguments, **given)) * real
            return (output * mx.cos(mx.arange(output.size)).reshape(output.shape)).sum()

        try:
            value, (of_x, of_trained) = mx.value_and_grad(summed, argnums=(0, 1))(x.astype(mx.float32), trained)
        finally:
            call.layer.update(trained)
        return [value[None], of_x, *(array for _, array in tree_flatten(of_trained))]

    packed = by(together, lambda x: x, lambda output: _gathered(output, rows))
    alone = by(apart, lambda x: _gathered(x, rows), lambda output: output)
    return list(zip(packed[1:], alone[1:], strict=True))


def _by_place(call: Call) -> dict[Any, Any]:
    """A call's arguments by their numbers and names."""
    return {**dict(enumerate(call.arguments)), **call.named}
