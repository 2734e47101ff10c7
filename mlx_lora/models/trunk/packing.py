"""Whether rows may be packed into one line for a model: verified numerically, in training mode.

A few short rows run through the model packed, and each alone. The hidden states must agree. So must, for one layer of
each kind, the gradients of the layer's input and of its trained parameters.
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

# Lengths of the rows packed into each of two lines of WIDTH positions; the rest of a line is padding.
PACKED = ((5, 12, 8), (9, 14))
WIDTH = 26
# Up to this position, the error of float32 rotary angles stays well inside the tolerance; beyond it, it grows in
# proportion.
EXACT_POSITIONS = 8192


def packing_refused(trunk: Trunk, *, length: int = WIDTH, without: frozenset[str] = frozenset()) -> str | None:
    """Why rows can't be packed for this model, or None if they can: verified numerically, in training mode.

    `length` is the length of the packed lines that training will use. The trial is short, but its positions are the
    last ones of that length: some models scale attention or rotary frequencies once the absolute position is large.
    """
    layers = layers_of(trunk.model)
    first_position = max(length - WIDTH, 0)
    with training(trunk.model), lean(layers, without=without):
        try:
            if _isolated(trunk, layers, first_position):
                return None
        except MlxLoraError as error:
            return error.message
        except Exception as error:  # an architecture that uses more of its cache than a mask, or takes no cache
            return f"it can't be run on packed rows: {error} ({type(error).__name__})"
    state = ": its layers keep a state that runs across rows" if keeps_state(trunk.model) else ""
    return f"packed rows don't give the states of the rows alone{state}"


def _isolated(trunk: Trunk, layers: list[nn.Module], first_position: int) -> bool:
    """Whether rows, packed from `first_position` on, have the hidden states and gradients that each row has alone."""
    lines, rows = _packed_rows()
    tokens = (mx.arange(lines.size) * 7 % 31 + 1).reshape(lines.shape)
    packed_calls, single_calls = dict[int, Call](), dict[int, Call]()
    with recording(layers, packed_calls):
        packing_caches = caches(trunk.model, lines, first=first_position, shares_keys=trunk.shares_keys)
        packed = trunk.run_with(tokens, packing_caches)
    with recording(layers, single_calls):  # the padding after a row can't affect it: attention is causal
        alone = trunk.run(_unpacked(tokens, rows))
    times = max(1.0, first_position / EXACT_POSITIONS)
    real = (rows >= 0)[..., None]
    if not agree("packing", [(_unpacked(packed, rows) * real, alone * real)], times=times):
        return False
    for call in kinds([packed_calls[id(layer)] for layer in layers if id(layer) in packed_calls]):
        if isinstance(call.output, mx.array) and call.output.shape[:2] == lines.shape:
            gradients = _gradient_pairs(call, single_calls[id(call.layer)], rows)
            if not agree("packing", gradients, times=times, of=call.layer):
                return False
    return True


def _packed_rows() -> tuple[mx.array, mx.array]:
    """Segment ids (lines, WIDTH), and each row's flat positions in those lines, (rows, longest), -1 for padding."""
    ends = [list(accumulate(lengths)) for lengths in PACKED]
    ids = [
        [1 + bisect_right(line_ends, column) if column < line_ends[-1] else 0 for column in range(WIDTH)]
        for line_ends in ends
    ]
    longest = max(max(lengths) for lengths in PACKED)
    positions = [
        [line * WIDTH + end - length + column if column < length else -1 for column in range(longest)]
        for line, lengths in enumerate(PACKED)
        for end, length in zip(ends[line], lengths, strict=True)
    ]
    return mx.array(ids), mx.array(positions)


def _unpacked(packed: mx.array, rows: mx.array) -> mx.array:
    """Packed lines (lines, WIDTH, …) as one row a line, (rows, longest, …)."""
    return packed.reshape(-1, *packed.shape[2:])[mx.maximum(rows, 0)]


def _gradient_pairs(packed_call: Call, single_call: Call, rows: mx.array) -> list[tuple[mx.array, mx.array]]:
    """Gradients of a layer's input and of its trained parameters: (with rows packed, with each row alone)."""
    real, trained = (rows >= 0)[..., None], packed_call.layer.trainable_parameters()
    key, x = next(
        (key, value)
        for key, value in _all_arguments(packed_call).items()
        if isinstance(value, mx.array) and value.ndim == 3 and mx.issubdtype(value.dtype, mx.floating)
    )

    def gradients(call: Call, prepare_input: Function, select_rows: Function) -> list[mx.array]:
        def loss(x: mx.array, trained: Any) -> mx.array:
            call.layer.update(trained)
            named = {**_all_arguments(call), key: prepare_input(x)}
            positional = [named.pop(index) for index in range(len(call.arguments))]
            output = select_rows(call.layer(*positional, **named)) * real
            return (output * mx.cos(mx.arange(output.size)).reshape(output.shape)).sum()

        try:
            x_gradient, trained_gradients = mx.grad(loss, argnums=(0, 1))(x.astype(mx.float32), trained)
        finally:
            call.layer.update(trained)
        return [x_gradient, *(array for _, array in tree_flatten(trained_gradients))]

    packed = gradients(packed_call, lambda x: x, lambda output: _unpacked(output, rows))
    alone = gradients(single_call, lambda x: _unpacked(x, rows), lambda output: output)
    return list(zip(packed, alone, strict=True))


def _all_arguments(call: Call) -> dict[Any, Any]:
    """A call's arguments in one dict: positional ones by their index, the others by name."""
    return {**dict(enumerate(call.arguments)), **call.named}
