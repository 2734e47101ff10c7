"""How fast this machine multiplies, measured in under a second: what the first `plan` tells a time by.

A run's own pace is better, and `learn` has it after the first one. Until then the products are timed that most of a
step consists of: activations by a frozen weight, and the gradient by it again, packed in the base's bits. Nothing of
the model is loaded: random numbers take as long. Knows nothing of recipes, and keeps nothing.
"""

from __future__ import annotations

import time
from statistics import median

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.quant.matmul import use_fast_multiply
from mlx_lora.quant.quantize import pack

# A micro-batch's positions, a layer's width (more would only take longer), and bits where a base isn't packed in them.
POSITIONS, MOST_WIDTH, GROUP_SIZE = 512, 2048, 64
# Products are repeated for so long; one of them is made first, because it compiles.
SECONDS = 0.5
# A step takes so many times what its products do: attention, norms, the loss and the update. Measured on SmolLM2-135M
# at 4 bits, 512 positions, two cores shared with others: 1.6 to 2.7.
WHOLE_STEP = 2.0


def measured(*, hidden: int, bits: int | None, dtype: mx.Dtype, gpu: bool) -> float:
    """Seconds that a step takes for a multiplication, on the device that MLX computes on, in a second or less.

    `hidden` is the model's width, `bits` those of its packed weights (None: not packed, in `dtype`).
    """
    width = min(hidden, MOST_WIDTH) // GROUP_SIZE * GROUP_SIZE or GROUP_SIZE
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    model.set_dtype(dtype)
    if bits:
        pack(model, {"mode": "affine", "bits": bits, "group_size": GROUP_SIZE})
    if not gpu:
        use_fast_multiply(model)
    model.freeze()
    states = mx.ones((POSITIONS, width), dtype if gpu else mx.float32)
    mx.eval(model.parameters(), states)
    there_and_back = mx.compile(mx.value_and_grad(lambda states: mx.square(model(states)).sum()))
    mx.eval(there_and_back(states))
    times: list[float] = []
    until = time.perf_counter() + SECONDS
    while not times or time.perf_counter() < until:
        began = time.perf_counter()
        mx.eval(there_and_back(states))
        times.append(time.perf_counter() - began)
    return WHOLE_STEP * median(times) / (2 * POSITIONS * width**2)
