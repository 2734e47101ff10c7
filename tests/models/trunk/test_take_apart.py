"""A trunk and its head are the whole model: the same logits for every ending, and not apart where that doesn't hold."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.errors import ModelError
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.verify import take_apart
from tests.adapters.zoo import MODELS, VOCABULARY, network


@pytest.mark.parametrize("name", list(MODELS))
def test_head_of_picked_rows_equals_the_model_and_leaves_it_alone(name: str) -> None:
    model = network(name)
    before = [(path, id(module)) for path, module in model.named_modules()]
    trunk = take_apart(model)
    assert trunk.apart
    tokens = mx.array([[5, 9, 70, 2, 33, 11, 8], [60, 1, 4, 95, 7, 7, 20]])
    whole = np.array(model(tokens)).reshape(-1, VOCABULARY)
    picked = mx.array([13, 2, 8, 2])
    hidden = trunk.run(tokens)
    head = trunk.head(hidden.reshape(-1, hidden.shape[-1])[picked])
    np.testing.assert_allclose(head, whole[np.array(picked)], rtol=1e-4, atol=1e-4)
    assert [(path, id(module)) for path, module in model.named_modules()] == before


def test_an_adapter_put_on_later_is_part_of_both() -> None:
    model = network("llama")
    trunk = take_apart(model)
    assert trunk.apart
    for wrapper in attach(model, Adapter(rank=2, targets=["embed_tokens", "q_proj"])).values():
        wrapper.lora_b = mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(1))
    tokens = mx.array([[5, 9, 70]])
    np.testing.assert_allclose(trunk.head(trunk.run(tokens)[0]), model(tokens)[0], rtol=1e-4, atol=1e-4)


class Ending(nn.Module):
    """A trunk with an ending that is more than a function of one hidden state."""

    def __init__(self, ending: str):
        super().__init__()
        self.model = network("llama").model
        self.ending = ending

    def __call__(self, tokens: mx.array, cache: object = None) -> mx.array:
        hidden = self.model(tokens, cache=cache)
        if self.ending == "looks back":
            hidden = hidden + mx.pad(hidden, [(0, 0), (1, 0), (0, 0)])[:, :-1]
        logits = self.model.embed_tokens.as_linear(hidden)
        return logits + tokens[..., None] if self.ending == "sees the tokens" else logits


@pytest.mark.parametrize(("ending", "apart"), [("head alone", True), ("looks back", False), ("sees the tokens", False)])
def test_a_trunk_followed_by_more_than_a_head_isnt_taken_apart(ending: str, apart: bool) -> None:
    assert take_apart(Ending(ending)).apart == apart


def test_layers_come_in_order_and_a_model_without_any_is_refused() -> None:
    model = network("llama")
    assert layers_of(model) == list(model.model.layers)
    with pytest.raises(ModelError, match="Linear has no layers"):
        layers_of(nn.Linear(2, 2))
