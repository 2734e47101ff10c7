"""A float32 step of ours taken apart: the whole, its matrix products, and the functions between them, each alone.

The functions are timed at the step's shapes, forward and backward, as the step computes them. They overlap with nothing
else here, while a compiled step fuses some of them: their sum is a bound, not a profile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import mlx.core as mx

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.machine import elementary
from mlx_lora.models.load import load
from mlx_lora.models.trunk import lean
from mlx_lora.study.products import Work, products, time_product, timed, vocabulary
from tests.bench.sides import rows as plain
from tests.bench.sides.ours import LAYERS, train

Function = Callable[[mx.array], mx.array]


def run(*, model: str, rows: str, steps: int) -> dict[str, Any]:
    """`step`, `products` and, by kind, the `rest`, in seconds of one step; `operations` of the products."""
    loaded, found = load(model), plain.read(rows)
    attach(loaded.model, Adapter(targets="all-linear", layers=LAYERS))
    trained = sum(row.trained for row in found)
    counted = products(loaded.model, loaded.config, Work(len(found), len(found[0].tokens) - 1), trained=trained)
    seconds = train(loaded.model, found, steps)["seconds"]
    words = vocabulary(loaded.model)
    parts: dict[str, float] = {}
    for name, cost in rest(loaded.config, len(found), len(found[0].tokens) - 1, trained, words):
        parts[name] = parts.get(name, 0.0) + cost
    return {
        "step": median(seconds),
        "products": sum(times * time_product(product, mx.float32) for product, times in counted.items()),
        "operations": sum(times * product.operations for product, times in counted.items()),
        "rest": parts,
        "trained_tokens": trained,
    }


def rest(config: dict[str, Any], rows: int, length: int, trained: int, words: int) -> Iterator[tuple[str, float]]:
    """Seconds of everything between the products of a Llama's step, forward in all layers, backward in adapted ones."""
    depth, width, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or width // heads
    gated = mx.random.normal((2, rows, length, config["intermediate_size"]))
    yield "SiLU and gate", _both(lambda x: lean.swiglu(x[0], x[1]), gated, depth)
    scores = mx.random.normal((rows, heads, length, length))
    # computed again in the backward pass
    yield "softmax of attention", _forward(elementary.softmax, scores) * (depth + LAYERS)
    weight = mx.ones((width,))
    hidden = mx.random.normal((rows, length, width))
    yield "norms", 2 * _both(lambda x: mx.fast.rms_norm(x, weight, 1e-5), hidden, depth)
    for count in (heads, config["num_key_value_heads"]):
        turned = mx.random.normal((rows, count, length, size))
        yield "rotary embedding", _both(_rope, turned, depth)
    logits = mx.random.normal((trained, words))
    yield "softmax of the logits", _forward(elementary.softmax, logits)


def _rope(x: mx.array) -> mx.array:
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=10000.0, scale=1.0, offset=0)


def _both(function: Function, x: mx.array, depth: int) -> float:
    """Forward in `depth` layers, backward in the adapted ones."""
    forward, backward = _times(function, x)
    return forward * depth + backward * LAYERS


def _forward(function: Function, x: mx.array) -> float:
    """Seconds of one call, compiled, as in a step."""
    compiled = mx.compile(function)
    return timed(lambda: compiled(x), inputs=x)


def _times(function: Function, x: mx.array) -> tuple[float, float]:
    """(seconds forward, seconds that the gradient adds), compiled, as in a step."""
    cotangent = mx.ones_like(function(x))
    forward = mx.compile(function)
    both = mx.compile(lambda x: mx.vjp(function, [x], [cotangent]))
    alone = timed(lambda: forward(x), inputs=(x, cotangent))
    return alone, max(timed(lambda: both(x)) - alone, 0.0)
