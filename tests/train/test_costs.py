"""What training costs, counted by hand for a Llama and found in its modules."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter, Train
from mlx_lora.models.shapes import network
from mlx_lora.train.costs import Costs, costs
from tests.adapters.zoo import COMMON, MODELS

WIDTH, INNER, HEADS, KEYS, RANK, LAYERS, VOCABULARY = 64, 128, 4, 32, 8, 6, 262
LLAMA: dict[str, Any] = COMMON | {
    "model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": INNER,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "torch_dtype": "float16",
}  # fmt: skip
ATTENTION = 4 * RANK * WIDTH + 2 * RANK * WIDTH + 2 * RANK * KEYS  # q and o: both sides; k and v: in, and out of keys
LINEAR = 3 * RANK * (WIDTH + INNER)
# Two norms' inputs; queries, keys, values; the inputs of q, k, v and of o with four intermediates; gate and up.
KEPT = 2 * WIDTH + WIDTH + 2 * KEYS + 2 * WIDTH + 4 * RANK + 2 * INNER


def cost(
    config: dict[str, Any] = LLAMA,
    *,
    bits: int | None = None,
    gpu: bool = False,
    optimizer: Any = "adamw",
    **adapter: Any,
) -> Costs:
    settings = {"mode": "affine", "bits": bits, "group_size": 32} if bits else None
    model = network(config, quantization=settings, gpu=gpu)
    attach(model, Adapter(**{"rank": RANK, **adapter}))
    return costs(model, Train(optimizer=optimizer), dtype=mx.float16 if gpu else mx.float32, gpu=gpu)


@pytest.mark.parametrize(("targets", "parameters"), [("attention", ATTENTION), ("all-linear", ATTENTION + LINEAR)])
@pytest.mark.parametrize("layers", ["all", 2])
def test_an_adapter_has_the_bytes_of_its_closed_form(targets: str, parameters: int, layers: Any) -> None:
    count = LAYERS if layers == "all" else layers
    assert cost(targets=targets, layers=layers).adapter == 4 * count * parameters


@pytest.mark.parametrize(("optimizer", "copies"), [("adam", 2), ("adamw", 2), ("sgd", 1), ("lion", 1)])
def test_an_optimizer_keeps_so_many_copies_of_the_adapter(optimizer: str, copies: int) -> None:
    found = cost(optimizer=optimizer)
    assert found.state == pytest.approx(copies * found.adapter, abs=64)  # and some scalars
    assert found.fixed == found.weights + 2 * found.adapter + found.state


def test_weights_are_float32_on_a_processor_half_on_a_gpu_and_packed_where_asked() -> None:
    layer = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * INNER
    packed, plain = LAYERS * layer + VOCABULARY * WIDTH, (2 * LAYERS + 1) * WIDTH
    assert cost().weights == 4 * (packed + plain) and cost(gpu=True).weights == 2 * (packed + plain)
    groups = packed // 32  # a scale and a bias of two bytes for each
    assert cost(bits=4).weights == packed // 2 + 4 * groups + 4 * plain
    assert cost(bits=8, gpu=True).weights == packed + 4 * groups + 2 * plain


def test_a_layer_keeps_what_its_backward_pass_reads() -> None:
    found = cost()
    assert {layer.kept for layer in found.layers} == {KEPT}
    assert found.kept(2, 10) == 4 * 2 * 10 * LAYERS * KEPT and found.entering(2, 10) == 4 * 2 * 10 * LAYERS * WIDTH
    everywhere = cost(targets="all-linear").layers[0]
    assert everywhere.kept == KEPT + WIDTH + INNER + 3 * RANK  # the inputs of gate and up, and of down
    assert everywhere.late == 2 * INNER + WIDTH + INNER + 3 * RANK
    assert cost(gpu=True).kept(1, 10) == found.kept(1, 10) // 2


def test_dropout_keeps_an_input_and_a_mask_for_every_linear() -> None:
    inputs = 3 * WIDTH + WIDTH
    assert cost(dropout=0.1).layers[0].kept == KEPT - 2 * WIDTH + inputs + inputs // 4


def test_layers_below_the_lowest_adapter_keep_nothing() -> None:
    found = cost(layers=2)
    assert len(found.layers) == 2 and len(found.below) == LAYERS - 2
    assert found.kept(1, 10) == 4 * 10 * 2 * KEPT
    assert found.work(recompute=True) - found.work(recompute=False) == 2 * (
        2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * INNER
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_has_costs(name: str) -> None:
    kind, changes = MODELS[name]
    found = cost({"model_type": kind, **COMMON, **changes})
    assert (found.vocabulary, found.hidden) == (COMMON["vocab_size"], COMMON["hidden_size"])
    assert all(layer.kept > layer.late > 0 and layer.heads == 4 for layer in found.layers)
    assert all(bool(layer.scores) == (kind == "gemma2") for layer in found.layers)
