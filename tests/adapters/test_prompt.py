"""Prompt tuning: ids below 0 are embedded by trained rows, and every part of training takes them for tokens."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach, build
from mlx_lora.adapters.prompt import Prompt
from mlx_lora.config import Adapter, Data
from mlx_lora.data.batch import collate
from mlx_lora.data.prepare import prepare
from mlx_lora.data.rows import Row
from mlx_lora.data.virtual import Virtual, virtual_of
from mlx_lora.errors import AdapterError, CannotFuse, DataError
from mlx_lora.models import shapes
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.train.objectives.likelihood import Loss, as_arrays
from tests.adapters import zoo
from tests.train.test_trainer import make_rows

COUNT = 4
IDS = [-1, -2, -3, -4]
REAL = [5, 12, 7, 30, 2]


def prompted(name: str = "llama") -> tuple[nn.Module, Prompt]:
    """A model with a prompt adapter, and that adapter."""
    model = zoo.network(name)
    (wrapper,) = attach(model, Adapter(method="prompt", virtual_tokens=COUNT)).values()
    assert isinstance(wrapper, Prompt)
    wrapper.soft = mx.random.normal(wrapper.soft.shape, key=mx.random.key(1))
    return model, wrapper


@pytest.mark.parametrize("name", ["llama", "llama untied", "qwen3", "gemma3"])
@pytest.mark.parametrize("place", [0, 3, 5])
def test_virtual_tokens_equal_embeddings_put_between_the_others(name: str, place: int) -> None:
    model, wrapper = prompted(name)
    embeddings = wrapper.base(mx.array([REAL]))
    between = mx.concatenate([embeddings[:, :place], wrapper.soft[None], embeddings[:, place:]], axis=1)
    expected = model(mx.zeros((1, 9), mx.int32), input_embeddings=between)
    for kind in (mx.int32, mx.int64):
        output = model(mx.array([REAL[:place] + IDS + REAL[place:]], kind))
        assert output.shape == (1, 9, zoo.VOCABULARY) and mx.array_equal(output, expected)
    bare = zoo.network(name)(mx.array([REAL]))
    assert mx.array_equal(
        model(mx.array([REAL], mx.uint32)), bare
    )  # as generation feeds them: without, nothing changes


def test_it_starts_as_embeddings_of_the_base_whether_packed_or_not() -> None:
    for base in (nn.Embedding(6000, 64), nn.QuantizedEmbedding(6000, 64, group_size=32)):
        wrapper = Prompt.from_base(base, Adapter(method="prompt", virtual_tokens=9), path="e", key=mx.random.key(2))
        table = base(mx.arange(5000))
        distances = mx.abs(wrapper.soft[:, None] - table).max(axis=-1).min(axis=-1)
        assert wrapper.soft.dtype == mx.float32 and distances.max() == 0
        half = nn.Embedding(8, 64)
        half.set_dtype(mx.bfloat16)
        assert (
            Prompt.from_base(half, Adapter(method="prompt"), path="e", key=mx.random.key(2))(mx.array([-1, 3])).dtype
            == mx.bfloat16
        )


@pytest.mark.parametrize("position", ["prefix", "infix"])
def test_gradients_are_those_of_the_embeddings_and_there_are_no_others(position: str) -> None:
    model, wrapper = prompted()
    rows = [Virtual(COUNT, position).row(row) for row in make_rows(5)]
    loss = Loss(take_apart(model))
    value, gradients = nn.value_and_grad(model, loss.differentiable)(as_arrays(collate(rows)))
    assert [name for name, _ in tree_flatten(gradients)] == ["model.embed_tokens.soft"]
    soft, expected, total = wrapper.soft, mx.zeros(wrapper.soft.shape), 0.0

    def alone(soft: mx.array, row: Row) -> mx.array:
        start = int(np.flatnonzero(row.tokens == -1)[0])
        before, after = row.tokens[:start], row.tokens[start + COUNT : -1]
        embedded = [wrapper.base(mx.array(before)), soft, wrapper.base(mx.array(after))]
        logits = model(mx.zeros((1, 1), mx.int32), input_embeddings=mx.concatenate(embedded)[None])[0]
        targets = mx.array(np.maximum(row.tokens[1:], 0))
        return (nn.losses.cross_entropy(logits, targets) * mx.array(row.weights[1:])).sum()

    for row in rows:
        part, gradient = mx.value_and_grad(alone)(soft, row)
        expected, total = expected + gradient, total + part.item()
    assert value.item() == pytest.approx(total, rel=1e-5)
    assert mx.allclose(gradients["model"]["embed_tokens"]["soft"], expected, rtol=1e-3, atol=1e-4)
    packed = as_arrays(collate(rows, [[0, 1, 2], [3, 4]], packed=True))
    assert loss(packed).item() == pytest.approx(total, rel=1e-5)


def test_rows_have_them_in_front_or_behind_the_prompt_without_loss() -> None:
    row = Row(np.array([9, 8, 7, 6], np.int32), np.array([0, 0, 1, 0.5], np.float32))
    prefix, infix = (Virtual(2, position).row(row) for position in ("prefix", "infix"))
    assert prefix.tokens.tolist() == [-1, -2, 9, 8, 7, 6] and prefix.weights.tolist() == [0, 0, 0, 0, 1, 0.5]
    assert infix.tokens.tolist() == [9, 8, -1, -2, 7, 6] and infix.weights.tolist() == [0, 0, 0, 0, 1, 0.5]
    assert infix.tokens.dtype == np.int32 and infix.weights.dtype == np.float32
    for virtual, place, expected in (
        (Virtual(2), None, [-1, -2, 9, 8]), (Virtual(2), 1, [-1, -2, 9, 8]),
        (Virtual(2, "infix"), None, [9, 8, -1, -2]), (Virtual(2, "infix"), 1, [9, -1, -2, 8]),
    ):  # fmt: skip
        assert virtual.prompt([9, 8], place) == expected
    assert virtual_of(Adapter()) is None and virtual_of(Adapter(method="prefix")) is None
    assert virtual_of(Adapter(method="lora+prompt", virtual_tokens=3)) == Virtual(3)


def test_read_rows_have_them_on_top_of_the_longest_length(tokenizer, write_rows) -> None:  # type: ignore[no-untyped-def]
    file = write_rows([{"prompt": "what is it", "completion": "that"}] * 4)
    plain = prepare(file, Data(), tokenizer)
    settings = Data(max_seq_length=len(plain.train[0]))
    for position, place in (("prefix", 0), ("infix", int(np.flatnonzero(plain.train[0].weights)[0]))):
        read = prepare(file, settings, tokenizer, virtual=Virtual(COUNT, position))
        for row in (*read.train, *read.valid):
            assert row.tokens.tolist() == np.insert(plain.train[0].tokens, place, IDS).tolist()
            assert row.trained == plain.train[0].trained
    text = write_rows([{"text": "nothing but text"}] * 4, name="text.jsonl")
    assert prepare(text, Data(), tokenizer, virtual=Virtual(COUNT)).train
    for faulty, settings in ((text, Data()), (file, Data(mask="all"))):
        with pytest.raises(DataError, match="adapter.position=prefix"):
            prepare(faulty, settings, tokenizer, virtual=Virtual(COUNT, "infix"))


def test_the_place_is_the_token_embedding_and_nothing_is_merged() -> None:
    config = {**zoo.COMMON, "model_type": "llama", "hidden_size": 8192, "vocab_size": 128256, "num_hidden_layers": 80}
    wrappers = build(shapes.network(config, gpu=True), Adapter(method="prompt", virtual_tokens=64))
    assert {path: wrapper.soft.shape for path, wrapper in wrappers.items()} == {"model.embed_tokens": (64, 8192)}
    with pytest.raises(AdapterError, match="no token embedding"):
        build(nn.Sequential(nn.Linear(4, 4)), Adapter(method="prompt"))
    refused = Prompt.refusal(nn.Linear(4, 4), Adapter(method="prompt"), "lm_head")
    assert refused and "lm_head" in refused and "lora" in refused
    _, wrapper = prompted()
    for merged in (wrapper.delta, wrapper.fuse):
        with pytest.raises(CannotFuse, match="virtual tokens"):
            merged()
