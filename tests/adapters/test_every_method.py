"""Every method over every base it serves: its start, its parameters, its way to disk and back, and off again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora import methods
from mlx_lora.adapters.attach import Wrappers, attach, attached, detach, put
from mlx_lora.adapters.base import EXPERTS, layer_shape
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError
from mlx_lora.quant.quantize import quantize
from mlx_lora.store.adapter import Manifest, read, save, wrappers_for
from tests.adapters.zoo import network

RANK, WIDTH, VIRTUAL = 4, 8, 3
TOKENS = mx.array([[5, 17, 3, 80, 41, 2, 9], [1, 1, 60, 7, 22, 90, 13]])
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"method": "lora", "rslora": True},
    "pissa": {"method": "lora", "init": "pissa"},
    "olora": {"method": "lora", "init": "olora"},
    "prefix": {"virtual_tokens": VIRTUAL},
    "prompt": {"virtual_tokens": VIRTUAL},
    "lora+prefix": {"virtual_tokens": VIRTUAL},
    "lora+prompt": {"virtual_tokens": VIRTUAL},
    "bottleneck": {"bottleneck": WIDTH},
}
NAMES = sorted({*methods.METHODS, *methods.COMBINATIONS, *SETTINGS})
MODELS = ["llama", "qwen3", "gemma3", "qwen3 experts"]
BASES = ["float16", "4 bits"]
# MLX's CPU backend multiplies by experts in float32 alone.
BASES_OF = {"llama": ["float32", *BASES], "qwen3 experts": ["float32", "4 bits"]}
# What trained keys, values or embeddings add is there from the start; the paper starts them at random.
ELSEWHERE = {"prefix", "prompt", "lora+prefix", "lora+prompt"}
CASES = [
    (name, model, base)
    for name in NAMES
    for model in MODELS
    for base in BASES_OF.get(model, BASES)
    if not (name == "full" and base == "4 bits")
]


def base_model(model: str, base: str) -> nn.Module:
    made = network(model, dtype=mx.float16 if base == "float16" else mx.float32)
    if base == "4 bits":
        quantize(made, {"mode": "affine", "bits": 4, "group_size": 32})
    return made


def settings_of(name: str) -> Adapter:
    given = {"method": name, **SETTINGS.get(name, {})}
    has = {key: value for key, value in {"rank": RANK, "alpha": 8}.items() if of_method(given["method"], key)}
    return Adapter(**given, **has)


def of_method(method: str, setting: str) -> bool:
    return not set(methods.SETTINGS[setting]).isdisjoint(methods.parts(method))


def noisy(wrappers: Wrappers) -> None:
    """Every array a little off, as after some training."""
    for number, wrapper in enumerate(wrappers.values()):
        for key, array in sorted(wrapper.adapter_arrays().items()):
            draw = mx.random.normal(array.shape, key=mx.random.key(1000 * number + sum(map(ord, key))))
            wrapper[key] = array + 0.05 * draw


def linear_parameters(shape: tuple[int, ...]) -> int:
    """r · (in + out), for every expert."""
    *experts, outputs, inputs = shape
    return int(np.prod(experts)) * RANK * (outputs + inputs)


FORMULAS: dict[str, Callable[[tuple[int, ...]], int]] = {
    "lora": linear_parameters,
    "rslora": linear_parameters,
    "pissa": linear_parameters,
    "olora": linear_parameters,
    "dora": lambda shape: linear_parameters(shape) + int(np.prod(shape[:-1])),
    "qalora": lambda shape: int(np.prod(shape[:-2])) * RANK * (shape[-2] + shape[-1] // 32),
    "vera": lambda shape: int(np.prod(shape[:-2])) * (RANK + shape[-2]),
    "adalora": lambda shape: linear_parameters(shape) + int(np.prod(shape[:-2])) * RANK,
    "bitfit": lambda shape: int(np.prod(shape[:-1])),
}


@pytest.mark.parametrize(("name", "model", "base"), CASES)
def test_start_gradients_disk_and_back(name: str, model: str, base: str, tmp_path: Path) -> None:
    network = base_model(model, base)
    before = dict(tree_flatten(network.parameters()))
    bare = np.array(network(TOKENS).astype(mx.float32))
    wrappers = attach(network, settings_of(name))

    if name not in ELSEWHERE:
        np.testing.assert_array_equal(np.array(network(TOKENS).astype(mx.float32)), bare)
    trainable = {id(array) for _, array in tree_flatten(network.trainable_parameters())}
    assert trainable == {id(array) for wrapper in wrappers.values() for array in wrapper.adapter_arrays().values()}

    noisy(wrappers)
    inputs = mx.concatenate([mx.array([[-1, -2], [-2, -3]]), TOKENS], axis=1) if "prompt" in name else TOKENS
    learned = np.array(network(inputs).astype(mx.float32))
    assert not np.allclose(learned[:, -TOKENS.shape[1] :], bare, atol=1e-3), "the adapter changes nothing"
    _, gradients = nn.value_and_grad(network, lambda: network(inputs).astype(mx.float32).square().mean())()
    flat = tree_flatten(gradients)
    assert len(flat) == len(trainable) and all(array.dtype == mx.float32 for _, array in flat)
    assert sum(bool(array.any().item()) for _, array in flat) >= 0.6 * len(flat)  # an expert may see no token

    manifest = Manifest(
        method=settings_of(name).method, adapter=settings_of(name).model_dump(), modules=list(wrappers),
        scales={path: wrapper.scale for path, wrapper in wrappers.items()},
    )  # fmt: skip
    stored = {
        f"{path}.{key}": array.astype(mx.float32 if key in wrapper.PRECISE else mx.bfloat16)
        for path, wrapper in wrappers.items()
        for key, array in wrapper.stored_arrays().items()
    }
    again = wrappers_for(network, read(save(tmp_path / "adapter", wrappers, manifest, layers=2)))
    assert list(again) == sorted(wrappers)
    for path, wrapper in again.items():
        for key, array in wrapper.adapter_arrays().items():
            np.testing.assert_array_equal(array, stored[f"{path}.{key}"].astype(mx.float32), err_msg=f"{path}.{key}")
    for wrapper in wrappers.values():
        for key in wrapper.adapter_params():
            wrapper[key] = wrapper[key].astype(mx.float32 if key in wrapper.PRECISE else mx.bfloat16).astype(mx.float32)
    rounded = np.array(network(inputs).astype(mx.float32))
    put(network, again)
    assert attached(network).keys() == again.keys()
    reloaded = np.array(network(inputs).astype(mx.float32))
    if name not in ("pissa", "olora"):
        np.testing.assert_array_equal(reloaded, rounded)
    elif "experts" not in model:  # other arrays are rounded than those that train, and a router may choose otherwise
        np.testing.assert_allclose(reloaded, learned, rtol=0, atol=0.03 * np.abs(learned).max())

    detach(network)
    assert {key: id(array) for key, array in tree_flatten(network.parameters())} == {
        key: id(array) for key, array in before.items()
    }
    np.testing.assert_array_equal(np.array(network(TOKENS).astype(mx.float32)), bare)


@pytest.mark.parametrize(("name", "model"), [(name, model) for name in FORMULAS for model in MODELS])
def test_as_many_parameters_as_the_formula_says(name: str, model: str) -> None:
    wrappers = attach(base_model(model, "4 bits"), settings_of(name))
    counted = sum(array.size for wrapper in wrappers.values() for array in wrapper.adapter_arrays().values())
    assert counted == sum(FORMULAS[name](layer_shape(wrapper.base)) for wrapper in wrappers.values())


@pytest.mark.parametrize("base", BASES)
def test_experts_are_served_where_the_method_says_so(base: str) -> None:
    network = base_model("qwen3 experts", base)
    for name in ("lora", "dora", "adalora", "ia3", "bitfit"):
        wrappers = attach(network, settings_of(name).model_copy(update={"targets": ["down_proj"]}))
        assert all(isinstance(wrapper.base, EXPERTS) for wrapper in wrappers.values())


@pytest.mark.parametrize(
    ("settings", "quantization", "message"),
    [
        ({"method": "full"}, {"mode": "affine", "bits": 4, "group_size": 32}, "lora"),
        ({"method": "qalora"}, {"mode": "mxfp4", "bits": 4, "group_size": 32}, "affine"),
        ({"method": "lora", "init": "loftq"}, None, "quantize"),
        ({"method": "dora", "rank": 65}, None, "above the smaller dimension"),
    ],
)
def test_a_base_that_a_method_cannot_serve_is_an_error_that_names_what_works(
    settings: dict[str, Any], quantization: dict[str, Any] | None, message: str
) -> None:
    model = network("llama")
    if quantization:
        quantize(model, quantization)
    with pytest.raises(AdapterError) as caught:
        attach(model, Adapter(**settings))
    assert message in f"{caught.value} {caught.value.hint or ''}"
    assert not attached(model)
