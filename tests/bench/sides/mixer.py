"""One mixer of Qwen3.5-0.8B's shape, forward and backward by its input: mlx_lm's own, and with functions of ours.

Random float32 weights, a row of its own length, nothing around the mixer. mlx_lm's runs as mlx_lm runs it when
training: a loop over positions. Ours runs the same layer's code with our functions in place of mlx_lm's.
"""

from __future__ import annotations

import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx_lm.models.gated_delta import gated_delta_update as theirs_of_mlx_lm
from mlx_lm.models.gated_delta import normalize_qk
from mlx_lm.models.qwen3_5 import GatedDeltaNet, TextModelArgs

from mlx_lora.machine import allocation
from mlx_lora.models.recurrence import gated_delta_update
from mlx_lora.models.trunk.lean import lean

HIDDEN, HEADS, SIZE = 1024, 16, 128


def mixer() -> GatedDeltaNet:
    """16 heads of keys and of values, each 128 x 128, and a convolution of 4 taps; the same weights every time."""
    mx.random.seed(0)
    made = GatedDeltaNet(
        TextModelArgs(
            hidden_size=HIDDEN, linear_num_key_heads=HEADS, linear_num_value_heads=HEADS,
            linear_key_head_dim=SIZE, linear_value_head_dim=SIZE, linear_conv_kernel_dim=4,
        )
    )  # fmt: skip
    made.train()
    mx.eval(made.parameters())
    return made


def theirs(*, length: int, steps: int) -> dict[str, Any]:
    """mlx_lm's layer as it is."""
    return measure(mixer(), GatedDeltaNet.__call__, length, steps)


def rule(*, length: int, steps: int) -> dict[str, Any]:
    """mlx_lm's layer with our gated delta rule in place of its loop, and nothing else."""
    with _freed_memory_kept():
        return measure(mixer(), _with(gated_delta_update=gated_delta_update), length, steps)


def ours(*, length: int, steps: int) -> dict[str, Any]:
    """mlx_lm's layer as it is trained here: with our rule, convolution and activations."""
    made = mixer()
    with _freed_memory_kept(), lean([made]):
        return measure(made, type(made).__call__, length, steps)


def loop(*, length: int, steps: int) -> dict[str, Any]:
    """mlx_lm's loop over positions by itself: no projections, no convolution, no norm around it."""
    return _of_the_rule(theirs_of_mlx_lm, length, steps)


def chunks(*, length: int, steps: int) -> dict[str, Any]:
    """Our rule by itself."""
    with _freed_memory_kept():
        return _of_the_rule(gated_delta_update, length, steps)


def _of_the_rule(update: Callable[..., Any], length: int, steps: int) -> dict[str, Any]:
    """Forward and backward by q, k, v and both gates, which a projection of the input stands for."""
    mx.random.seed(0)
    shapes = [(1, length, HEADS, SIZE)] * 3 + [(1, length, HEADS)] * 2
    q, k, v, a, b = (mx.random.normal(shape) for shape in shapes)
    q, k = normalize_qk(q, k, inv_scale=SIZE**-0.5, eps=1e-6)
    gates = mx.random.uniform(-1, 1, (2, HEADS))
    mx.eval(q, k, v, a, b, gates)

    def run(x: mx.array) -> mx.array:
        """One array in, so that both are measured as a mixer is."""
        values = x.reshape(1, length, HEADS, SIZE)
        y, _ = update(q * values, k * values, values, a * values[..., 0], b, *gates, use_kernel=False)
        return y.reshape(1, length, HEADS * SIZE)

    return measure(None, lambda _, x: run(x), length, steps, width=HEADS * SIZE)


@contextmanager
def _freed_memory_kept() -> Iterator[None]:
    """As in our trainer, but without its waiting for each operation near the peak: a mixer alone is all peak."""
    with allocation.memory_limits():
        mx.set_memory_limit(1 << 40)
        yield


def _with(**ours: Any) -> Callable[..., mx.array]:
    """The layer's own code, with other objects behind some of its names."""
    call = GatedDeltaNet.__call__
    return types.FunctionType(
        call.__code__, {**call.__globals__, **ours}, call.__name__, call.__defaults__, call.__closure__
    )


def measure(
    layer: GatedDeltaNet | None, call: Callable[..., mx.array], length: int, steps: int, *, width: int = HIDDEN
) -> dict[str, Any]:
    """`seconds` of every step after the first two, `peak_bytes` of all arrays, `added_bytes` of them beyond weights and
    input, and `result`, which two sides must agree on."""
    mx.random.seed(1)
    x, cotangent = mx.random.normal((2, 1, length, width))
    mx.eval(x, cotangent)
    before = mx.get_active_memory()
    seconds, result = [], []
    for step in range(steps + 2):
        if step == 2:
            mx.reset_peak_memory()
        start = time.perf_counter()
        outputs, gradients = mx.vjp(lambda x: call(layer, x), [x], [cotangent])
        mx.eval(outputs, gradients)
        seconds.append(time.perf_counter() - start)
        result = [mx.linalg.norm(array).item() for array in (outputs[0], gradients[0])]
        del outputs, gradients
    peak = mx.get_peak_memory()
    return {"seconds": seconds[2:], "peak_bytes": peak, "added_bytes": peak - before, "result": result}
