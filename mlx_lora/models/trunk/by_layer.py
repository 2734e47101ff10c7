"""Run a model one layer at a time: all rows pass through a layer, the layer is freed, and the next one is read.

For a model that doesn't fit in memory as a whole. Its arrays are lazy, so a layer is read and cast only when its first
row is computed. The hidden states between two layers are stored in a file. This requires that a layer takes nothing
but hidden states from the layer below; `not_by_layer` checks that on a smaller model of the same configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.models.layers import release
from mlx_lora.models.trunk.arrays import arrays_kept
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.standins import FixedInput, PassThrough, trunk_with
from mlx_lora.models.trunk.trial import trial_tokens
from mlx_lora.models.trunk.trunk import Trunk

# Largest distance from the whole model's output, relative to its norm. Both run the same operations on the same
# numbers, so the limit is tight.
TOLERANCE = 1e-5


class States(Protocol):
    """A store of hidden states (1, T, d), indexed by row number."""

    def __getitem__(self, number: int) -> mx.array: ...

    def __setitem__(self, number: int, array: mx.array) -> None: ...


def run_by_layer(
    trunk: Trunk, tokens: Sequence[mx.array], states: States, *, on_layer: Callable[[], None] = lambda: None
) -> None:
    """Compute the hidden states that enter the head, (1, T, d), for each row of `tokens` (1, T), into `states`.

    Every layer is freed after its last row, and so is the embedding unless the head is tied to it. Afterwards the
    model can't run any more, but `trunk.head` can.
    """
    layers = layers_of(trunk.model)
    for number, row in enumerate(tokens):
        states[number] = _evaluated(trunk.entering(row, 0))
    if tokens:
        release_embeddings(trunk, states[0])
    on_layer()
    for index, layer in enumerate(layers):
        mx.eval(layer.parameters())
        for number, row in enumerate(tokens):
            states[number] = _evaluated(_layer_output(trunk, row, states[number], index))
        release(layer)
        mx.clear_cache()
        on_layer()


def _layer_output(trunk: Trunk, tokens: mx.array, hidden: mx.array, index: int) -> mx.array:
    """Output of layer `index` for its input `hidden`; the final norm's output if it is the last layer."""
    layers = layers_of(trunk.model)
    above = [PassThrough(layer) for layer in layers[index + 1 :]]
    stand_ins: list[Any] = [
        *(PassThrough(layer) for layer in layers[:index]),
        FixedInput(layers[index], hidden),
        *above,
    ]
    with arrays_kept(trunk.model):
        output = trunk_with(trunk.module, trunk.model, stand_ins)(tokens, cache=None)
    return above[0].entered if above else output


def _evaluated(array: mx.array) -> mx.array:
    mx.eval(array)
    return array


def release_embeddings(trunk: Trunk, states: mx.array) -> None:
    """Free every embedding that the head doesn't use; of `states` (1, T, d) only shape and dtype are used.

    Lazy zeros replace a freed embedding. The trunk still looks tokens up in them, but no layer uses the result, so
    they are never computed.
    """
    inside = {id(module) for layer in layers_of(trunk.model) for module in layer.modules()}
    for module in trunk.model.modules():
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding) and id(module) not in inside:
            arrays = dict(module)
            release(module)
            unused = _head_runs(trunk, states)
            module.update(
                {name: mx.zeros(array.shape, array.dtype) if unused else array for name, array in arrays.items()}
            )


def _head_runs(trunk: Trunk, states: mx.array) -> bool:
    """Whether the head works with the model's present arrays. Nothing is computed: shapes show missing arrays."""
    try:
        return trunk.head(states[0, :1]).shape == (1, trunk.vocabulary)
    except Exception:  # any error that an architecture's head raises for an embedding without arrays
        return False


def not_by_layer(trunk: Trunk) -> str | None:
    """Why a model of this configuration can't be run a layer at a time, or None if it can; doesn't change the model.

    Layers that share keys and values, or take a part of the embeddings, need more than the previous layer's output.
    """
    if not trunk.apart:
        return "it can't be taken apart"
    if trunk.shares_keys:
        return "its layers share keys and values"
    tokens = trial_tokens()[:1]
    whole, states = trunk.run(tokens), dict[int, mx.array]()
    mx.eval(whole)
    try:
        with arrays_kept(trunk.model):
            run_by_layer(trunk, [tokens], states)
    except Exception as error:  # layers that return or take more than one array
        return f"its layers take more than hidden states ({type(error).__name__})"
    distance = mx.linalg.norm(states[0].astype(mx.float32) - whole.astype(mx.float32))
    equal = distance <= TOLERANCE * mx.linalg.norm(whole.astype(mx.float32))
    return (
        None if bool(equal.item()) else "its layers take more than hidden states: with those alone the output differs"
    )
