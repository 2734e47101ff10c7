"""What is checked on the embedded base: its bytes, adapters, gradients, quantizing, packing, halves and training.

What should come out is from formulas that share no code with the package (`reference`), from a record made when the
base was (`python -m tests.selftest`), or from before something that must change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapters.attach import put
from mlx_lora.config import Quantize, Train
from mlx_lora.interop.fuse import merge
from mlx_lora.methods import MODES
from mlx_lora.models.layers import set_modules
from mlx_lora.models.load import LoadedModel, load_stored
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.lean import lean
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.quant.quantize import named_arrays
from mlx_lora.serve.engine import Engine
from mlx_lora.store import fingerprint
from mlx_lora.tasks import kernels
from mlx_lora.tasks.reference import Llama, dequantized
from mlx_lora.tasks.subject import (
    ADAPTER,
    CPU,
    SCALE,
    TOLERANCES,
    Check,
    Place,
    Subject,
    computing_on,
    forward_check,
    load_base,
    loss_and_gradients,
    numbers,
    slope_check,
    tolerance_of,
    wrappers_with,
)
from mlx_lora.train.distributed import Processes
from mlx_lora.train.events import Step
from mlx_lora.train.objectives.likelihood import Loss, as_arrays
from mlx_lora.train.step import Stepper
from mlx_lora.train.trainer import train

TRAIN = Train(
    iters=20, batch_size=4, learning_rate=2e-3, schedule="constant", warmup=0, grad_checkpoint="off",
    cache_prefix="off", epochs=1, eval_every=None, patience=None,
)  # fmt: skip
MODE_NAMES = {f"{mode} {bits}": Quantize(mode=mode, bits=bits) for mode, (kinds, _) in MODES.items() for bits in kinds}
MODE_NAMES["nf4 4 double"] = Quantize(mode="nf4", double_quant=True)
# What quantizing rounds away differs by ties.
ROUNDING = 1e-2
# Steps of "steps ahead", and how far they may differ: a GPU adds up an embedding's gradient in any order.
STEPS, AHEAD = 4, 1e-3


def _base(place: Place, subject: Subject) -> Iterator[Check]:
    """The base's bytes, and its forward pass."""
    same = fingerprint.of_model(load_stored(subject.path).model) == subject.record["fingerprint"]
    yield Check("tensors of the base", "record", np.array([float(same)]), np.ones(1), 0.0)
    yield forward_check("forward", load_base(place, subject).model, subject.llama, subject)


def _adapters(place: Place, subject: Subject) -> Iterator[Check]:
    """Two adapters, swapping them, and merging one."""
    model = (loaded := load_base(place, subject)).model
    engine, tokens = Engine(loaded), subject.batch.inputs
    for name, arrays in subject.adapters.items():
        engine.add(name, wrappers_with(model, arrays))
    seen = []
    for used in (None, "one", "two", "one", None):
        engine.use(used)
        seen.append(numbers(model(mx.array(tokens))))
    for name, values in (("one", seen[1]), ("two", seen[2])):
        expected = subject.llama.merged(subject.adapters[name], SCALE).logits(tokens)
        yield Check(f"adapter {name}", "numpy", values, expected, tolerance_of(model))
    yield Check("swap there and back", "before", np.stack(seen[3:]), np.stack([seen[1], seen[0]]), 0.0)
    wrappers = engine.adapters["one"]
    set_modules(model, {path: merge(wrapper, "keep", place.dtype) for path, wrapper in wrappers.items()})
    yield Check("fuse", "adapter one", numbers(model(mx.array(tokens))), seen[1], tolerance_of(model))


def _gradients(place: Place, subject: Subject) -> Iterator[Check]:
    """The loss as training computes it, and its gradient by every array of an adapter on every kind of layer."""
    model = load_base(place, subject).model
    loss, gradients = loss_and_gradients(model, subject)
    expected = subject.loss(subject.llama)(subject.adapters["one"])
    yield Check("loss", "numpy", np.array([loss]), np.array([expected]), tolerance_of(model))
    for target in ADAPTER.targets:
        part = {name: gradient for name, gradient in gradients.items() if target in name}
        yield slope_check(f"gradient by {target}", part, subject.llama, subject, tolerance_of(model))


def _mode(name: str, settings: Quantize) -> Part:
    """What quantizing rounds away, and the forward and backward pass over packed weights."""

    def checks(place: Place, subject: Subject) -> Iterator[Check]:
        loaded = load_base(place, subject, settings)
        rounding, recorded = np.array([_rounding(loaded)]), np.array([subject.record["rounding"][name]])
        yield Check(f"{name}: rounding", "record", rounding, recorded, ROUNDING)
        llama = _in_numpy(loaded.model, subject.llama.config)
        yield forward_check(f"{name}: forward", loaded.model, llama, subject)
        _, gradients = loss_and_gradients(loaded.model, subject)
        yield slope_check(f"{name}: gradient", gradients, llama, subject, tolerance_of(loaded.model))

    return checks


def _training(place: Place, subject: Subject) -> Iterator[Check]:
    """Some compiled, clipped steps of AdamW."""
    model = load_base(place, subject).model
    losses, recorded = np.array(_losses(model, subject)), np.array(subject.record["losses"])
    yield Check(f"losses of {TRAIN.iters} steps", "record", losses, recorded, tolerance_of(model))


def _packing(place: Place, subject: Subject) -> Iterator[Check]:
    """Two rows in a line, neither of which sees the other: the loss and its gradient, as of rows apart."""
    model = load_base(place, subject).model
    loss, gradients = loss_and_gradients(model, subject, subject.packed)
    expected = subject.loss(subject.llama)(subject.adapters["one"])
    tolerance = tolerance_of(model)
    yield Check("packed rows: loss", "numpy", np.array([loss]), np.array([expected]), tolerance)
    yield slope_check("packed rows: gradient", gradients, subject.llama, subject, tolerance)


def _halves(place: Place, subject: Subject) -> Iterator[Check]:
    """The loss and its gradient in both halves, whatever the place computes in.

    In float16 they are as large as those of thousands of times as many positions, whose sum float16 can't hold.
    """
    expected = subject.loss(subject.llama)(subject.adapters["one"])
    for dtype, times in ((mx.float16, 4096.0), (mx.bfloat16, 1.0)):
        model = load_base(place, subject).model
        model.set_dtype(dtype)
        loss, gradients = loss_and_gradients(model, subject, times=times)
        name = f"in {dtype}".replace("mlx.core.", "")
        yield Check(f"loss {name}", "numpy", np.array([loss]), np.array([expected]), TOLERANCES[dtype])
        yield slope_check(f"gradient {name}", gradients, subject.llama, subject, TOLERANCES[dtype])


def _ahead(place: Place, subject: Subject) -> Iterator[Check]:
    """Steps dispatched one behind the other, beside steps that are each waited for: the losses and the adapter."""
    found = []
    for waiting in (True, False):
        model = load_base(place, subject).model
        trunk = take_apart(model)
        put(model, wrappers_with(model, subject.adapters["one"]))
        stepper = Stepper(model, Loss(trunk), TRAIN, STEPS, 0, Processes())
        arrays, pending = as_arrays(subject.batch), []
        with lean(layers_of(model)):
            for _ in range(STEPS):
                pending.append(stepper.dispatch([arrays], subject.batch.trained))
                if waiting:
                    mx.eval(pending[-1].loss, model.trainable_parameters())
        adapter = np.concatenate([numbers(array).ravel() for array in stepper.adapter().values()])
        found.append((np.array([step.loss.item() for step in pending]), adapter))
    waited, ahead = found
    for name, ours, theirs in zip(("losses", "adapter"), ahead, waited, strict=True):
        yield Check(f"steps ahead: {name}", "steps waited for", ours, theirs, AHEAD)


Part = Callable[[Place, Subject], Iterator[Check]]
PARTS: dict[str, Part] = {
    "base": _base,
    "adapters": _adapters,
    "gradients": _gradients,
    "quantized products": kernels.quantized_products,
    **{name: _mode(name, settings) for name, settings in MODE_NAMES.items()},
    "attention": kernels.attention,
    "recurrences": kernels.recurrences,
    "packed rows": _packing,
    "half precision": _halves,
    "training": _training,
    "steps ahead": _ahead,
    "memory": kernels.memory,
}


def record(base: Path | None = None) -> dict[str, Any]:
    """What is compared with a record, computed on the CPU backend: the content of `selftest.json`."""
    subject, place = Subject(base), CPU
    with computing_on(place.device):
        return {
            "fingerprint": fingerprint.of_model(load_stored(subject.path).model),
            "rounding": {name: _rounding(load_base(place, subject, settings)) for name, settings in MODE_NAMES.items()},
            "losses": _losses(load_base(place, subject).model, subject),
        }


def _rounding(loaded: LoadedModel) -> float:
    assert loaded.quantized is not None
    return loaded.quantized.relative_error


def _losses(model: nn.Module, subject: Subject) -> list[float]:
    """The loss of every step of a short training."""
    put(model, wrappers_with(model, subject.adapters["one"]))
    events = train(model, subject.rows, [], TRAIN, trunk=take_apart(model))
    return [event.loss for event in events if isinstance(event, Step)]


def _in_numpy(model: nn.Module, config: dict[str, Any]) -> Llama:
    """The weights of a model as it is now, packed ones unpacked by formula."""
    weights = {name: numbers(array) for name, array in named_arrays(model) if name.endswith("norm.weight")}
    for path, module in model.named_modules():
        if "scales" in module:
            arrays = {name: np.array(array) for name, array in module.parameters().items()}
            nested = (arrays["nested_scales"], arrays["nested_mean"]) if "nested_scales" in arrays else None
            weights[f"{path}.weight"] = dequantized(
                arrays["weight"], arrays["scales"], arrays.get("biases"), nested=nested,
                group_size=module.group_size, bits=module.bits, mode=module.mode,
            )  # fmt: skip
    return Llama(config, weights)
