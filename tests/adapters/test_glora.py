"""GLoRA's own promises: every choice of A to E is equation 6, and the product with W₀ ⊙ A keeps no dense weight."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_lora.adapters import glora
from mlx_lora.adapters.glora import GLoRA, multiply_hadamard
from mlx_lora.config import Adapter
from mlx_lora.models import SwitchLinear
from mlx_lora.quant.matmul import DequantizingLinear, like
from mlx_lora.quant.quantize import dequantize_layer, packed_layer

OUT, IN, RANK = 24, 64, 3
MATRIX, COLUMN, VECTOR = ("lora", "vector", "scalar", "none"), ("lora", "vector", "none"), ("vector", "scalar", "none")
EVERY = [choice for choice in product(MATRIX, MATRIX, COLUMN, VECTOR, VECTOR) if set(choice) != {"none"}]
X = mx.random.normal((2, 5, IN), key=mx.random.key(7))


def linear(*, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(IN, OUT, bias=bias)
    layer.weight = mx.random.normal((OUT, IN), scale=IN**-0.5, key=mx.random.key(1))
    if bias:
        layer.bias = mx.random.normal((OUT,), key=mx.random.key(2))
    return layer


def packed(mode: str = "affine", bits: int = 4, group_size: int = 32, *, bias: bool = True, **more: bool) -> nn.Module:
    return packed_layer(linear(bias=bias), {"mode": mode, "bits": bits, "group_size": group_size, **more})


BASES: dict[str, Callable[[], nn.Module]] = {
    "plain": linear,
    "4 bits without bias": lambda: packed(bias=False),
    "4 bits, CPU": lambda: like(packed(), DequantizingLinear),
}


def wrapped(layer: nn.Module, choice: tuple[str, ...], *, trained: bool = True) -> GLoRA:
    config = Adapter(method="glora", rank=RANK, glora=dict(zip("abcde", choice, strict=True)))
    wrapper = GLoRA.from_base(layer, config, path="layer", key=mx.random.key(3))
    if trained:
        for index, (name, array) in enumerate(wrapper.adapter_arrays().items()):
            wrapper[name] = 0.3 * mx.random.normal(array.shape, key=mx.random.key(10 + index))
    return wrapper


def equation(wrapper: GLoRA) -> tuple[np.ndarray, np.ndarray]:
    """W and b of equation 6, in float64."""
    own = {name: np.array(array, np.float64) for name, array in wrapper.adapter_arrays().items()}
    weight = np.array(dequantize_layer(wrapper.base, mx.float32), np.float64)
    bias = np.array(wrapper.base.get("bias", mx.zeros((OUT,))).astype(mx.float32), np.float64)

    def matrix(letter: str) -> np.ndarray:
        if f"glora_{letter}_down" in own:
            return (own[f"glora_{letter}_down"] @ own[f"glora_{letter}_up"]).T
        return own.get(f"glora_{letter}", np.zeros(1))[:, None]

    c = own["glora_c_down"] @ own["glora_c_up"] if "glora_c_down" in own else own.get("glora_c", np.zeros(IN))
    d, e = (own.get(f"glora_{letter}", np.zeros(1)) for letter in "de")
    return weight + weight * matrix("a") + matrix("b"), bias + bias * d + e + weight @ c


def close(found: mx.array, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("base", BASES)
def test_every_choice_is_equation_six_and_begins_as_the_base(base: str) -> None:
    """Unmerged, fused to a plain layer, and fused into the packed one where A and B allow."""
    layer = BASES[base]()
    bare, x = np.array(layer(X)), np.array(X, np.float64)
    for choice in EVERY:
        if not (new := wrapped(layer, choice, trained=False)).adapter_params():
            assert (
                GLoRA.refusal(layer, Adapter(method="glora", glora=dict(zip("abcde", choice, strict=True))), "q")
                is not None
            )
            continue
        np.testing.assert_array_equal(new(X), bare, err_msg=f"{choice} begins elsewhere")
        wrapper = wrapped(layer, choice)
        weight, bias = equation(wrapper)
        close(wrapper(X), x @ weight.T + bias)
        close(wrapper.fuse()(X), x @ weight.T + bias)
        merged = wrapper.fuse_packed()
        assert (merged is not None) == ("4 bits" in base and "lora" not in choice[:2]), choice
        if merged is not None:
            assert merged["weight"] is layer["weight"]
            close(merged(X), x @ weight.T + bias)
    np.testing.assert_array_equal(layer(X), bare, err_msg="the base has changed")


def test_the_shapes_are_those_of_the_choices() -> None:
    def shapes(layer: nn.Module, *choice: str) -> dict[str, tuple[int, ...]]:
        arrays = wrapped(layer, choice).adapter_arrays()
        return {name.removeprefix("glora_"): array.shape for name, array in arrays.items()}

    assert shapes(linear(), "lora", "lora", "lora", "vector", "vector") == {
        "a_down": (IN, RANK), "a_up": (RANK, OUT), "b_down": (IN, RANK), "b_up": (RANK, OUT),
        "c_down": (IN, RANK), "c_up": (RANK,), "d": (OUT,), "e": (OUT,),
    }  # fmt: skip
    assert shapes(linear(), "vector", "scalar", "vector", "scalar", "scalar") == {
        "a": (OUT,), "b": (1,), "c": (IN,), "d": (1,), "e": (1,),
    }  # fmt: skip
    assert shapes(linear(bias=False), "scalar", "none", "none", "vector", "vector") == {"a": (1,), "e": (OUT,)}


def test_what_is_stored_precisely_is_what_is_no_low_rank_factor() -> None:
    arrays = wrapped(linear(), ("lora", "vector", "vector", "scalar", "vector")).adapter_params()
    assert set(arrays) - GLoRA.PRECISE == {"glora_a_down", "glora_a_up"}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_bases_merge_in_half_precision(dtype: mx.Dtype) -> None:
    layer = packed()
    layer.set_dtype(dtype)
    wrapper = wrapped(layer, ("vector", "vector", "vector", "vector", "vector"))
    merged = wrapper.fuse_packed()
    assert merged is not None and wrapper(X.astype(dtype)).dtype == merged(X.astype(dtype)).dtype == dtype
    weight, bias = equation(wrapper)
    expected = np.array(X, np.float64) @ weight.T + bias
    difference = np.array(merged(X.astype(dtype)).astype(mx.float32)) - expected
    assert np.linalg.norm(difference) / np.linalg.norm(expected) < (1e-2 if dtype == mx.float16 else 5e-2)


@pytest.mark.parametrize(
    "layer",
    [linear(), packed(), packed(bits=3), packed("mxfp4"), packed("nf4", group_size=64),
     packed("nf4", group_size=64, double_quant=True)],
    ids=["plain", "4 bits", "3 bits", "mxfp4", "nf4", "nf4 double"],
)  # fmt: skip
def test_the_product_and_its_gradients_equal_the_plain_formula(
    layer: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By blocks of ten rows, the last of them smaller."""
    monkeypatch.setattr(glora, "BLOCK_BYTES", 4 * IN * 10)
    weight = dequantize_layer(layer, mx.float32)
    down, up = (mx.random.normal(shape, key=mx.random.key(8)) for shape in ((IN, RANK), (RANK, OUT)))
    cotangent = mx.random.normal((2, 5, OUT), key=mx.random.key(9))

    def of(multiply: Callable[..., mx.array]) -> list[mx.array]:
        def values(x: mx.array, down: mx.array, up: mx.array) -> list[mx.array]:
            outputs, gradients = mx.vjp(multiply, [x, down, up], [cotangent])
            return [*outputs, *gradients]

        return values(X, down, up)

    found = of(lambda x, down, up: multiply_hadamard(x, layer, down, up))
    expected = of(lambda x, down, up: x @ (weight * (down @ up).T).T)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_no_dense_copy_lives_until_the_backward_pass(compiled: bool) -> None:
    depth, width = 64, 256  # MLX's CPU backend runs some operations ahead, so a few layers' copies are alive
    wrappers = []
    for index in range(depth):
        plain = nn.Linear(width, width, bias=False)
        plain.weight = mx.random.normal((width, width), scale=width**-0.5, key=mx.random.key(index))
        layer = like(plain.to_quantized(group_size=64, bits=4), DequantizingLinear)
        wrappers.append(wrapped(layer, ("lora", "none", "none", "none", "none")))
    factors = [wrapper.adapter_arrays() for wrapper in wrappers]

    def loss(x: mx.array, factors: list[dict[str, mx.array]]) -> mx.array:
        for wrapper, own in zip(wrappers, factors, strict=True):
            wrapper.update(own)
            x = mx.tanh(wrapper(x))
        return x.square().sum()

    gradient: Callable[..., object] = mx.grad(loss, argnums=(0, 1))
    gradient = mx.compile(gradient) if compiled else gradient
    x = mx.random.normal((4, width), key=mx.random.key(99))
    mx.eval(x, factors, [wrapper.base.parameters() for wrapper in wrappers])
    mx.eval(gradient(x, factors))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradient(x, factors))
    dense = depth * width * width * 4
    assert mx.get_peak_memory() - before < dense / 2


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Embedding(8, 4), "GLoRA is for linear layers, and q is of type Embedding; method lora works"),
        (SwitchLinear(4, 4, 2), "GLoRA is for linear layers, and q is of type SwitchLinear; method lora works"),
        (linear(bias=False), "q has no bias for D to scale; choose adapter.glora.e, which adds one, or a, b or c"),
    ],
    ids=["embedding", "experts", "nothing to train"],
)
def test_what_cannot_be_served_is_refused_with_what_works(layer: nn.Module, message: str) -> None:
    only_d = dict.fromkeys("abce", "none") | {"d": "vector"}
    config = Adapter(method="glora", glora=only_d)
    assert GLoRA.refusal(layer, config, "q") == message
    assert GLoRA.refusal(linear(), config, "q") is None
