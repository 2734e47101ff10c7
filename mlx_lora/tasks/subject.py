"""What the checks of the selftest compute with: the embedded base, rows, adapters, and how far numbers may differ.

A check is a few numbers that a device computed beside those that it should have. Nothing here says what is checked:
that is in `checks` and `kernels`. Every part of the checks loads the base for itself, so that none sees what another
left.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
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
from mlx_lora.config import Adapter, Data, Quantize
from mlx_lora.data.batch import Batch, collate
from mlx_lora.data.prepare import prepare
from mlx_lora.data.rows import Row
from mlx_lora.machine import device
from mlx_lora.models.load import LoadedModel, load_stored, ready
from mlx_lora.models.open import load_tokenizer
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.lean import lean
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.quant.quantize import named_arrays
from mlx_lora.tasks.reference import EMBEDDING, Llama, Weights, slope
from mlx_lora.train.objectives.likelihood import Loss, as_arrays

RECORD = "selftest.json"
ADAPTER = Adapter(rank=4, alpha=8, targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                            "down_proj", "embed_tokens"])  # fmt: skip
SCALE = 2.0  # α / r of the adapter above
ROWS = 32
# Largest difference by what activations are computed in, as a part of the largest number: of logits, of the loss, and
# of slopes as a part of the gradient's norm. A GPU may round float32 products to fewer digits.
TOLERANCES = {mx.float32: 1e-4, mx.float16: 5e-2, mx.bfloat16: 1e-1}
GPU_FLOAT32 = 5e-3


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
    def rows(self) -> Sequence[Row]:
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

    @cached_property
    def packed(self) -> Batch:
        """The rows of `batch` in one line."""
        return collate(self.rows[:2], [[0, 1]], packed=True)

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


@contextmanager
def computing_on(chosen: mx.Device) -> Iterator[None]:
    """Make `chosen` the default device while the block runs."""
    before = mx.default_device()
    mx.set_default_device(chosen)
    try:
        yield
    finally:
        mx.set_default_device(before)


def load_base(place: Place, subject: Subject, settings: Quantize | None = None) -> LoadedModel:
    loaded = load_stored(subject.path, quantization=settings)
    if device.on_gpu() and place.dtype == mx.float32:  # after quantizing: the same packed weights everywhere
        loaded.model.set_dtype(mx.float32)
    return ready(loaded)


def wrappers_with(model: nn.Module, arrays: Weights) -> Wrappers:
    """Adapter layers around the bare model's, holding `arrays`."""
    wrappers = build(model, ADAPTER)
    assert arrays.keys() == {f"{path}.{name}" for path in wrappers for name in wrappers[path].adapter_params()}
    for path, wrapper in wrappers.items():
        for name in wrapper.adapter_params():
            wrapper[name] = mx.array(arrays[f"{path}.{name}"])
    return wrappers


def forward_check(name: str, model: nn.Module, llama: Llama, subject: Subject) -> Check:
    """Logits of whole rows, and of two tokens alone: few rows are multiplied in another way than many."""
    tokens = subject.batch.inputs
    expected = llama.logits(tokens)
    few = (slice(0, 1), slice(0, 2))
    values = [numbers(model(mx.array(tokens))), numbers(model(mx.array(tokens[few])))]
    flat = [np.concatenate([whole.ravel(), part.ravel()]) for whole, part in (values, (expected, expected[few]))]
    return Check(name, "numpy", flat[0], flat[1], tolerance_of(model))


def slope_check(name: str, gradients: Weights, llama: Llama, subject: Subject, tolerance: float) -> Check:
    """The loss's slope where arrays of the first adapter move, by gradients and by a difference, in parts of a norm."""
    move = {key: subject.direction[key] for key in gradients}
    value = sum((gradients[key] * move[key]).sum() for key in gradients)
    expected = slope(subject.loss(llama), subject.adapters["one"], move)
    norm = np.sqrt(sum(np.square(gradient).sum() for gradient in gradients.values()))
    return Check(name, "numpy", np.array([value]) / norm, np.array([expected]) / norm, tolerance, unit=1.0)


def loss_and_gradients(
    model: nn.Module, subject: Subject, batch: Batch | None = None, *, times: float = 1.0
) -> tuple[float, Weights]:
    """Mean loss, and its gradient by every array of the first adapter, as a training step computes them.

    Inside, both are multiplied by `times`.
    """
    batch = batch or subject.batch
    trunk = take_apart(model)
    put(model, wrappers_with(model, subject.adapters["one"]))
    model.train()
    with lean(layers_of(model)):
        arrays = as_arrays(batch)
        loss, gradients = Loss(trunk).with_gradients(arrays | {"weights": arrays["weights"] * times})
        mx.eval(loss, gradients)
    tokens = batch.trained * times
    return loss.item() / tokens, {name: numbers(array) / tokens for name, array in tree_flatten(gradients)}


def tolerance_of(model: nn.Module) -> float:
    dtype = dict(named_arrays(model))["model.norm.weight"].dtype
    return GPU_FLOAT32 if device.on_gpu() and dtype == mx.float32 else TOLERANCES[dtype]


def numbers(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), np.float64)
