"""Run a few tokens through the unmodified model, record each layer's call, and repeat single calls for comparison.

Layers of the same shape behave alike, so `kinds` picks one call of each kind. `outcome` repeats a call and computes its
outputs and gradients, so two ways of running a layer can be compared without running the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.models.trunk.arrays import arrays_kept
from mlx_lora.models.trunk.dropout import Dropout
from mlx_lora.models.trunk.flatten import flattened
from mlx_lora.models.trunk.last_layer import names_of
from mlx_lora.models.trunk.layers import layers_of, lowest_trainable

if TYPE_CHECKING:
    from mlx_lora.models.trunk.trunk import Trunk

# Five lines, a size that other axes of a model don't have: a mask can't broadcast along a wrong axis. Nine tokens each.
STARTS = (3, 6, 0, 5, 2)
LENGTH = 9
# Attributes that number the layers. They differ from layer to layer and don't affect what a layer computes.
LAYER_NUMBERS = ("layer_idx", "layer_id", "layer_index", "idx", "index", "layer_number")

Function = Callable[..., Any]


@dataclass
class Call:
    """One call of a layer by its trunk: arguments and output.

    `frozen`: the layer is below the lowest trained layer, so its gradients are never needed.
    """

    layer: nn.Module
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    output: Any
    frozen: bool = False

    def by_name(self) -> dict[str, Any]:
        """The arguments by the names of the layer's parameters."""
        return dict(zip(names_of(self.layer), self.arguments, strict=False)) | self.named


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Training mode, but without dropout. In training mode mlx-lm doesn't use its kernels that have no gradient.

    When the block ends, the model has the same arrays as before, and all its modules get the mode that `model` had.
    """
    was_training = model.training
    model.train()
    for module in model.modules():
        if isinstance(module, Dropout | nn.Dropout):
            module.eval()
    try:
        with arrays_kept(model):
            yield
    finally:
        model.train(was_training)


@dataclass
class Trial:
    """A run of `tokens`: the trunk's hidden states and the first call of every layer.

    If the model doesn't call its layers itself, `calls` is a single call of the trunk. `arrays` are the model's arrays
    at the time of the run: with another adapter the results no longer apply.
    """

    tokens: mx.array
    hidden: mx.array
    calls: list[Call]
    arrays: list[mx.array]

    def fresh(self, model: nn.Module) -> bool:
        """Whether the model still has exactly the arrays that it ran with."""
        current = _arrays(model)
        return len(current) == len(self.arrays) and all(a is b for a, b in zip(current, self.arrays, strict=True))


def trial_run(trunk: Trunk) -> Trial:
    """The trial of this trunk: the one that `take_apart` ran if it is still valid, otherwise a new run."""
    if trunk.trial is None or not trunk.trial.fresh(trunk.model):
        calls: dict[int, Call] = {}
        tokens = trial_tokens()
        with recording(layers_of(trunk.model), calls):
            hidden = trunk.run(tokens)
        trunk.trial = trial_of(trunk, tokens, hidden, calls)
    return trunk.trial


def trial_of(trunk: Trunk, tokens: mx.array, hidden: mx.array, calls: dict[int, Call]) -> Trial:
    """The trial made of the `calls` that were recorded, by module id, while `tokens` ran through the trunk."""
    layers = layers_of(trunk.model)
    if any(id(layer) not in calls for layer in layers):  # the model runs the layers' parts itself
        layer_calls = [Call(trunk.module, (tokens,), {}, hidden)]
    else:
        layer_calls = [calls[id(layer)] for layer in layers]
        first = lowest_trainable(trunk.model)
        for call in layer_calls[: first if isinstance(first, int) else 0]:
            call.frozen = True
    return Trial(tokens, hidden, layer_calls, _arrays(trunk.model))


def trial_tokens() -> mx.array:
    """Ids below 32, int32 (lines, LENGTH)."""
    return (mx.arange(LENGTH) * 7 + mx.array(STARTS)[:, None]) % 31 + 1


def _arrays(model: nn.Module) -> list[mx.array]:
    return [array for _, array in tree_flatten(model.parameters())]


@contextmanager
def recording(layers: Sequence[nn.Module], calls: dict[int, Call]) -> Iterator[None]:
    """While the block runs, record the first call of each of these modules in `calls`, by the module's id."""
    classes = [type(layer) for layer in layers]

    def recording_class(original: type[nn.Module]) -> type[nn.Module]:
        def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
            inputs = _copied(arguments), _copied(named)
            output = original.__call__(self, *arguments, **named)
            calls.setdefault(id(self), Call(self, *inputs, _copied(output)))
            return output

        return type(f"Recording{original.__name__}", (original,), {"__call__": call})

    callable_classes = {cls for cls in classes if any("__call__" in vars(base) for base in cls.__mro__)}
    subclasses = {cls: recording_class(cls) for cls in callable_classes}
    try:
        for layer, cls in zip(layers, classes, strict=True):
            layer.__class__ = subclasses.get(cls, cls)  # type: ignore[assignment]
        yield
    finally:
        for layer, cls in zip(layers, classes, strict=True):
            layer.__class__ = cls  # type: ignore[assignment]


def _copied(tree: Any) -> Any:
    """The same tree with new array objects, because some models change theirs in place."""
    arrays, rebuild = flattened(tree)
    return rebuild([mx.stop_gradient(array) for array in arrays])


def kinds(calls: list[Call]) -> list[Call]:
    """One call of each kind of layer: the same modules, shapes, settings and arguments."""

    def settings(module: nn.Module) -> tuple[Any, ...]:
        plain = [
            (name, value)
            for name, value in sorted(vars(module).items())
            if isinstance(value, bool | int | float | str) and name.lstrip("_") not in LAYER_NUMBERS
        ]
        arrays = [
            (name, array.shape, str(array.dtype)) for name, array in module.items() if isinstance(array, mx.array)
        ]
        return type(module).__name__, *plain, *arrays

    def kind(call: Call) -> Any:
        arrays, _ = flattened((call.arguments, call.named))
        constants = [value for value in [*call.arguments, *call.named.values()] if isinstance(value, str | int | None)]
        modules = tuple((path, settings(module)) for path, module in call.layer.named_modules())
        return call.frozen, modules, tuple((array.ndim, str(array.dtype)) for array in arrays), str(constants)

    return list({kind(call): call for call in reversed(calls)}.values())


def borrows(call: Call, model: nn.Module) -> bool:
    """Whether a layer's output depends on trained arrays of other modules.

    A scalar is added to each of those arrays; the layer depends on an array if the scalar's gradient isn't 0.
    """
    layer_arrays = {id(array) for _, array in tree_flatten(call.layer.trainable_parameters())}
    trained = tree_flatten(model.trainable_parameters())
    outside = [(name, array) for name, array in trained if id(array) not in layer_arrays]
    if not outside:
        return False

    def run(*shifts: mx.array) -> mx.array:
        shifted = [(name, array + shift) for (name, array), shift in zip(outside, shifts, strict=True)]
        model.update(tree_unflatten(shifted))
        inputs, rebuild = flattened((call.arguments, call.named))
        arguments, named = rebuild(inputs)  # copies of objects that the layer may change
        outputs, _ = flattened(call.layer(*arguments, **named))
        return sum((mx.cos(array.astype(mx.float32)).sum() for array in outputs), start=mx.array(0.0))

    zeros = [mx.zeros((), array.dtype) for _, array in outside]
    try:
        gradients = mx.grad(run, argnums=tuple(range(len(outside))))(*zeros)
    finally:
        model.update(tree_unflatten(outside))
    return bool(mx.stack([(gradient != 0).any() for gradient in gradients]).any().item())


def outcome(call: Call, function: Function) -> list[mx.array]:
    """Outputs of `function` for a call's arguments, then gradients of all floating inputs and trained arrays; lazy.

    The gradients are those of a weighted sum of the outputs, with a different weight for each element. Inputs are cast
    to float32 even if the model is in half precision: a recurrence can amplify its rounding errors, and they can route
    tokens to other experts.
    """
    layer = call.layer
    trained = [] if call.frozen else tree_flatten(layer.trainable_parameters())
    leaves, rebuild = flattened((call.arguments, call.named))
    leaves = [leaf.astype(mx.float32) if mx.issubdtype(leaf.dtype, mx.floating) else leaf for leaf in leaves]
    floating = [] if call.frozen else [i for i, leaf in enumerate(leaves) if mx.issubdtype(leaf.dtype, mx.floating)]

    def run(*arrays: mx.array) -> list[mx.array]:
        inputs = dict(zip(floating, arrays, strict=False))
        parameters = zip(trained, arrays[len(floating) :], strict=True)
        layer.update(tree_unflatten([(name, array) for (name, _), array in parameters]))
        arguments, named = rebuild([inputs.get(index, leaf) for index, leaf in enumerate(leaves)])
        outputs, _ = flattened(function(*arguments, **named))
        return [array for array in outputs if mx.issubdtype(array.dtype, mx.floating)]

    primals = [leaves[index] for index in floating] + [array for _, array in trained]
    outputs = run(*primals)
    if not primals:
        return outputs
    weights = [mx.cos(mx.arange(prod(array.shape)).reshape(array.shape)).astype(array.dtype) for array in outputs]
    try:
        outputs, gradients = mx.vjp(run, primals, weights)
    finally:
        layer.update(tree_unflatten(trained))
    return [*outputs, *gradients]
