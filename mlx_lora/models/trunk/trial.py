"""A run of a few tokens through a model as it is, and what its layers make of the calls that it noted.

Layers of the same shape behave alike: `kinds` picks one call of each kind, and `outcome` differentiates what a layer
makes of it, so that two ways of running a layer can be compared in values and in gradients without a whole model.
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

# Five lines, so that no mask fits where a model has another axis, of nine tokens.
STARTS = (3, 6, 0, 5, 2)
LENGTH = 9
# Attributes of modules that differ from layer to layer and change nothing that is computed.
PLACES = ("layer_idx", "layer_id", "layer_index", "idx", "index", "layer_number")

Function = Callable[..., Any]


@dataclass
class Call:
    """How a trunk called one of its layers, and what came back.

    A `frozen` one lies below the lowest layer with something to train: no gradient is ever asked of it.
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
    """Training mode, in which mlx-lm's kernels without a gradient aren't used, but without dropout.

    Behind the block the model has the arrays that it had, and all of it the mode that it had as a whole.
    """
    before = model.training
    model.train()
    for module in model.modules():
        if isinstance(module, Dropout | nn.Dropout):
            module.eval()
    try:
        with arrays_kept(model):
            yield
    finally:
        model.train(before)


@dataclass
class Trial:
    """A run of `tokens`: the trunk's hidden states, and the first call of every layer, or of the trunk instead.

    `arrays` are the model's at that time: a run of another adapter says nothing.
    """

    tokens: mx.array
    hidden: mx.array
    calls: list[Call]
    arrays: list[mx.array]

    def fresh(self, model: nn.Module) -> bool:
        """Whether the model has the very arrays that it ran with."""
        now = _arrays(model)
        return len(now) == len(self.arrays) and all(a is b for a, b in zip(now, self.arrays, strict=True))


def trial_run(trunk: Trunk) -> Trial:
    """The trial of this trunk, run now unless `take_apart` has just done so."""
    if trunk.trial is None or not trunk.trial.fresh(trunk.model):
        calls: dict[int, Call] = {}
        tokens = trial_tokens()
        with recording(layers_of(trunk.model), calls):
            hidden = trunk.run(tokens)
        trunk.trial = trial_of(trunk, tokens, hidden, calls)
    return trunk.trial


def trial_of(trunk: Trunk, tokens: mx.array, hidden: mx.array, calls: dict[int, Call]) -> Trial:
    """What was noted while `tokens` ran through the trunk."""
    layers = layers_of(trunk.model)
    if any(id(layer) not in calls for layer in layers):  # the model runs their parts itself
        of_layers = [Call(trunk.module, (tokens,), {}, hidden)]
    else:
        of_layers = [calls[id(layer)] for layer in layers]
        first = lowest_trainable(trunk.model)
        for call in of_layers[: first if isinstance(first, int) else 0]:
            call.frozen = True
    return Trial(tokens, hidden, of_layers, _arrays(trunk.model))


def trial_tokens() -> mx.array:
    """Ids below 32, int32 (lines, LENGTH)."""
    return (mx.arange(LENGTH) * 7 + mx.array(STARTS)[:, None]) % 31 + 1


def _arrays(model: nn.Module) -> list[mx.array]:
    return [array for _, array in tree_flatten(model.parameters())]


@contextmanager
def recording(layers: Sequence[nn.Module], calls: dict[int, Call]) -> Iterator[None]:
    """While the block runs, note how each of these modules is called first, by the module's id."""
    classes = [type(layer) for layer in layers]

    def recording_class(original: type[nn.Module]) -> type[nn.Module]:
        def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
            kept = _copied(arguments), _copied(named)
            output = original.__call__(self, *arguments, **named)
            calls.setdefault(id(self), Call(self, *kept, _copied(output)))
            return output

        return type(f"Recording{original.__name__}", (original,), {"__call__": call})

    made = {cls: recording_class(cls) for cls in set(classes) if any("__call__" in vars(base) for base in cls.__mro__)}
    try:
        for layer, cls in zip(layers, classes, strict=True):
            layer.__class__ = made.get(cls, cls)  # type: ignore[assignment]
        yield
    finally:
        for layer, cls in zip(layers, classes, strict=True):
            layer.__class__ = cls  # type: ignore[assignment]


def _copied(tree: Any) -> Any:
    """Other array objects: some models change theirs in place."""
    arrays, rebuild = flattened(tree)
    return rebuild([mx.stop_gradient(array) for array in arrays])


def kinds(calls: list[Call]) -> list[Call]:
    """One call of each kind of layer: the same modules, shapes, settings and arguments."""

    def settings(module: nn.Module) -> tuple[Any, ...]:
        plain = [
            (name, value)
            for name, value in sorted(vars(module).items())
            if isinstance(value, bool | int | float | str) and name.lstrip("_") not in PLACES
        ]
        arrays = [
            (name, array.shape, str(array.dtype)) for name, array in module.items() if isinstance(array, mx.array)
        ]
        return type(module).__name__, *plain, *arrays

    def kind(call: Call) -> Any:
        arrays, _ = flattened((call.arguments, call.named))
        others = [value for value in [*call.arguments, *call.named.values()] if isinstance(value, str | int | None)]
        modules = tuple((path, settings(module)) for path, module in call.layer.named_modules())
        return call.frozen, modules, tuple((array.ndim, str(array.dtype)) for array in arrays), str(others)

    return list({kind(call): call for call in reversed(calls)}.values())


def borrows(call: Call, model: nn.Module) -> bool:
    """Whether what a layer makes depends on trained arrays that aren't its own: each is shifted as a whole."""
    own = {id(array) for _, array in tree_flatten(call.layer.trainable_parameters())}
    others = [(name, array) for name, array in tree_flatten(model.trainable_parameters()) if id(array) not in own]
    if not others:
        return False

    def run(*shifts: mx.array) -> mx.array:
        moved = [(name, array + shift) for (name, array), shift in zip(others, shifts, strict=True)]
        model.update(tree_unflatten(moved))
        taken, called_with = flattened((call.arguments, call.named))
        arguments, named = called_with(taken)  # copies of what the layer may change
        made, _ = flattened(call.layer(*arguments, **named))
        return sum((mx.cos(array.astype(mx.float32)).sum() for array in made), start=mx.array(0.0))

    try:
        gradients = mx.grad(run, argnums=tuple(range(len(others))))(*(mx.zeros((), array.dtype) for _, array in others))
    finally:
        model.update(tree_unflatten(others))
    return bool(mx.stack([(gradient != 0).any() for gradient in gradients]).any().item())


def outcome(call: Call, function: Function) -> list[mx.array]:
    """What `function` makes of a call's arguments, and the gradients of that by all it takes and trains; lazily.

    The gradients are those of a sum that no two outputs enter alike. What enters is float32 also where the model is in
    half precision, whose rounding a recurrence can make large, and which sends tokens to other experts.
    """
    layer = call.layer
    trained = [] if call.frozen else tree_flatten(layer.trainable_parameters())
    leaves, called_with = flattened((call.arguments, call.named))
    leaves = [leaf.astype(mx.float32) if mx.issubdtype(leaf.dtype, mx.floating) else leaf for leaf in leaves]
    moving = [index for index, leaf in enumerate(leaves) if not call.frozen and mx.issubdtype(leaf.dtype, mx.floating)]

    def run(*arrays: mx.array) -> list[mx.array]:
        given = dict(zip(moving, arrays, strict=False))
        values = zip(trained, arrays[len(moving) :], strict=True)
        layer.update(tree_unflatten([(name, array) for (name, _), array in values]))
        arguments, named = called_with([given.get(index, leaf) for index, leaf in enumerate(leaves)])
        made, _ = flattened(function(*arguments, **named))
        return [array for array in made if mx.issubdtype(array.dtype, mx.floating)]

    primals = [leaves[index] for index in moving] + [array for _, array in trained]
    outputs = run(*primals)
    if not primals:
        return outputs
    weights = [mx.cos(mx.arange(prod(array.shape)).reshape(array.shape)).astype(array.dtype) for array in outputs]
    try:
        outputs, gradients = mx.vjp(run, primals, weights)
    finally:
        layer.update(tree_unflatten(trained))
    return [*outputs, *gradients]
