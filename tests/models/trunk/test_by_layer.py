"""A model run one layer at a time says what the whole model says, and frees its layers; models that can't say so."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.models.trunk.by_layer import not_by_layer, run_by_layer
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.states_file import StatesFile
from mlx_lora.models.trunk.verify import take_apart
from tests.models.test_every_architecture import CONFIGS
from tests.models.tiny.build import build

ROWS = [mx.array([[3, 1, 4, 1, 5, 9, 2, 6]]), mx.array([[2, 7, 1]])]


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gemma3_text", "qwen3_moe", "deepseek_v3", "qwen3_5", "nemotron_h"]
)
def test_layer_by_layer_is_the_whole_model(name: str) -> None:
    model = build(name, CONFIGS[name])
    trunk = take_apart(model)
    expected = [np.array(model(row)[0]) for row in ROWS]
    assert not_by_layer(trunk) is None
    np.testing.assert_array_equal(np.array(model(ROWS[0])[0]), expected[0], "it is as it was")
    states = StatesFile()
    run_by_layer(trunk, ROWS, states)
    for number, logits in enumerate(expected):
        found = np.array(trunk.head(states[number][0]))
        np.testing.assert_allclose(found, logits, rtol=1e-3, atol=1e-4 * np.abs(logits).max())
    assert all(array.size == 0 for layer in layers_of(model) for array in _arrays(layer))


def _arrays(layer):  # type: ignore[no-untyped-def]
    from mlx.utils import tree_flatten

    return [array for _, array in tree_flatten(layer.parameters())]


@pytest.mark.parametrize(("name", "reason"), [("gemma3n", "share keys"), ("rwkv7", "more than hidden states")])
def test_models_whose_layers_need_more_than_states_say_so(name: str, reason: str) -> None:
    assert reason in str(not_by_layer(take_apart(build(name, CONFIGS[name]))))


def test_states_come_back_from_the_file_bit_for_bit() -> None:
    states = StatesFile()
    arrays = [mx.random.normal((1, 5, 3)).astype(dtype) for dtype in (mx.float32, mx.float16, mx.bfloat16)]
    for number, array in enumerate(arrays):
        states[number] = array
    states[0] = arrays[0] + 1
    states[1] = arrays[1][:, :2]
    assert mx.array_equal(states[0], arrays[0] + 1) and mx.array_equal(states[1], arrays[1][:, :2])
    assert mx.array_equal(states[2], arrays[2]) and states[2].dtype == mx.bfloat16 and 3 not in states
