"""The selftest passes here, and says where it hurts when one tensor of the base or one formula is altered."""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_lora import paths
from mlx_lora.adapters.lora import LoRALinear
from mlx_lora.config import Train
from mlx_lora.machine import allocation, elementary
from mlx_lora.models.load import LoadedModel, ready
from mlx_lora.models.recurrence import chunks, gated_delta
from mlx_lora.models.trunk import activations as lean
from mlx_lora.models.trunk import attention, segments
from mlx_lora.quant import matmul
from mlx_lora.serve import engine
from mlx_lora.tasks import selftest as tasks
from mlx_lora.tasks import subject as subjects
from mlx_lora.tasks.checks import PARTS, record
from mlx_lora.tasks.selftest import Report, selftest
from mlx_lora.tasks.subject import CPU, Check, Place, Subject, computing_on
from mlx_lora.train import optim
from mlx_lora.train.objectives import likelihood
from mlx_lora.train.step import Stepper

Alteration = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject()


def failed(report: Report) -> list[str]:
    """Names of the lines that failed, without the place."""
    return [line.name.partition(": ")[2] for line in report.lines if not line.passed]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_passes_here(part: str, subject: Subject) -> None:
    report = selftest(subject=subject, only=part)
    assert report.lines and failed(report) == [], report.lines


@pytest.mark.real
def test_the_record_can_be_made_again(subject: Subject) -> None:
    """`python -m tests.selftest` writes it."""
    made = record()
    assert made.keys() == subject.record.keys() and made["fingerprint"] == subject.record["fingerprint"]
    assert made["rounding"] == pytest.approx(subject.record["rounding"], rel=1e-3)
    assert made["losses"] == pytest.approx(subject.record["losses"], rel=1e-4)
    assert made["losses"][-1] < made["losses"][0], "twenty steps on few rows learn something"


@pytest.mark.parametrize(
    "tensor", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.2.self_attn.o_proj.weight"]
)
def test_one_altered_tensor_of_the_base_is_seen(tensor: str, tmp_path: Path) -> None:
    altered = tmp_path / "base"
    shutil.copytree(paths.bundled("data", "base"), altered)
    arrays = load_file(altered / "model.safetensors")
    arrays[tensor].flat[7] = np.nextafter(arrays[tensor].flat[7], np.float16(9))
    save_file(arrays, altered / "model.safetensors", {"format": "mlx"})
    assert set(failed(selftest(subject=Subject(altered), only="base"))) == {"tensors of the base"}


def rewritten(patch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[[Any], Any]) -> None:
    """Let the function called `name` give `change` of what it gave."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *arguments, **named: change(original(*arguments, **named)))


def larger(owner: Any, name: str, times: float = 1.01) -> Alteration:
    """What the function called `name` gives, multiplied."""
    return lambda patch: rewritten(patch, owner, name, lambda made: made * times)


def unscaled(dtype: mx.Dtype, positions: int) -> float:
    return 1.0


def altered_on_loading(patch: pytest.MonkeyPatch) -> None:
    def change(loaded: LoadedModel) -> LoadedModel:
        norm = loaded.model.layers[1].input_layernorm
        norm.weight = norm.weight * mx.where(mx.arange(128) == 3, 1.1, 1.0)
        return loaded

    patch.setattr(subjects, "ready", lambda loaded: change(ready(loaded)))


def lora_without_scale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LoRALinear, "__call__", lambda self, x: self.linear(x) + x @ self.lora_a @ self.lora_b)


def another_epsilon(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nn.RMSNorm, "__call__", lambda self, x: mx.fast.rms_norm(x, self["weight"], 2e-5))


def another_rotation(patch: pytest.MonkeyPatch) -> None:
    def rotated(self: nn.RoPE, x: mx.array, offset: int = 0) -> mx.array:
        return mx.fast.rope(x, self.dims, traditional=False, base=1.01 * self.base, scale=1.0, offset=offset)

    patch.setattr(nn.RoPE, "__call__", rotated)


def gelu_for_silu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lean, "_swiglu", lambda gate, x: nn.gelu(gate) * x)


def swiglu_vjp_without_its_second_term(patch: pytest.MonkeyPatch) -> None:
    @mx.custom_function  # type: ignore[untyped-decorator]
    def swiglu(gate: mx.array, x: mx.array) -> mx.array:
        return nn.silu(gate) * x

    @swiglu.vjp  # type: ignore[untyped-decorator]
    def swiglu_vjp(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, mx.array]:
        gate, x = primals
        return cotangent * x * mx.sigmoid(gate), cotangent * nn.silu(gate)

    patch.setattr(lean, "_swiglu", swiglu)


def tile_without_its_one_hot(patch: pytest.MonkeyPatch) -> None:
    rewritten(patch, likelihood, "_tile", lambda parts: [parts[0], parts[1] * 1.01, *parts[2:]])


def tile_with_another_sum(patch: pytest.MonkeyPatch) -> None:
    rewritten(patch, likelihood, "_tile", lambda parts: [parts[0] + 0.1, *parts[1:]])


def adamw_without_bias_correction(patch: pytest.MonkeyPatch) -> None:
    def build(settings: Train, steps: int) -> optimizers.Optimizer:
        return optimizers.AdamW(optim.schedule(settings, steps), weight_decay=settings.weight_decay)

    patch.setattr(optim, "build", build)


def swap_that_leaves_the_last_adapter(patch: pytest.MonkeyPatch) -> None:
    original = engine.put
    patch.setattr(engine, "put", lambda model, wrappers: original(model, wrappers) if wrappers else None)


def coarser_rounding(patch: pytest.MonkeyPatch) -> None:
    original = mx.quantize
    patch.setattr(mx, "quantize", lambda w, *rest, **named: original(mx.round(w * 256) / 256, *rest, **named))


def packed_rows_that_see_each_other(patch: pytest.MonkeyPatch) -> None:
    rewritten(
        patch, segments.PackedCache, "make_mask", lambda mask: mx.broadcast_to(mx.tri(mask.shape[-1]) > 0, mask.shape)
    )


def limits_that_stay(patch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def raised() -> Iterator[None]:
        yield
        mx.set_memory_limit(mx.set_memory_limit(1 << 40) + 1)

    patch.setattr(allocation, "memory_limits", raised)


def steps_that_leave_another_adapter_each_time(patch: pytest.MonkeyPatch) -> None:
    moved = itertools.count()

    def adapter(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        away = 0.01 * next(moved)
        return {name: array + away for name, array in arrays.items()}

    rewritten(patch, Stepper, "adapter", adapter)


# the part that is run, the line that must fail, and what is altered
ALTERATIONS: list[tuple[str, str, Alteration]] = [
    ("base", "forward", altered_on_loading),
    ("base", "forward", another_epsilon),
    ("base", "forward", another_rotation),
    ("adapters", "adapter one", lora_without_scale),
    ("adapters", "fuse", lambda patch: rewritten(patch, LoRALinear, "delta", lambda delta: delta * 1.01)),
    ("adapters", "swap there and back", swap_that_leaves_the_last_adapter),
    ("gradients", "loss", gelu_for_silu),
    ("gradients", "loss", lambda patch: rewritten(patch, elementary, "softmax", lambda shares: shares * 1.01)),
    ("gradients", "loss", tile_with_another_sum),
    ("gradients", "gradient by gate_proj", swiglu_vjp_without_its_second_term),
    ("gradients", "gradient by embed_tokens", tile_without_its_one_hot),
    ("affine 4", "affine 4: forward", lambda patch: rewritten(patch, matmul, "_unpacked", lambda w: w * 1.01)),
    ("affine 3", "affine 3: gradient", lambda patch: rewritten(patch, matmul, "dequantize", lambda w: w * 1.01)),
    ("nvfp4 4", "nvfp4 4: forward", lambda patch: rewritten(patch, matmul, "dequantize", lambda w: w * 1.01)),
    ("affine 8", "affine 8: rounding", coarser_rounding),
    ("training", "losses of 20 steps", adamw_without_bias_correction),
    ("quantized products", "nvfp4 4: products", larger(mx, "quantized_matmul")),
    ("quantized products", "affine 8: products", larger(mx, "gather_qmm")),
    ("attention", "attention, biased", larger(elementary, "softmax")),
    ("attention", "attention, causal: gradient", larger(attention, "_added")),
    ("recurrences", "gated delta rule", larger(gated_delta, "unit_lower_inverse")),
    ("recurrences", "lightning attention: gradient", larger(chunks, "uncut")),
    ("packed rows", "packed rows: loss", packed_rows_that_see_each_other),
    ("half precision", "gradient in float16", lambda patch: patch.setattr(likelihood, "gradient_scale", unscaled)),
    ("steps ahead", "steps ahead: adapter", steps_that_leave_another_adapter_each_time),
    ("memory", "counted memory", larger(mx, "get_active_memory", 1.1)),
    ("memory", "limits put back", limits_that_stay),
]


@pytest.mark.real
@pytest.mark.processor("a GPU takes other ways, and more may differ there")
@pytest.mark.parametrize(("part", "line", "alter"), ALTERATIONS)
def test_one_altered_formula_is_seen(
    part: str, line: str, alter: Alteration, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    alter(monkeypatch)
    assert line in failed(selftest(subject=subject, only=part))


def values(*numbers: float) -> Callable[[Place, Subject], Iterator[Check]]:
    """A part with one check, whose values are those of the place: the first number in the first place."""
    left = iter(numbers)

    def part(place: Place, subject: Subject) -> Iterator[Check]:
        yield Check("number", "numpy", np.array([next(left)]), np.array([2.0]), 0.1)

    return part


def test_a_part_that_raises_is_a_failed_line_and_the_others_run(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(place: Place, subject: Subject) -> Iterator[Check]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(tasks, "PARTS", {"broken": raising, "whole": values(2.0)})
    monkeypatch.setattr(tasks, "places", lambda: [CPU])
    broken, *whole = selftest(subject=subject).lines
    assert not broken.passed and math.isnan(broken.difference) and broken.error == "RuntimeError: no such kernel"
    assert whole and all(line.passed for line in whole)


def test_a_number_that_is_none_fails(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "PARTS", {"one": values(math.nan, math.nan, math.nan)})
    assert not selftest(subject=subject).passed


def test_what_a_gpu_computes_is_held_against_the_cpu_too(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both within a tenth of 2, and more than that apart."""
    monkeypatch.setattr(tasks, "places", lambda: [Place(CPU.device, mx.float16), CPU])
    monkeypatch.setattr(tasks, "PARTS", {"one": values(2.15, 1.85)})
    lines = selftest(subject=subject).lines
    assert [(line.name, line.against, line.passed) for line in lines] == [
        ("cpu float16: number", "numpy", True),
        ("cpu float32: number", "numpy", True),
        ("cpu float16: number", "cpu", False),
    ]


def test_the_default_device_is_put_back() -> None:
    before = mx.default_device()
    with pytest.raises(ZeroDivisionError), computing_on(CPU.device):
        assert mx.default_device() == CPU.device and 1 / 0
    assert mx.default_device() == before
