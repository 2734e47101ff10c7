"""A model run one layer at a time: every row goes through a layer, which is then freed, and the next one is read.

For a model that is too large to be whole in memory, and whose arrays are lazy: a layer is read, cast and computed with
when its first row comes. What enters the next layer lies in a file. That layers take nothing but hidden states from
below is compared with the model itself (`not_by_layer`), on a smaller model of the same configuration.
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

# Largest distance from the whole model, relative to the norm: the same operations on the same numbers.
TOLERANCE = 1e-5


class States(Protocol):
    """Hidden states (1, T, d) by the number of their row."""

    def __getitem__(self, number: int) -> mx.array: ...

    def __setitem__(self, number: int, array: mx.array) -> None: ...


def run_by_layer(
    trunk: Trunk, tokens: Sequence[mx.array], states: States, *, on_layer: Callable[[], None] = lambda: None
) -> None:
    """Fill `states` with what enters the head, (1, T, d), for each row of `tokens` (1, T).

    Every layer is freed behind its last row, and the embedding where the head isn't made of it: the model can't run
    afterwards, but `trunk.head` can.
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
            states[number] = _evaluated(_through(trunk, row, states[number], index))
        release(layer)
        mx.clear_cache()
        on_layer()


def _through(trunk: Trunk, tokens: mx.array, entering: mx.array, index: int) -> mx.array:
    """What leaves layer `index`, and behind the last one the final norm, given what enters the layer."""
    layers = layers_of(trunk.model)
    above = [PassThrough(layer) for layer in layers[index + 1 :]]
    stand_ins: list[Any] = [
        *(PassThrough(layer) for layer in layers[:index]),
        FixedInput(layers[index], entering),
        *above,
    ]
    with arrays_kept(trunk.model):
        output = trunk_with(trunk.module, trunk.model, stand_ins)(tokens, cache=None)
    return above[0].entered if above else output


def _evaluated(array: mx.array) -> mx.array:
    mx.eval(array)
    return array


def release_embeddings(trunk: Trunk, states: mx.array) -> None:
    """Free every embedding that the head does without; `states` (1, T, d) only say what enters the head.

    What takes its place are zeros that nobody computes: a trunk still looks up, layers no longer take it.
    """
    inside = {id(module) for layer in layers_of(trunk.model) for module in layer.modules()}
    for module in trunk.model.modules():
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding) and id(module) not in inside:
            kept = dict(module)
            release(module)
            unneeded = _has_head(trunk, states)
            module.update(
                {name: mx.zeros(array.shape, array.dtype) if unneeded else array for name, array in kept.items()}
            )


def _has_head(trunk: Trunk, states: mx.array) -> bool:
    """Whether the head can be run as the model is; nothing is computed, shapes that don't fit show before that."""
    try:
        return trunk.head(states[0, :1]).shape == (1, trunk.vocabulary)
    except Exception:  # whatever an architecture's ending makes of an embedding without numbers
        return False


def not_by_layer(trunk: Trunk) -> str | None:
    """Why a model of this configuration can't be run a layer at a time, or None; the model stays as it is.

    Layers that share keys and values, or take a part of the embeddings, need more than what enters them.
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
    away = mx.linalg.norm(states[0].astype(mx.float32) - whole.astype(mx.float32))
    holds = away <= TOLERANCE * mx.linalg.norm(whole.astype(mx.float32))
    return (
        None if bool(holds.item()) else "its layers take more than hidden states: with those alone the output differs"
    )
