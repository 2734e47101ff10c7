"""Cross-entropy over the positions that carry loss, and only those, without ever holding all of their logits.

    loss = Σ weight · nll / Σ weight

Sums are returned, never means: micro-batches, processes and evaluations add sums and divide once. Only the rows with
loss enter the output head, a tile of them at a time. Where gradients are wanted, a tile's are computed right behind
its logits, which are then gone: no pass over the vocabulary is made twice, and what is kept is a gradient of the
hidden states' size. The head is the model's own ending, whatever soft cap, scale, packing or adapter is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_lora.data.batch import Batch
from mlx_lora.machine import device, elementary
from mlx_lora.models.trunk.dropout import Dropout
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.trunk import Trunk
from mlx_lora.train.objectives.half import gradient_scale

# Bytes of float32 logits in one tile; four to six times as much is alive at once. A GPU wants more rows at a time, and
# with too few of them every tile would only wait for the head's weights.
TILE_BYTES, TILE_BYTES_GPU, LEAST_ROWS = 16 << 20, 64 << 20, 64

Arrays = dict[str, mx.array]


def as_arrays(batch: Batch, states: mx.array | None = None, columns: np.ndarray | None = None) -> Arrays:
    """A batch on the device: inputs (B, T), and positions, targets and weights (N,) of the positions with loss.

    `segments` (B, T) where rows are packed; `states` (B, T, d) in place of the inputs where a prefix is kept; `columns`
    (B, M) where the last layer runs for those alone, in which positions count then.
    """
    positions, targets, weights = batch.with_loss(columns)
    arrays = {"positions": mx.array(positions), "targets": mx.array(targets), "weights": mx.array(weights)}
    arrays |= {} if columns is None else {"columns": mx.array(columns)}
    arrays |= {"inputs": mx.array(batch.inputs)} if states is None else {"states": states}
    return arrays if batch.segments is None else arrays | {"segments": mx.array(batch.segments)}


class Loss:
    """Σ weight · nll of a batch's arrays, a float32 scalar; `with_gradients` gives its gradients too.

    `start` is the layer that kept states enter, of batches that bring them. A model that can't be taken apart runs on
    every position, and its logits are picked afterwards.
    """

    def __init__(self, trunk: Trunk, *, start: int = 0):
        self._trunk, self._model, self._start = trunk, trunk.model, start

    def __call__(self, arrays: Arrays) -> mx.array:
        return self.with_each(arrays)[0]

    def with_each(self, arrays: Arrays) -> tuple[mx.array, mx.array]:
        """The sum, and the weight · nll of each position, float32 (N,), that it is the sum of."""
        hidden = self.hidden(arrays)
        total, each = mx.array(0.0), [mx.zeros(0)]
        for tile in self.tiles(hidden):
            (part,) = mx.depends([hidden[tile]], [total])  # one after another, or all logits are made side by side
            nll = negative_log_likelihood(self._trunk.head(part), arrays["targets"][tile])
            each.append(nll * arrays["weights"][tile])
            total = total + each[-1].sum()
        return total, mx.concatenate(each)

    def with_gradients(self, arrays: Arrays) -> tuple[mx.array, Any]:
        """The sum and its gradients by everything trainable in the model, a tree like its parameters; all float32.

        In float16 the sum is scaled by a power of two on its way through the model: see `half.gradient_scale`.
        """

        def scaled(arrays: Arrays) -> tuple[mx.array, float]:
            hidden = self.hidden(arrays)
            scale = gradient_scale(hidden.dtype, arrays["weights"].size)
            weights = arrays["weights"] if scale == 1 else arrays["weights"] * scale
            return self._summed(hidden, arrays["targets"], weights), scale

        (total, scale), gradients = nn.value_and_grad(self._model, scaled)(arrays)
        gradients = tree_map(lambda gradient: gradient.astype(mx.float32), gradients)
        if scale == 1:
            return total, gradients
        return total / scale, tree_map(lambda gradient: gradient / scale, gradients)

    def differentiable(self, arrays: Arrays) -> mx.array:
        """The sum as MLX differentiates it, unscaled."""
        return self._summed(self.hidden(arrays), arrays["targets"], arrays["weights"])

    def _summed(self, hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        """Σ weight · nll, with gradients for the hidden states and for what is trained outside the layers.

        A custom function's vjp gives silent zeros for what its closure holds: both are explicit inputs.
        """
        outside = self._trained_outside_layers()
        tiles = self.tiles(hidden)
        endings = [self._ending(list(outside)) for _ in tiles]

        @mx.custom_function  # type: ignore[untyped-decorator]
        def summed(hidden: mx.array, targets: mx.array, weights: mx.array, *trained: mx.array) -> list[mx.array]:
            total, parts, sums = mx.array(0.0), [hidden], [mx.array(0.0)] * len(trained)
            for tile, ending in zip(tiles, endings, strict=True):
                (part,) = mx.depends([hidden[tile]], parts[-1:])
                loss, gradient, *others = _tile(ending, part, targets[tile], weights[tile], trained)
                total, sums = total + loss, [a + b for a, b in zip(sums, others, strict=True)]
                parts.append(gradient)
            return [total, mx.concatenate(parts[1:]), *sums]

        @summed.vjp  # type: ignore[untyped-decorator]
        def summed_vjp(
            primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
        ) -> list[mx.array]:
            of_hidden, *of_trained = ((cotangents[0] * output).astype(output.dtype) for output in outputs[1:])
            return [of_hidden, *(mx.zeros_like(array) for array in primals[1:3]), *of_trained]

        return summed(hidden, targets, weights, *outside.values())[0]  # type: ignore[no-any-return]

    def hidden(self, arrays: Arrays) -> mx.array:
        """What enters the head, (N, d); the logits themselves, (N, V), of a model that can't be taken apart."""
        states = arrays.get("states")
        hidden = self._trunk.run(
            arrays["inputs"] if states is None else states,
            start=0 if states is None else self._start,
            columns=arrays.get("columns"),
            segments=arrays.get("segments"),
        )
        return hidden.reshape(-1, hidden.shape[-1])[arrays["positions"]]

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (N, V) of what enters the head."""
        return self._trunk.head(hidden)

    def _ending(self, names: list[str]) -> Callable[..., mx.array]:
        """The head as a function of hidden states (n, d) and of the trained arrays called `names`.

        Its dropout draws the same mask whenever it runs: for the logits, and for their gradient.
        """
        if not names:
            return self._trunk.head
        model = self._model
        inside = {id(module) for layer in layers_of(model) for module in layer.modules()}
        dropouts = [module for module in model.modules() if isinstance(module, Dropout) and id(module) not in inside]
        keys = [mx.random.randint(0, 2**31, (2,)).astype(mx.uint32) for _ in dropouts]

        def logits(hidden: mx.array, *trained: mx.array) -> mx.array:
            before = [(name, array) for name, array in tree_flatten(model.trainable_parameters()) if name in names]
            model.update(tree_unflatten(list(zip(names, trained, strict=True))))
            _draw_from(dropouts, keys)
            try:
                return self._trunk.head(hidden)
            finally:
                model.update(tree_unflatten(before))
                _draw_from(dropouts, [None] * len(dropouts))

        return logits

    def _trained_outside_layers(self) -> Arrays:
        """Trainable arrays that the head may use, by name: those of adapters on embeddings or on the head."""
        inside = {
            id(array) for layer in layers_of(self._model) for _, array in tree_flatten(layer.trainable_parameters())
        }
        trained = tree_flatten(self._model.trainable_parameters())
        return {name: array for name, array in trained if id(array) not in inside}

    def tiles(self, hidden: mx.array) -> list[slice]:
        """Equal parts of the rows, up to one, whose logits fit TILE_BYTES, or of LEAST_ROWS."""
        vocabulary = self._trunk.vocabulary
        rows = hidden.shape[0]
        size = TILE_BYTES_GPU if device.on_gpu() else TILE_BYTES
        count = -(-rows // max(size // (4 * vocabulary), LEAST_ROWS))
        return [slice(rows * index // count, rows * (index + 1) // count) for index in range(count)]


def _draw_from(dropouts: list[Dropout], keys: Sequence[mx.array | None]) -> None:
    for dropout, key in zip(dropouts, keys, strict=True):
        dropout.drawn_from(key)


def _tile(
    head: Callable[..., mx.array], hidden: mx.array, targets: mx.array, weights: mx.array, trained: Sequence[mx.array]
) -> list[mx.array]:
    """[Σ weight · nll, its gradient by hidden (n, d), its gradients by what is trained]; one exponential a logit."""
    logits = head(hidden, *trained)
    columns = targets[:, None]
    rows = logits.astype(mx.float32)
    top, chosen = rows.max(axis=-1, keepdims=True), mx.take_along_axis(rows, columns, axis=-1)
    # each of these arrays is read for the last time where the next one is made, which takes its memory
    (rows,) = mx.depends([rows], [top, chosen])
    powers = elementary.exp_below_one(rows - top)
    total, power = powers.sum(axis=-1, keepdims=True), mx.take_along_axis(powers, columns, axis=-1)
    (powers,) = mx.depends([powers], [total, power])
    # d nll / d logits = softmax − one-hot
    share = weights[:, None] / total
    gradient = mx.put_along_axis(powers * share, columns, power * share - weights[:, None], axis=-1)
    gradient = gradient.astype(logits.dtype)
    nll = mx.log(total) + top - chosen
    _, gradients = mx.vjp(head, [hidden, *trained], [gradient])
    return [(nll[:, 0] * weights).sum(), *gradients]


def negative_log_likelihood(logits: mx.array, targets: mx.array) -> mx.array:
    """−log softmax(logits)[target] for each row: logits (N, V), targets (N,) -> (N,), in float32."""
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
    return mx.logsumexp(logits, axis=-1) - chosen
