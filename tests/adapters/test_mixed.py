"""Rows of different adapters in one forward pass: each row's logits are those of the model with its adapter alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_lora import methods
from mlx_lora.adapters.attach import Wrappers, attached, build, detach, put
from mlx_lora.adapters.mixed import Mixed
from mlx_lora.adapters.stacks import Stack, factors_of, rank_class, reason_alone
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError
from mlx_lora.quant.quantize import quantize
from tests.adapters.zoo import network
from tests.models.tiny import mixed as tiny_mixed
from tests.models.tiny import plain as tiny_plain
from tests.models.tiny.build import build as build_model

TOLERANCE = 2e-5
PACKED = {"mode": "affine", "bits": 4, "group_size": 32}
CONFIGS = {**tiny_plain.CONFIGS, **tiny_mixed.CONFIGS}


def random_adapter(model: nn.Module, seed: int, **settings: Any) -> Wrappers:
    """An adapter whose every array is random and large enough to change all logits."""
    wrappers = build(model, Adapter(**settings), seed=seed)
    for index, wrapper in enumerate(wrappers.values()):
        for number, name in enumerate(wrapper.adapter_params()):
            key = mx.random.key(10_000 * seed + 10 * index + number)
            wrapper[name] = 0.3 * mx.random.normal(wrapper[name].shape, key=key)
    return wrappers


def tokens(rows: int, length: int) -> mx.array:
    return mx.random.randint(1, 90, (rows, length), key=mx.random.key(rows * length))


def logits(model: nn.Module, inputs: mx.array) -> mx.array:
    return model(inputs, cache=make_prompt_cache(model))


def alone(model: nn.Module, adapters: dict[str, Wrappers], rows: list[str | None], inputs: mx.array) -> mx.array:
    """Logits of each row by itself, with its adapter put on the model."""
    found = []
    for index, name in enumerate(rows):
        put(model, adapters[name] if name else {})
        found.append(logits(model, inputs[index : index + 1]))
    detach(model)
    return mx.concatenate(found)


def assert_rows_alone(model: nn.Module, adapters: dict[str, Wrappers], rows: list[str | None], length: int) -> None:
    inputs = tokens(len(rows), length)
    expected = alone(model, adapters, rows, inputs)
    held = Mixed(model)
    for name, wrappers in adapters.items():
        held.add(name, wrappers)
    held.install()
    with held.rows(rows, length):
        found = logits(model, inputs)
        mx.eval(found)
    away = mx.abs(found - expected).max().item()
    assert away <= TOLERANCE * mx.abs(expected).max().item(), away
    detach(model)
    assert not attached(model)


BASES = {
    "linears and a tied head": ("llama", {}, None),
    "packed linears": ("llama untied", {}, PACKED),
    "nf4": ("llama", {}, {"mode": "nf4", "bits": 4, "group_size": 32}),
    "experts": ("qwen3 experts", {}, None),
    "packed experts": ("qwen3 experts", {}, PACKED),
    "fused projections": ("phi3 fused qkv", {}, None),
}


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("base", BASES)
def test_each_row_is_what_its_adapter_gives_alone(base: str, length: int) -> None:
    """Ranks of three classes, a row of the base, an adapter on few modules; nine tokens a row sort the experts."""
    name, _, packing = BASES[base]
    model = network(name)
    if packing:
        quantize(model, packing)
        model.freeze()
    adapters = {
        "small": random_adapter(model, 1, rank=3, targets="all-linear"),
        "large": random_adapter(model, 2, rank=16, targets="all-linear", alpha=8),
        "few": random_adapter(
            model, 3, rank=4, targets=["embed_tokens", "q_proj" if "fused" not in base else "o_proj"]
        ),
    }
    rows = ["large", None, "small", "few", "small"]
    assert_rows_alone(model, adapters, rows, length)
    assert_rows_alone(model, adapters, rows[::-1], length)
    assert_rows_alone(model, adapters, ["few"] * 3, length)


QUICK = ("deepseek_v3", "qwen3_next", "gpt_oss", "mamba2")
# What enters their experts, or a part of their attention, is no row of the batch.
MIXES_ROWS = ("dbrx", "deepseek_v41")
# mlx_lm's own answer to several rows is NaN.
NOT_IN_BATCHES = ("phi3small",)


@pytest.mark.parametrize("family", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.real)
    for name in sorted(CONFIGS) if name not in MIXES_ROWS + NOT_IN_BATCHES
])  # fmt: skip
def test_every_architecture_takes_rows_of_different_adapters(family: str) -> None:
    model = build_model(family, CONFIGS[family])
    adapters = {
        name: random_adapter(model, seed, rank=4, alpha=1, targets="all-linear") for seed, name in enumerate("ab", 1)
    }
    for length in (1, 17):
        assert_rows_alone(model, adapters, ["b", None, "a", "b"], length)


@pytest.mark.parametrize("family", MIXES_ROWS)
def test_a_model_that_mixes_its_rows_raises(family: str) -> None:
    model = build_model(family, CONFIGS[family])
    held = Mixed(model)
    held.add("a", random_adapter(model, 1, rank=4, targets="all-linear"))
    held.install()
    with held.rows(["a", None, "a"], 17), pytest.raises(AdapterError, match="this model mixes its rows"):
        logits(model, tokens(3, 17))


JOINS = {
    "lora": {"rslora": True},
    "adalora": {},
    "qalora": {},
    "vera": {"targets": ["q_proj", "v_proj"]},
}


@pytest.mark.parametrize("method", JOINS)
def test_methods_whose_update_is_a_sum_of_factors_join(method: str) -> None:
    model = network("qwen3 experts")
    quantize(model, PACKED)
    model.freeze()
    settings: dict[str, Any] = {"rank": 4, "targets": "all-linear", **JOINS[method]}
    adapters = {"it": random_adapter(model, 1, method=method, **settings), "lora": random_adapter(model, 2, rank=2)}
    assert reason_alone(adapters["it"]) is None
    assert_rows_alone(model, adapters, ["it", "lora", None, "it"], 5)
    assert_rows_alone(model, adapters, ["it", "it"], 1)


@pytest.mark.parametrize("method", sorted(set(methods.METHODS) - set(JOINS)))
def test_other_methods_are_refused_by_name(method: str) -> None:
    model = network("llama")
    wrappers = build(model, Adapter(method=method))
    held = Mixed(model)
    with pytest.raises(AdapterError, match=r"can't share a forward pass: \w+ \(model|is a Attention|is a TransformerB"):
        held.add("it", wrappers)
    assert not held.keys and not held.nbytes


def test_qalora_that_rounds_its_zero_points_is_left_to_itself() -> None:
    model = network("llama", dtype=mx.float16)
    quantize(model, PACKED)
    assert "rounds its zero-points" in str(reason_alone(build(model, Adapter(method="qalora"))))
    assert reason_alone(build(model, Adapter(method="qalora", zero_points="float32"))) is None


def test_vera_of_a_large_rank_is_left_to_itself() -> None:
    model = network("llama")
    assert reason_alone(build(model, Adapter(method="vera", rank=64))) is None
    assert "rank 65" in str(reason_alone(build(model, Adapter(method="vera", rank=65))))


def test_a_pass_without_published_rows_raises_and_so_does_one_of_other_rows() -> None:
    model = network("llama")
    held = Mixed(model)
    held.add("a", random_adapter(model, 1, rank=4))
    held.install()
    inputs = tokens(3, 4)
    with pytest.raises(AdapterError, match="without published rows"):
        logits(model, inputs)
    with held.rows(["a", None], 4), pytest.raises(AdapterError, match="3 rows enter for 2 published"):
        logits(model, inputs)
    with pytest.raises(AdapterError, match="without published rows"):  # also after a pass
        logits(model, inputs)
    with pytest.raises(AdapterError, match="no adapter 'b' is held"), held.rows(["b"], 4):
        pass


def test_rows_of_the_base_are_bit_for_bit_the_base() -> None:
    model = network("qwen3 experts")
    inputs = tokens(4, 9)
    plain = logits(model, inputs)
    held = Mixed(model)
    held.add("a", random_adapter(model, 1, rank=4, targets="all-linear"))
    held.install()
    with held.rows([None, "a", None, "a"], 9):
        found = logits(model, inputs)
    assert mx.array_equal(found[::2], plain[::2]) and not mx.allclose(found[1], plain[1])
    with held.rows([None] * 4, 9):
        assert mx.array_equal(logits(model, inputs), plain)


def test_one_adapter_for_all_rows_is_multiplied_once_and_others_cost_only_their_rows() -> None:
    model = network("llama")
    held = Mixed(model)
    for seed, (name, rank) in enumerate({"a": 4, "b": 4, "c": 16}.items()):
        held.add(name, random_adapter(model, seed, rank=rank))
    stacks = next(iter(held.wrappers.values())).stacks
    (only,) = [share for stack in stacks.values() if (share := held.share(stack, ["b"] * 5))]
    assert only.single and only.slots.tolist() == [2] and only.rows is None
    small, large = (held.share(stacks[rank], ["c", "a", None, "b"]) for rank in (4, 16))
    assert small.rows.tolist() == [1, 3] and small.slots.tolist() == [1, 2] and not small.single
    assert large.rows.tolist() == [0] and large.slots.tolist() == [1]


def test_slots_double_are_used_again_and_shrink() -> None:
    model = network("llama")
    wrappers = {seed: random_adapter(model, seed, rank=4, targets=["q_proj"]) for seed in range(9)}
    held = Mixed(model)
    sizes = []
    for seed, adapter in wrappers.items():
        before, growth = held.nbytes, held.growth(adapter)
        held.add(seed, adapter)
        assert held.nbytes - before == growth
        sizes.append(next(iter(held.wrappers.values())).stacks[4].capacity)
    assert sizes == [2, 4, 4, 8, 8, 8, 8, 16, 16]
    stack = next(iter(held.wrappers.values())).stacks[4]
    held.remove(4)
    held.add("new", wrappers[4])
    assert stack.capacity == 16 and stack.slots["new"] == 5
    for seed in (0, 1, 2, 3, 5, 6, 7):
        held.remove(seed)
    assert stack.capacity == 4 and set(stack.slots) == {8, "new"}
    rows = ["new", 8, None]
    inputs = tokens(3, 5)
    expected = alone(model, {"new": wrappers[4], 8: wrappers[8]}, rows, inputs)  # type: ignore[dict-item, arg-type]
    held.install()
    with held.rows(rows, 5):
        assert mx.allclose(logits(model, inputs), expected, atol=1e-4)
    held.remove(8)
    held.remove("new")
    assert not held.nbytes and not held.keys


def test_an_adapter_that_can_t_be_added_whole_is_not_there_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("llama")
    held = Mixed(model)
    held.add("a", random_adapter(model, 1, rank=4))
    before, calls = held.nbytes, []
    put_one = Stack.put

    def fails_at_the_third(stack: Stack, *arguments: Any) -> None:
        calls.append(stack)
        if len(calls) == 3:
            raise RuntimeError("no memory")
        put_one(stack, *arguments)

    monkeypatch.setattr(Stack, "put", fails_at_the_third)
    with pytest.raises(RuntimeError):
        held.add("b", random_adapter(model, 2, rank=16))
    monkeypatch.undo()
    assert held.keys == {"a"} and held.nbytes == before
    held.add("b", random_adapter(model, 2, rank=16))


def test_padding_the_rank_changes_nothing() -> None:
    model = network("llama")
    (wrapper,) = random_adapter(model, 1, rank=5, targets=["q_proj"], layers=1).values()
    factors = factors_of(wrapper)
    stack = Stack(factors)
    stack.put("it", factors)
    assert stack.rank == rank_class(5) == 8
    a, b = (array[stack.slots["it"]] for array in stack.arrays(mx.float32))
    assert mx.array_equal(a[:, :5], factors.a) and mx.array_equal(b[:5], factors.b)
    assert not a[:, 5:].any().item() and not b[5:].any().item()


def test_stacks_keep_the_dtype_of_the_activations() -> None:
    """MLX's CPU backend multiplies gathered matrices in float32 alone, so no forward pass here."""
    factors = factors_of(next(iter(random_adapter(network("llama"), 1, rank=4).values())))
    stack = Stack(factors)
    stack.put("a", factors)
    full = stack.nbytes
    a, b = stack.arrays(mx.float16)
    assert a.dtype == b.dtype == mx.float16 and stack.nbytes == full // 2
    assert stack.arrays(mx.float16)[0] is a
    stack.put("b", factors)
    assert stack.arrays(mx.float16)[0].dtype == mx.float16
    assert mx.array_equal(stack.arrays(mx.float16)[0][stack.slots["b"]], factors.a.astype(mx.float16))
