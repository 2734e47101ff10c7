"""The matrix products that a training step needs at least, and how long this machine takes for each of them alone.

Products are counted from a model's layers, without computing anything.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import EXPERTS, LINEARS, AdapterLayer, layer_shape
from mlx_lora.models.trunk.layers import layers_of

Loss = Literal["completion", "all"]

# Repeats in one evaluation; timed evaluations; products with more entries in their result aren't repeated.
REPEATS, ROUNDS, SMALL = 4, 3, 1 << 24


@dataclass(frozen=True)
class Work:
    """A step of `rows` rows of `length` positions each; loss on all of them, or on the last quarter (completion)."""

    rows: int = 4
    length: int = 128
    loss: Loss = "completion"

    @property
    def trained(self) -> int:
        """Positions with loss."""
        return self.rows * (self.length if self.loss == "all" else max(self.length // 4, 1))


@dataclass(frozen=True)
class Product:
    """(m, k) times (k, n), `batch` of them at once; `form` says which operand lies transposed in memory."""

    m: int
    k: int
    n: int
    form: Literal["nn", "nt", "tn"] = "nn"
    batch: int = 1

    @property
    def operations(self) -> int:
        return 2 * self.m * self.k * self.n * self.batch


def products(model: nn.Module, config: dict[str, Any], work: Work, *, trained: int | None = None) -> Counter[Product]:
    """The products that a step needs at least, and how often each.

    They are: forward in all layers; gradients of inputs from the lowest adapted layer up; gradients of the adapters,
    not of frozen weights; the output head on positions with loss (`trained`, or else `work.trained`). Attention counts
    whole squares, as most kernels compute them.
    """
    counted: Counter[Product] = Counter()
    positions, blocks = work.rows * work.length, layers_of(model)
    lowest = next(index for index, block in enumerate(blocks) if _adapters(block))
    for index, block in enumerate(blocks):
        for _, module in block.named_modules():
            if isinstance(module, AdapterLayer):
                counted.update(_adapter_products(module, positions))
            if isinstance(module, (*LINEARS, *EXPERTS)):
                experts = config.get("num_experts_per_tok", 1) if isinstance(module, EXPERTS) else 1
                counted.update(_linear_products(module, positions * experts, backward=index >= lowest))
        counted.update(_attention_products(config, work, backward=index >= lowest))
    width, tokens, rows = text_config(config)["hidden_size"], vocabulary(model), trained or work.trained
    counted.update([Product(rows, width, tokens, "nt"), Product(rows, tokens, width)])
    return counted


def _adapters(block: nn.Module) -> list[nn.Module]:
    return [module for _, module in block.named_modules() if isinstance(module, AdapterLayer)]


def _linear_products(layer: nn.Module, positions: int, *, backward: bool) -> Iterator[Product]:
    """y = x Wᵀ and dx = dy W, for W (out, in)."""
    outputs, inputs = layer_shape(layer)[-2:]
    yield Product(positions, inputs, outputs, "nt")
    if backward:
        yield Product(positions, outputs, inputs)


def _adapter_products(wrapper: AdapterLayer, positions: int) -> Iterator[Product]:
    """z = x A, y = z B, and the gradients of z, B, x and A."""
    outputs, inputs = layer_shape(wrapper.base)[-2:]
    rank = wrapper.rank
    yield from (Product(positions, inputs, rank), Product(positions, rank, outputs))
    yield from (Product(positions, outputs, rank, "nt"), Product(rank, positions, outputs, "tn"))
    yield from (Product(positions, rank, inputs, "nt"), Product(inputs, positions, rank, "tn"))


def _attention_products(config: dict[str, Any], work: Work, *, backward: bool) -> Iterator[Product]:
    """Scores and values of every head, and two products for each of them in the backward pass."""
    config = text_config(config)
    heads, length = config["num_attention_heads"], work.length
    size, batch = config.get("head_dim") or config["hidden_size"] // heads, work.rows * heads
    yield from (Product(length, size, length, "nt", batch), Product(length, length, size, "nn", batch))
    if backward:
        yield from (Product(length, length, size, "nn", batch), Product(length, length, size, "tn", batch))
        yield from (Product(length, size, length, "nt", batch), Product(length, length, size, "tn", batch))


def time_product(product: Product, dtype: mx.Dtype) -> float:
    """Median seconds of one such product on random data."""
    m, k, n, batch = product.m, product.k, product.n, product.batch
    left = mx.random.normal((batch, k, m) if product.form == "tn" else (batch, m, k)).astype(dtype)
    right = mx.random.normal((batch, n, k) if product.form == "nt" else (batch, k, n)).astype(dtype)
    left, right = (array[0] if batch == 1 else array for array in (left, right))
    a = left.swapaxes(-1, -2) if product.form == "tn" else left
    b = right.swapaxes(-1, -2) if product.form == "nt" else right
    return timed(lambda: a @ b, repeats=REPEATS if batch * m * n <= SMALL else 1, inputs=(left, right))


def timed(compute: Callable[[], Any], *, inputs: Any = (), repeats: int = 1) -> float:
    """Median seconds of one `compute()`, its arrays evaluated inside the clock, after one round to warm up."""
    mx.eval(inputs, compute())
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        mx.eval([compute() for _ in range(repeats)])
        seconds.append((time.perf_counter() - start) / repeats)
    return median(seconds)


def vocabulary(model: nn.Module) -> int:
    """Columns of the model's logits, found without computing anything."""
    return int(model(mx.zeros((1, 1), mx.int32)).shape[-1])


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's configuration, which a multimodal model has under `text_config`."""
    return dict(config.get("text_config", config))
