"""One optimizer step on the device: gradients summed over micro-batches, divided once, clipped, applied.

A step is dispatched without waiting for it, so that the host prepares the next one while the device computes; its
figures are read later. A step that isn't finite changes nothing. Knows nothing of rows, epochs or events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from mlx_lora.adapters.attach import attached
from mlx_lora.config import Train
from mlx_lora.errors import TrainingError
from mlx_lora.models.trunk.arrays import arrays_kept
from mlx_lora.train import optim
from mlx_lora.train.adalora import rule_for
from mlx_lora.train.distributed import Processes
from mlx_lora.train.objectives.drift import Drift
from mlx_lora.train.objectives.likelihood import Arrays, Loss

# Compiled graphs are kept by shape; beyond this many the old ones are dropped, since each holds megabytes.
MOST_SHAPES = 64


@dataclass(frozen=True)
class Pending:
    """Figures of a dispatched step, on their way: sums over all processes. Reading one waits for the step."""

    loss: mx.array
    tokens: mx.array
    norm: mx.array
    finite: mx.array
    stop: mx.array
    save: mx.array


class Stepper:
    """The compiled step and the state it changes: adapter, optimizer, random numbers, and AdaLoRA's rule if it's used.

    Raises TrainingError for a rate of lora_b's own where no method has that array.
    """

    def __init__(self, model: nn.Module, loss: Loss, settings: Train, steps: int, seed: int, processes: Processes):
        self._model, self._loss, self._settings, self._processes = model, loss, settings, processes
        names = [name for name, _ in tree_flatten(model.trainable_parameters())]
        if settings.loraplus_ratio is not None and not any(map(optim.is_b, names)):
            raise TrainingError(
                "train.loraplus_ratio is for methods with a factor lora_b, and this adapter has none",
                hint="leave it out, or use adapter.method lora, dora, qalora or adalora",
            )
        self._optimizer, self._rule = optim.build(settings, steps), rule_for(model, steps)
        self._optimizer.init(model.trainable_parameters())
        self._memory = {"optimizer": self._optimizer.state} | ({"rule": self._rule.state} if self._rule else {})
        self._zeros = tree_map(mx.zeros_like, model.trainable_parameters())
        self._shapes: set[Any] = set()
        self.notes: dict[str, bool] = {}  # about the step itself, known once it has run; and whether they were told
        mx.random.seed(seed + processes.rank)  # each process drops out its own rows' activations
        mx.eval(model.state, self._memory, self._zeros)
        self._compile()

    def _compile(self) -> None:
        model, optimizer, rule, memory, loss_sum = self._model, self._optimizer, self._rule, self._memory, self._loss
        most = self._settings.max_grad_norm  # not through self: a cycle would keep the graphs of a run that is over
        state = [model.state, memory, mx.random.state]

        def accumulate(loss: mx.array, totals: Any, arrays: Arrays) -> tuple[mx.array, Any]:
            with arrays_kept(model):
                loss_here, gradients = loss_sum.with_gradients(arrays)
            return loss + loss_here, tree_map(mx.add, totals, gradients)

        def apply(loss: mx.array, totals: Any, tokens: mx.array) -> tuple[mx.array, mx.array]:
            gradients = tree_map(lambda total: total / tokens, totals)
            parameters, before = model.trainable_parameters(), tree_map(lambda array: array, memory)
            if rule:
                gradients = rule.penalized(parameters, gradients)
                rule.observe(parameters, gradients)
            norm = optim.global_norm(gradients)
            finite = mx.isfinite(loss) & mx.isfinite(norm)
            if most is not None:
                shrink = mx.minimum(most / (norm + 1e-6), 1.0)
                gradients = tree_map(lambda gradient: gradient * shrink, gradients)
            optimizer.update(model, gradients)
            if rule:
                model.update(rule.pruned(model.trainable_parameters()))
            model.update(_where(finite, model.trainable_parameters(), parameters))
            _refill(memory, _where(finite, memory, before))
            return norm, finite

        measured = loss_sum if self._settings.max_drift is None else Drift(model, loss_sum)

        def evaluate(arrays: Arrays) -> mx.array:
            with arrays_kept(model):
                return measured(arrays)

        drawn = [mx.random.state]  # all that a micro-batch changes
        self._accumulate = self._compiled(accumulate, inputs=state, outputs=drawn)
        self._apply = mx.compile(apply, inputs=state, outputs=state)
        self._evaluate = self._compiled(evaluate, inputs=[model.state], outputs=[])

    def _compiled(self, plain: Callable[..., Any], **captured: Any) -> Callable[..., Any]:
        """`plain` compiled; or as it is, with a note, where the model does what can't be compiled.

        Such a model looks at numbers while it runs, as one that chooses its experts on the host. The first call of a
        shape tells.
        """
        compiled, model, memory, notes = mx.compile(plain, **captured), self._model, self._memory, self.notes
        proven: set[Any] = set()  # shapes, and "plain" once it runs uncompiled

        def call(*arguments: Any) -> Any:
            shapes = tuple((name, array.shape) for name, array in sorted(arguments[-1].items()))
            if "plain" in proven:
                return plain(*arguments)
            if shapes in proven:
                return compiled(*arguments)
            key, remembered = mx.random.state[0] + 0, tree_map(lambda array: array, memory)
            try:
                with arrays_kept(model):
                    result = compiled(*arguments)
                    mx.eval(result)
                proven.add(shapes)
                return result
            except Exception as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                if isinstance(error, MemoryError) or "malloc" in reason or "memory" in reason:
                    raise
                _reseed(key)
                _refill(memory, remembered)
                result = plain(*arguments)  # which raises again what isn't about compiling
                proven.add("plain")
                notes.setdefault(f"this model can't be compiled, and runs uncompiled, slower: {reason}", False)
                return result

        return call

    def dispatch(self, batches: Iterable[Arrays], tokens: int, *, stop: bool = False, save: bool = False) -> Pending:
        """Start one step over micro-batches, of which there may be none here when other processes have some.

        `tokens` are those with loss in `batches`; `stop` asks all processes to stop, `save` to save.
        """
        self._model.train()
        loss, totals = mx.array(0.0), self._zeros
        for arrays in batches:
            self._remember(arrays)
            loss, totals = self._accumulate(loss, totals, arrays)
            mx.async_eval(loss, totals)  # so that one micro-batch's activations are freed before the next one's
        counts = mx.array([float(tokens), float(stop), float(save)])
        loss, totals, counts = self._processes.sum((loss, totals, counts))
        norm, finite = self._apply(loss, totals, counts[0])
        mx.async_eval(loss, counts, norm, finite, self._model.trainable_parameters(), self._memory)
        return Pending(loss, counts[0], norm, finite, counts[1], counts[2])

    def evaluate(self, arrays: Arrays) -> mx.array:
        """Σ weight · nll, lazily, with dropout off; with `max_drift` set [that, Σ KL from the base]: see `Drift`."""
        self._model.eval()
        self._remember(arrays)
        return self._evaluate(arrays)

    def adapter(self) -> dict[str, mx.array]:
        """The trainable arrays as they are now, by bare path; arrays are immutable, so this copies nothing."""
        arrays = dict(tree_flatten(self._model.trainable_parameters()))
        wrapped = {
            f"{path}.{name}": array
            for path, wrapper in attached(self._model).items()
            for name, array in wrapper.adapter_arrays().items()
        }
        inside = {id(array) for array in wrapped.values()}
        return {name: array for name, array in arrays.items() if id(array) not in inside} | wrapped

    def state(self) -> dict[str, mx.array]:
        """All that the next steps depend on, by name: adapter.*, optimizer.*, and MLX's random key (2,) uint32.

        AdaLoRA's rule adds rule.*.
        """
        trained = tree_flatten(self._model.trainable_parameters())
        arrays = {f"adapter.{name}": array for name, array in trained} | dict(tree_flatten(self._memory))
        return arrays | {"random": mx.random.state[0]}

    def restore(self, arrays: dict[str, mx.array]) -> None:
        """Go on from what `state` gave. Raises TrainingError when those arrays are of another adapter or optimizer."""
        current = self.state()
        shapes = ({name: tuple(array.shape) for name, array in found.items()} for found in (arrays, current))
        if next(shapes) != next(shapes):
            raise TrainingError(
                "the checkpoint holds other arrays than this adapter and optimizer", hint="start again with --force"
            )
        adapter = tree_map_with_path(lambda path, _: arrays[f"adapter.{path}"], self._model.trainable_parameters())
        self._model.update(adapter)
        _refill(self._memory, tree_map_with_path(lambda path, _: arrays[path], self._memory))
        _reseed(arrays["random"])
        mx.eval(self._model.trainable_parameters(), self._memory)

    def _remember(self, arrays: Arrays) -> None:
        """Compile anew when there are too many shapes."""
        self._shapes.add((self._model.training, *((name, array.shape) for name, array in sorted(arrays.items()))))
        if len(self._shapes) > MOST_SHAPES:
            self._shapes.clear()
            self._compile()


def _reseed(key: mx.array) -> None:
    """Give MLX's random state back a key (2,) uint32 that it had: the two halves of a seed."""
    high, low = key.tolist()
    mx.random.seed((high << 32) | low)


def _refill(tree: Any, new: Any) -> None:
    """Put `new` into a tree of the same shape, in place: the optimizer and the compiled step hold that tree."""
    for key, value in new.items() if isinstance(new, dict) else enumerate(new):
        if isinstance(value, dict | list):
            _refill(tree[key], value)
        else:
            tree[key] = value


def _where(condition: mx.array, new: Any, old: Any) -> Any:
    return tree_map(lambda a, b: mx.where(condition, a, b) if isinstance(a, mx.array) else a, new, old)
