"""What training costs, counted by hand for a Llama and found in its modules."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter, Recipe
from mlx_lora.machine import device
from mlx_lora.models.layer_calls import layer_calls
from mlx_lora.models.recurrence import chunks
from mlx_lora.models.shapes import network
from mlx_lora.tasks.plan import Machine, plan_shape
from mlx_lora.train.budget.costs import Costs, costs
from tests.adapters.zoo import COMMON, MODELS
from tests.fixed import fixed
from tests.models.tiny import mixed, plain

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
    return costs(model, fixed(optimizer=optimizer), dtype=mx.float16 if gpu else mx.float32, gpu=gpu)


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
    assert everywhere.after_attention == 2 * INNER + WIDTH + INNER + 3 * RANK
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
    assert all(layer.kept > layer.after_attention > 0 and layer.heads == 4 for layer in found.layers)
    assert all(bool(layer.scores) == (kind == "gemma2") for layer in found.layers)


TINY = {**plain.CONFIGS, **mixed.CONFIGS}
STATE = 4 * 16 * 16  # of every tiny recurrence but one: heads, and two widths of them
# name -> numbers a position that go into a recurrence of the lowest layer
SCANS = {
    "qwen3_5": 2 * 32 + 64 + 2 * 4, "kimi_linear": 4 * 64 + 4, "mamba2": 64 + 2 * 32 + 4, "bailing_hybrid": 3 * 64,
}  # fmt: skip


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("lines", [1, 64])
def test_a_recurrence_keeps_a_state_for_every_span_and_what_goes_into_it(name: str, lines: int) -> None:
    found = cost(TINY[name])
    layer = found.layers[0]
    (scan,) = layer.scans
    assert (scan.inputs, scan.output, scan.state) == (SCANS[name], 64, STATE)
    assert scan.span(lines, gpu=device.on_gpu()) == chunks.span_length(scan.chunk_bytes * lines)
    width = 3 * scan.span(lines, gpu=False)
    states = found.kept_by(layer, lines, width) - 4 * lines * width * layer.kept
    assert states == 3 * lines * 4 * STATE and not layer.scores and not layer.heads
    assert layer.kept > scan.inputs + scan.output
    chunks_held = -(-scan.span(lines, gpu=False) // scan.chunk)
    assert found.span_bytes(layer, lines, width) == chunks_held * lines * scan.chunk_bytes


def test_attention_beside_recurrences_has_none() -> None:
    kinds = [bool(layer.scans) for layer in cost(TINY["qwen3_5"]).layers]
    assert kinds == [True, False] * 2


@pytest.mark.parametrize(("name", "attentions"), [("deepseek_v3", 1), ("glm4_moe_lite", 1), ("longcat_flash", 2)])
def test_latent_attention_keeps_a_square_for_every_head(name: str, attentions: int) -> None:
    found = cost(TINY[name])
    for layer in found.layers:
        assert layer.masked == layer.scores == 4 * attentions
        assert found.kept_by(layer, 2, 100) == 4 * 2 * 100 * (layer.kept + 4 * attentions * 100)


def test_only_the_chosen_experts_are_kept_and_multiplied_and_all_are_trained() -> None:
    experts, chosen, width, inner = 4, 2, 64, 64
    dense, routed = cost(TINY["qwen3_moe"]).layers  # the first layer has no experts
    outputs = chosen * (2 * inner + width) + experts  # gate, up and down, and the router's
    assert routed.after_attention == outputs + 2 * experts and routed.inner == chosen * max(inner, width)
    everywhere = cost(TINY["qwen3_moe"], targets="all-linear", layers=1)
    attention = 4 * RANK * width + 2 * RANK * (width + 2 * 16)
    assert everywhere.adapter == 4 * (attention - 0 + experts * 3 * RANK * (width + inner))
    assert everywhere.layers[0].scans == () and dense.after_attention == 2 * 128
    assert everywhere.work(recompute=True) - everywhere.work(recompute=False) == (
        2 * width * width + 2 * width * 32 + chosen * 3 * width * inner + experts * width
    )


@pytest.mark.parametrize("name", ["mamba", "jamba", "rwkv7"])
def test_a_loop_of_mlx_lms_keeps_its_state_for_every_position(name: str) -> None:
    state = {"mamba": 128 * 16, "jamba": 128 * 16, "rwkv7": 4 * 16 * 16}[name]
    layer = cost(TINY[name]).layers[0]
    assert layer.kept > 3 * state and layer.sliced > 0 and not layer.scores


@pytest.mark.parametrize("name", ["qwen3_5", "deepseek_v3", "kimi_k3", "dbrx"])
def test_noting_leaves_a_model_as_it_was(name: str) -> None:
    model = network(TINY[name], gpu=False)
    before = [(module, type(module), dict(module)) for module in model.modules()]
    active, random = mx.get_active_memory(), [key.tolist() for key in mx.random.state]
    notes = layer_calls(model)
    assert len(notes) == len(model.layers) and any(note.attends for note in notes)
    assert mx.get_active_memory() - active < 1 << 16, "weights were drawn"
    assert [key.tolist() for key in mx.random.state] == random
    for module, kind, items in before:
        assert type(module) is kind and module.keys() == items.keys()
        assert all(module[name] is value for name, value in items.items())


@pytest.mark.parametrize("name", TINY)
def test_every_configuration_has_a_plan(name: str) -> None:
    recipe = Recipe(model="m", adapter=Adapter(rank=2))
    for gpu in (False, True):
        made = plan_shape(TINY[name], recipe, None, Machine(gpu, 1 << 34))
        assert made.peak_memory_bytes > made.fixed > 0
