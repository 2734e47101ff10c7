"""What only a real device can show of single functions: its kernels at the shapes that are used, and its memory.

Quantized products, attention and recurrences are held against numpy, each in the place's dtype: values, and slopes by
the gradients that training would use. Of memory it is what plans rely on: that MLX counts it, and that limits which a
run sets are put back.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.machine import allocation, device, limits
from mlx_lora.methods import MODES
from mlx_lora.models import recurrence
from mlx_lora.models.trunk.attention import scaled_dot_product_attention
from mlx_lora.tasks import formulas
from mlx_lora.tasks.reference import Weights, dequantized, slope
from mlx_lora.tasks.subject import GPU_FLOAT32, TOLERANCES, Check, Place, Subject, numbers

# Rows of a quantized product: generating, a few at a time, and training; kernels change between them.
MANY = (1, 2, 7, 33, 300)
OUTPUTS, INPUTS, EXPERTS = 192, 256, 4
# Positions of a recurrence: more than a chunk has on any device, and no multiple of it.
POSITIONS = 80
MEBIBYTE = 1 << 20

Function = Callable[..., Any]


def quantized_products(place: Place, subject: Subject) -> Iterator[Check]:
    """x Wᵀ and y W of every mode of MLX's, for few rows and many, and of experts that are chosen by row."""
    draw = np.random.default_rng(0)
    weight = mx.array(draw.normal(0, INPUTS**-0.5, (EXPERTS, OUTPUTS, INPUTS))).astype(place.dtype)
    for mode, (kinds, groups) in MODES.items():
        for bits in kinds if mode != "nf4" else ():  # which has no kernel
            settings: dict[str, Any] = {"group_size": groups[-1], "bits": bits, "mode": mode}
            packed = mx.quantize(weight, **settings)
            arrays = [np.array(_float32(array)) for array in packed]
            whole = dequantized(arrays[0], arrays[1], arrays[2] if len(arrays) > 2 else None, **settings)
            values, expected = [], []
            for rows in MANY:
                for transpose, width in ((True, INPUTS), (False, OUTPUTS)):
                    x = mx.array(draw.normal(size=(rows, width))).astype(place.dtype)
                    y = mx.quantized_matmul(x, *(array[0] for array in packed), transpose=transpose, **settings)
                    values.append(numbers(y).ravel())
                    expected.append((numbers(x) @ (whole[0].T if transpose else whole[0])).ravel())
            chosen = draw.integers(0, EXPERTS, 9)
            x = mx.array(draw.normal(size=(9, 1, INPUTS))).astype(place.dtype)
            y = mx.gather_qmm(x, *packed, rhs_indices=mx.array(chosen), transpose=True, **settings)
            values.append(numbers(y).ravel())
            expected.append((numbers(x) @ whole[chosen].swapaxes(-1, -2)).ravel())
            found, wanted = np.concatenate(values), np.concatenate(expected)
            yield Check(f"{mode} {bits}: products", "numpy", found, wanted, _tolerance(place))


def attention(place: Place, subject: Subject) -> Iterator[Check]:
    """The fused kernel and our gradient of it: causal, one query behind a cache, and with a mask of either kind."""
    draw, scale = np.random.default_rng(1), 64**-0.5
    for name, queries in (("causal", 70), ("one query", 1), ("masked", 70), ("biased", 70)):
        arrays = {
            part: draw.normal(size=(2, heads, length, 64))
            for part, heads, length in (("q", 8, queries), ("k", 2, 70), ("v", 2, 70))
        }
        mask, shown = "causal" if queries > 1 else None, None
        if name == "masked":
            allowed = (draw.random((2, 1, 70, 70)) < 0.5) | np.eye(70, dtype=bool)
            mask, shown = mx.array(allowed), np.where(allowed, 0, -np.inf)
        elif name == "biased":
            mask = mx.array(draw.normal(size=(2, 8, 70, 70))).astype(place.dtype)
            shown = numbers(mask)
        ours = partial(_attended, scale=scale, mask=mask)
        formula = partial(formulas.attention, scale=scale, mask=shown)
        yield from _compared(f"attention, {name}", ours, formula, arrays, place)


def _attended(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any) -> mx.array:
    return scaled_dot_product_attention(q, k, v, None, scale, mask)


def recurrences(place: Place, subject: Subject) -> Iterator[Check]:
    """Each recurrence in chunks, and for one position, as generating runs it."""
    draw = np.random.default_rng(2)

    def normal(*widths: int) -> np.ndarray:
        return draw.normal(size=(2, POSITIONS, *widths))

    def short(array: np.ndarray) -> np.ndarray:
        return np.asarray(array / np.linalg.norm(array, axis=-1, keepdims=True))

    yield from _recurrence(
        "gated delta rule",
        lambda *arrays: recurrence.gated_delta_update(*arrays)[0],
        formulas.gated_delta,
        {
            "q": short(normal(2, 32)), "k": short(normal(2, 32)), "v": normal(4, 32), "a": normal(4), "b": normal(4),
            "rate": draw.normal(size=4), "bias": draw.normal(size=4),
        },
        place,
    )  # fmt: skip
    yield from _recurrence(
        "Mamba-2",
        lambda *arrays: recurrence.ssm_update(*arrays)[0],
        formulas.mamba,
        {
            "x": normal(4, 32), "rate": draw.normal(size=4), "b": normal(2, 32) / 6, "c": normal(2, 32),
            "through": draw.normal(size=4), "dt": normal(4), "bias": draw.normal(size=4),
        },
        place,
    )  # fmt: skip
    by_head = {name: normal(4, 32).swapaxes(1, 2) for name in "qkv"}
    yield from _recurrence(
        "lightning attention",
        lambda q, k, v, decay: recurrence.recurrent_gla(q, k, v, decay, scale=0.2)[0],
        partial(formulas.lightning, scale=0.2),
        by_head | {"decay": -np.exp(np.linspace(-6, -0.5, 4))},
        place,
        axis=2,
    )


def _recurrence(
    name: str, ours: Function, formula: Function, arrays: Weights, place: Place, *, axis: int = 1
) -> Iterator[Check]:
    yield from _compared(name, ours, formula, arrays, place)
    first = {key: array.take([0], axis) if array.ndim > 1 else array for key, array in arrays.items()}
    yield next(_compared(f"{name}, one position", ours, formula, first, place))


def memory(place: Place, subject: Subject) -> Iterator[Check]:
    """What MLX counts, the limit that plans start from, and the limits that a run sets and puts back."""
    gc.collect()
    mx.clear_cache()
    mx.synchronize()
    mx.reset_peak_memory()
    before, seen = mx.get_active_memory(), []
    one = mx.arange(16 * MEBIBYTE, dtype=mx.float32)
    mx.eval(one)
    seen.append(mx.get_active_memory() - before)
    two = one + 1
    mx.eval(two)
    del one
    seen.append(mx.get_active_memory() - before)
    del two
    seen += [mx.get_active_memory() - before, mx.get_peak_memory() - before]
    yield Check("counted memory", "arithmetic", np.array(seen) / MEBIBYTE, np.array([64, 64, 0, 128.0]), 0.02)
    limit = limits.limit_bytes()
    yield Check("limit of memory", "reason", np.array([float(limit > MEBIBYTE)]), np.ones(1), 0.0)
    outside = _limits()
    with allocation.memory_limits():
        inside = _limits()
        mx.eval(mx.ones((1024,)) + 1)
    put_back = np.array(_limits(), np.float64)
    yield Check("limits put back", "before", put_back, np.array(outside, np.float64), 0.0, unit=1.0)
    if place.device.type == mx.gpu:
        recommended = mx.device_info()["max_recommended_working_set_size"]
        wired = np.array([inside[0]], np.float64)
        yield Check("wired memory", "recommended", wired, np.array([recommended], np.float64), 0.0)


def _limits() -> list[int]:
    """Of wired memory, of kept memory and of all, in bytes. MLX tells a limit only while setting another."""
    found = []
    for exchange in (mx.set_wired_limit, mx.set_cache_limit, mx.set_memory_limit):
        found.append(exchange(0))
        exchange(found[-1])
    return found


def _compared(name: str, ours: Function, formula: Function, arrays: Weights, place: Place) -> Iterator[Check]:
    """What a function gives, and how it changes along one direction, both in the place's dtype and by a formula.

    Both sides get the same numbers, rounded to that dtype.
    """
    given = {key: mx.array(array.astype(np.float32)).astype(place.dtype) for key, array in arrays.items()}
    exact = {key: numbers(array) for key, array in given.items()}
    y = ours(*given.values())
    yield Check(name, "numpy", numbers(y), formula(*exact.values()), _tolerance(place))
    draw = np.random.default_rng(4)
    cotangent = mx.array(draw.normal(size=y.shape).astype(np.float32)).astype(y.dtype)
    _, made = mx.vjp(ours, list(given.values()), [cotangent])
    gradients = dict(zip(given, map(numbers, made), strict=True))
    move = {key: draw.normal(size=array.shape) for key, array in exact.items()}
    value = sum((gradients[key] * move[key]).sum() for key in move)
    weights = numbers(cotangent)
    expected = slope(lambda moved: float((formula(*moved.values()) * weights).sum()), exact, move)
    norm = np.sqrt(sum(np.square(gradient).sum() for gradient in gradients.values()))
    found, wanted = np.array([value]) / norm, np.array([expected]) / norm
    yield Check(f"{name}: gradient", "numpy", found, wanted, _tolerance(place), unit=1.0)


def _float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def _tolerance(place: Place) -> float:
    return GPU_FLOAT32 if device.on_gpu() and place.dtype == mx.float32 else TOLERANCES[place.dtype]
