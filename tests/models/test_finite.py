"""Logits that aren't finite: which part is named, and that sampling notices them without changing a token."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_lora.errors import NotFinite
from mlx_lora.models import finite
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.serve.engine import Engine, Sampling

TOKENS = mx.array([[5, 9, 70, 2, 33]])
NAN = mx.array(float("nan"))


class Overflowing(nn.Module):
    """An MLP whose output is infinite from a position on."""

    def __init__(self, mlp: nn.Module, start: int):
        super().__init__()
        self.mlp, self.start, self.seen = mlp, start, 0

    def __call__(self, x: mx.array) -> mx.array:
        places = mx.arange(self.seen, self.seen + x.shape[1])[:, None]
        self.seen += x.shape[1]
        return mx.where(places < self.start, self.mlp(x), mx.inf)


def test_damaged_weights_are_named(tiny: LoadedModel) -> None:
    tiny.model.model.layers[1].mlp.up_proj.weight[3, 4] = NAN
    assert "model.layers.1.mlp.up_proj.weight holds NaN" in finite.error(tiny.model, TOKENS).message


def test_the_first_layer_that_overflows_is_named(tiny: LoadedModel) -> None:
    layer = tiny.model.model.layers[1]
    layer.mlp = Overflowing(layer.mlp, 2)
    found = finite.error(tiny.model, TOKENS)
    assert "layer 1 (TransformerBlock) is the first whose output isn't" in found.message
    assert "rope_theta" in str(found.hint)


def test_a_trunk_says_whether_its_logits_are_finite(tiny: LoadedModel) -> None:
    assert take_apart(tiny.model).finite
    tiny.model.model.norm.weight[0] = NAN
    assert not take_apart(tiny.model).finite


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.8, top_p=0.9, seed=3)], ids=["greedy", "sampled"])
def test_an_answer_ends_where_a_logit_is_not_finite(tiny: LoadedModel, sampling: Sampling | None) -> None:
    prompt = TOKENS[0].tolist()
    engine = Engine(tiny)
    whole = list(engine.stream(prompt, max_tokens=8, sampling=sampling))
    layer = tiny.model.model.layers[2]
    layer.mlp = Overflowing(layer.mlp, len(prompt) + 3)
    engine.forget()
    told = []
    with pytest.raises(NotFinite, match="layer 2"):
        for token in engine.stream(prompt, max_tokens=8, sampling=sampling):
            told.append(token)
    assert told == whole[:4]
    assert engine.cache.layers is None


def test_a_batch_ends_where_a_logit_is_not_finite(tiny: LoadedModel) -> None:
    tiny.model.model.layers[0].input_layernorm.weight[0] = NAN
    with pytest.raises(NotFinite, match="model.layers.0.input_layernorm.weight holds NaN"):
        list(Engine(tiny).batch([[1, 2, 3], [4, 5]], max_tokens=4))


def test_the_mark_changes_no_token_and_minus_infinity_is_a_probability() -> None:
    rows = mx.random.normal((3, 50), key=mx.random.key(1))
    rows[0, 7] = -mx.inf
    greedy = finite.marking(lambda x: mx.argmax(x, axis=-1))
    good = rows - mx.logsumexp(rows, axis=-1, keepdims=True)
    assert greedy(good).tolist() == mx.argmax(good, axis=-1).tolist()
    assert finite.all_finite(rows)
    for bad in (NAN, mx.array(mx.inf)):
        rows[1, 7] = bad
        assert greedy(rows - mx.logsumexp(rows, axis=-1, keepdims=True)).tolist()[1] == finite.NOT_FINITE
        assert not finite.all_finite(rows)


def test_factors_that_are_not_finite_say_which_where_the_model_is_sound(tiny: LoadedModel) -> None:
    with pytest.raises(NotFinite, match="made of x aren't finite"), finite.explaining(tiny.model):
        raise FloatingPointError("the factors made of x aren't finite")
