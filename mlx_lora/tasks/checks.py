"""What can be checked about a device: a few numbers that it computed, beside those that it should have.

Those come from formulas that share no code with the package (`reference`), from a record made when the base was
(`python -m tests.selftest`), or from before something that must change nothing. Every part of the checks loads the
embedded base for itself, so that none sees what another left.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora import paths
from mlx_lora.adapters.attach import Wrappers, build, put
from mlx_lora.config import Adapter, Data, Quantize, Train
from mlx_lora.data.batch import Batch, collate
from mlx_lora.data.encode import Row
from mlx_lora.data.prepare import prepare
from mlx_lora.interop.fuse import merge
from mlx_lora.machine import device
from mlx_lora.methods import MODES
from mlx_lora.models.layers import set_modules
from mlx_lora.models.load import LoadedModel, load_stored, ready
from mlx_lora.models.open import load_tokenizer
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.lean import lean
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.quant.quantize import named_arrays
from mlx_lora.serve.engine import Engine
from mlx_lora.store import fingerprint
from mlx_lora.tasks.reference import EMBEDDING, Llama, Weights, dequantized, slope
from mlx_lora.train.events import Step
from mlx_lora.train.objectives.likelihood import Loss, as_arrays
from mlx_lora.train.trainer import train

RECORD = "selftest.json"
ADAPTER = Adapter(rank=4, alpha=8, targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                            "down_proj", "embed_tokens"])  # fmt: skip
SCALE = 2.0  # α / r of the adapter above
TRAIN = Train(
    iters=20, batch_size=4, learning_rate=2e-3, schedule="constant", warmup=0, grad_checkpoint="off", cache_prefix="off"
)
MODE_NAMES = {f"{mode} {bits}": Quantize(mode=mode, bits=bits) for mode, (kinds, _) in MODES.items() for bits in kinds}
MODE_NAMES["nf4 4 double"] = Quantize(mode="nf4", double_quant=True)
ROWS = 32
# Largest difference by what activations are computed in, as a part of the largest number: of logits, of the loss, and
# of slopes as a part of the gradient's norm. A GPU may round float32 products to fewer digits.
TOLERANCES = {mx.float32: 1e-4, mx.float16: 5e-2, mx.bfloat16: 1e-1}
GPU_FLOAT32 = 5e-3
# What quantizing rounds away differs by ties.
ROUNDING = 1e-2


@dataclass(frozen=True)
class Place:
    """Where and in what dtype it is computed."""

    device: mx.Device
    dtype: mx.Dtype

    def __str__(self) -> str:
        return f"{self.device.type} {self.dtype}".replace("DeviceType.", "").replace("mlx.core.", "")


CPU = Place(mx.Device(mx.cpu), mx.float32)


@dataclass(frozen=True)
class Check:
    """Numbers that a device computed, and those that it should have; `unit` is what their difference is a part of."""

    name: str
    against: str
    values: np.ndarray
    expected: np.ndarray
    tolerance: float
    unit: float | None = None

    @property
    def difference(self) -> float:
        """Largest difference as a part of `unit`, by default the largest number expected; NaN where one is NaN."""
        unit = np.abs(self.expected).max() if self.unit is None else self.unit
        return float(np.abs(self.values - self.expected).max() / unit)


class Subject:
    """The base, what is computed with it, and what numpy says about that. Everything is made once, when asked for."""

    def __init__(self, base: Path | None = None):
        self.path = base or paths.bundled("data", "base")

    @cached_property
    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.path / RECORD).read_text(encoding="utf-8")))

    @cached_property
    def llama(self) -> Llama:
        return Llama.read(self.path)

    @cached_property
    def rows(self) -> list[Row]:
        """Some rows of the shipped questions, as tokens."""
        questions = paths.bundled("data", "tasks", "sql", "valid.jsonl")
        return prepare(questions, Data(), load_tokenizer(self.path)).train[:ROWS]

    @cached_property
    def batch(self) -> Batch:
        return collate(self.rows[:2])

    @cached_property
    def adapters(self) -> dict[str, Weights]:
        """Two adapters' arrays by full name."""
        return {"one": self._drawn(1), "two": self._drawn(2)}

    @cached_property
    def direction(self) -> Weights:
        """A way for all arrays of an adapter to move: a fault anywhere in a gradient changes the slope along it."""
        draw = np.random.default_rng(3)
        return {name: draw.normal(size=array.shape) for name, array in self.adapters["one"].items()}

    def loss(self, llama: Llama) -> Callable[[Weights], float]:
        """The batch's mean loss as a function of the adapter on `llama`."""
        batch = self.batch
        return lambda adapter: llama.merged(adapter, SCALE).loss(batch.inputs, batch.targets, batch.weights)

    def _drawn(self, seed: int) -> Weights:
        draw, arrays = np.random.default_rng(seed), {}
        for name, weight in self.llama.weights.items():
            path = name.removesuffix(".weight")
            if path.rpartition(".")[2] in ADAPTER.targets:
                outputs, inputs = weight.shape[::-1] if name == EMBEDDING else weight.shape
                arrays[f"{path}.lora_a"] = draw.normal(0, inputs**-0.5, (inputs, ADAPTER.rank)).astype(np.float32)
                arrays[f"{path}.lora_b"] = draw.normal(0, 0.02, (ADAPTER.rank, outputs)).astype(np.float32)
        return arrays


def _base(place: Place, subject: Subject) -> Iterator[Check]:
    """The base's bytes, and its forward pass."""
    same = fingerprint.of_model(load_stored(subject.path).model) == subject.record["fingerprint"]
    yield Check("tensors of the base", "record", np.array([float(same)]), np.ones(1), 0.0)
    yield _forward("forward", _load(place, subject).model, subject.llama, subject)


def _adapters(place: Place, subject: Subject) -> Iterator[Check]:
    """Two adapters, swapping them, and merging one."""
    model = (loaded := _load(place, subject)).model
    engine, tokens = Engine(loaded), subject.batch.inputs
    for name, arrays in subject.adapters.items():
        engine.add(name, _wrappers(model, arrays))
    seen = []
    for used in (None, "one", "two", "one", None):
        engine.use(used)
        seen.append(_numbers(model(mx.array(tokens))))
    for name, values in (("one", seen[1]), ("two", seen[2])):
        expected = subject.llama.merged(subject.adapters[name], SCALE).logits(tokens)
        yield Check(f"adapter {name}", "numpy", values, expected, _tolerance(model))
    yield Check("swap there and back", "before", np.stack(seen[3:]), np.stack([seen[1], seen[0]]), 0.0)
    wrappers = engine.adapters["one"]
    set_modules(model, {path: merge(wrapper, "keep", place.dtype) for path, wrapper in wrappers.items()})
    yield Check("fuse", "adapter one", _numbers(model(mx.array(tokens))), seen[1], _tolerance(model))


def _gradients(place: Place, subject: Subject) -> Iterator[Check]:
    """The loss as training computes it, and its gradient by every array of an adapter on every kind of layer."""
    model = _load(place, subject).model
    loss, gradients = _loss_and_gradients(model, subject)
    expected = subject.loss(subject.llama)(subject.adapters["one"])
    yield Check("loss", "numpy", np.array([loss]), np.array([expected]), _tolerance(model))
    for target in ADAPTER.targets:
        part = {name: gradient for name, gradient in gradients.items() if target in name}
        yield _slope(f"gradient by {target}", part, subject.llama, subject, _tolerance(model))


def _mode(name: str, settings: Quantize) -> Part:
    """What quantizing rounds away, and the forward and backward pass over packed weights."""

    def checks(place: Place, subject: Subject) -> Iterator[Check]:
        loaded = _load(place, subject, settings)
        rounding, recorded = np.array([_rounding(loaded)]), np.array([subject.record["rounding"][name]])
        yield Check(f"{name}: rounding", "record", rounding, recorded, ROUNDING)
        llama = _in_numpy(loaded.model, subject.llama.config)
        yield _forward(f"{name}: forward", loaded.model, llama, subject)
        _, gradients = _loss_and_gradients(loaded.model, subject)
        yield _slope(f"{name}: gradient", gradients, llama, subject, _tolerance(loaded.model))

    return checks


def _training(place: Place, subject: Subject) -> Iterator[Check]:
    """Some compiled, clipped steps of AdamW."""
    model = _load(place, subject).model
    losses, recorded = np.array(_losses(model, subject)), np.array(subject.record["losses"])
    yield Check(f"losses of {TRAIN.iters} steps", "record", losses, recorded, _tolerance(model))


Part = Callable[[Place, Subject], Iterator[Check]]
PARTS: dict[str, Part] = {
    "base": _base,
    "adapters": _adapters,
    "gradients": _gradients,
    **{name: _mode(name, settings) for name, settings in MODE_NAMES.items()},
    "training": _training,
}


def record(base: Path | None = None) -> dict[str, Any]:
    """What is compared with a record, computed on the CPU backend: the content of `selftest.json`."""
    subject, place = Subject(base), CPU
    with computing_on(place.device):
        return {
            "fingerprint": fingerprint.of_model(load_stored(subject.path).model),
            "rounding": {name: _rounding(_load(place, subject, settings)) for name, settings in MODE_NAMES.items()},
            "losses": _losses(_load(place, subject).model, subject),
        }


@contextmanager
def computing_on(chosen: mx.Device) -> Iterator[None]:
    """Make `chosen` the default device while the block runs."""
    before = mx.default_device()
    mx.set_default_device(chosen)
    try:
        yield
    finally:
        mx.set_default_device(before)


def _load(place: Place, subject: Subject, settings: Quantize | None = None) -> LoadedModel:
    loaded = load_stored(subject.path, quantization=settings)
    if device.on_gpu() and place.dtype == mx.float32:  # after quantizing: the same packed weights everywhere
        loaded.model.set_dtype(mx.float32)
    return ready(loaded)


def _rounding(loaded: LoadedModel) -> float:
    assert loaded.quantized is not None
    return loaded.quantized.relative_error


def _wrappers(model: nn.Module, arrays: Weights) -> Wrappers:
    """Adapter layers around the bare model's, holding `arrays`."""
    wrappers = build(model, ADAPTER)
    assert arrays.keys() == {f"{path}.{name}" for path in wrappers for name in wrappers[path].adapter_params()}
    for path, wrapper in wrappers.items():
        for name in wrapper.adapter_params():
            wrapper[name] = mx.array(arrays[f"{path}.{name}"])
    return wrappers


def _forward(name: str, model: nn.Module, llama: Llama, subject: Subject) -> Check:
    """Logits of whole rows, and of two tokens alone: few rows are multiplied in another way than many."""
    tokens = subject.batch.inputs
    expected = llama.logits(tokens)
    few = (slice(0, 1), slice(0, 2))
    values = [_numbers(model(mx.array(tokens))), _numbers(model(mx.array(tokens[few])))]
    flat = [np.concatenate([whole.ravel(), part.ravel()]) for whole, part in (values, (expected, expected[few]))]
    return Check(name, "numpy", flat[0], flat[1], _tolerance(model))


def _slope(name: str, gradients: Weights, llama: Llama, subject: Subject, tolerance: float) -> Check:
    """The loss's slope where arrays of the first adapter move, by gradients and by a difference, in parts of a norm."""
    move = {key: subject.direction[key] for key in gradients}
    value = sum((gradients[key] * move[key]).sum() for key in gradients)
    expected = slope(subject.loss(llama), subject.adapters["one"], move)
    norm = np.sqrt(sum(np.square(gradient).sum() for gradient in gradients.values()))
    return Check(name, "numpy", np.array([value]) / norm, np.array([expected]) / norm, tolerance, unit=1.0)


def _loss_and_gradients(model: nn.Module, subject: Subject) -> tuple[float, Weights]:
    """Mean loss, and its gradient by every array of the first adapter, as a training step computes them."""
    trunk = take_apart(model)
    put(model, _wrappers(model, subject.adapters["one"]))
    model.train()
    with lean(layers_of(model)):
        loss, gradients = Loss(trunk).with_gradients(as_arrays(subject.batch))
        mx.eval(loss, gradients)
    tokens = subject.batch.trained
    return loss.item() / tokens, {name: _numbers(array) / tokens for name, array in tree_flatten(gradients)}


def _losses(model: nn.Module, subject: Subject) -> list[float]:
    """The loss of every step of a short training."""
    put(model, _wrappers(model, subject.adapters["one"]))
    events = train(model, subject.rows, [], TRAIN, trunk=take_apart(model))
    return [event.loss for event in events if isinstance(event, Step)]


def _in_numpy(model: nn.Module, config: dict[str, Any]) -> Llama:
    """The weights of a model as it is now, packed ones unpacked by formula."""
    weights = {name: _numbers(array) for name, array in named_arrays(model) if name.endswith("norm.weight")}
    for path, module in model.named_modules():
        if "scales" in module:
            arrays = {name: np.array(array) for name, array in module.parameters().items()}
            nested = (arrays["nested_scales"], arrays["nested_mean"]) if "nested_scales" in arrays else None
            weights[f"{path}.weight"] = dequantized(
                arrays["weight"], arrays["scales"], arrays.get("biases"), nested=nested,
                group_size=module.group_size, bits=module.bits, mode=module.mode,
            )  # fmt: skip
    return Llama(config, weights)


def _tolerance(model: nn.Module) -> float:
    dtype = dict(named_arrays(model))["model.norm.weight"].dtype
    return GPU_FLOAT32 if device.on_gpu() and dtype == mx.float32 else TOLERANCES[dtype]


def _numbers(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), np.float64)
