"""The contract of a weight method, for every method and every kind of layer it can wrap."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.base import EXPERTS as EXPERT_LAYERS
from mlx_lora.adapters.base import AdapterLayer, layer_shape
from mlx_lora.config import Adapter
from mlx_lora.methods import LOW_RANK, METHODS, SETTINGS, resolve
from mlx_lora.models import SwitchLinear
from mlx_lora.models.trunk.dropout import Dropout
from mlx_lora.quant.matmul import DequantizingEmbedding, DequantizingLinear, like
from mlx_lora.quant.quantize import dequantize_layer, packed_layer

OUT, IN, VOCABULARY, EXPERTS, RANK = 32, 64, 48, 4, 3
Layer = Callable[[], nn.Module]


def linear(bias: bool = True) -> nn.Module:
    layer = nn.Linear(IN, OUT, bias=bias)
    layer.weight = mx.random.normal((OUT, IN), key=mx.random.key(1))
    return layer


def embedding() -> nn.Module:
    layer = nn.Embedding(VOCABULARY, IN)
    layer.weight = mx.random.normal((VOCABULARY, IN), key=mx.random.key(2))
    return layer


def experts() -> nn.Module:
    return SwitchLinear(IN, OUT, EXPERTS, bias=True)


NF4 = {"mode": "nf4", "bits": 4, "group_size": 32}
LAYERS: dict[str, Layer] = {
    "linear": linear,
    "linear without bias": lambda: linear(bias=False),
    "linear 4 bits": lambda: linear().to_quantized(group_size=32, bits=4),
    "linear 3 bits": lambda: linear().to_quantized(group_size=32, bits=3),
    "linear 6 bits, CPU": lambda: like(linear().to_quantized(group_size=64, bits=6), DequantizingLinear),
    "linear mxfp4": lambda: linear().to_quantized(group_size=32, bits=4, mode="mxfp4"),
    "linear nf4": lambda: packed_layer(linear(), NF4),
    "embedding": embedding,
    "embedding nf4 double": lambda: packed_layer(embedding(), {**NF4, "double_quant": True}),
    "embedding 4 bits": lambda: embedding().to_quantized(group_size=32, bits=4),
    "embedding 5 bits, CPU": lambda: like(embedding().to_quantized(group_size=64, bits=5), DequantizingEmbedding),
    "experts": experts,
    "experts nf4": lambda: packed_layer(experts(), NF4),
    "experts 4 bits": lambda: experts().to_quantized(group_size=32, bits=4),
    "experts 3 bits": lambda: experts().to_quantized(group_size=32, bits=3),
}
WIDTH = 5


def pair(*shape: int) -> int:
    """Two factors of rank RANK, for every expert."""
    return (shape[0] if len(shape) == 3 else 1) * RANK * (shape[-1] + shape[-2])


def vectors(*shape: int) -> int:
    """A number for every output, of every expert."""
    return (shape[0] if len(shape) == 3 else 1) * shape[-2]


# Parameters by method and by the unpacked shape of the weight.
CLOSED_FORM: dict[str, Callable[..., int]] = {
    "lora": pair,
    "dora": lambda *shape: pair(*shape) + int(np.prod(shape[:-1])),
    "ia3": lambda *shape: shape[-1] if shape[0] == VOCABULARY else vectors(*shape),
    "bitfit": lambda *shape: int(np.prod(shape[:-1])),
    "bottleneck": lambda *shape: 2 * WIDTH * shape[-2] + WIDTH + shape[-2],
    "vera": lambda *shape: vectors(*shape) + (shape[0] if len(shape) == 3 else 1) * RANK,
}
WRAPS_LAYERS = [method for method in METHODS if method not in ("prefix", "prompt")]


def settings_of(method: str) -> Adapter:
    if method in LOW_RANK:
        return Adapter(method=method, rank=RANK, **({"alpha": 6} if method in SETTINGS["alpha"] else {}))
    return Adapter(method=method, bottleneck=WIDTH) if method == "bottleneck" else Adapter(method=method)


def serves(method: str, kind: str) -> bool:
    return resolve(method).refusal(LAYERS[kind](), settings_of(method), "layer") is None


CASES = [(method, kind) for method in WRAPS_LAYERS for kind in LAYERS if serves(method, kind)]
FUSED = [(method, kind) for method, kind in CASES if method != "bottleneck"]
EMBEDDING_KINDS = [kind for kind in LAYERS if kind.startswith("embedding")]


def wrap(method: str, layer: nn.Module, *, strength: float = 0.0, **settings: object) -> AdapterLayer:
    """A wrapper in evaluation, its arrays off by noise of the given strength; LoRA's A stays as it is drawn."""
    layer.freeze()
    config = Adapter.model_validate(settings_of(method).model_dump() | settings)
    cls = resolve(method)
    shared = cls.shared({"layer": layer}, config)
    wrapper: AdapterLayer = cls.from_base(layer, config, path="layer", key=mx.random.key(3), shared=shared)
    for name, array in wrapper.adapter_arrays().items():
        if strength and name != "lora_a":
            more = 10 if name == "lora_e" else 1  # it multiplies two factors that are small
            wrapper[name] = array + more * strength * mx.random.normal(array.shape, key=mx.random.key(4))
    wrapper.eval()
    return wrapper


def run(module: nn.Module, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Output for the inputs that a kind of layer takes."""
    base = module.base if isinstance(module, AdapterLayer) else module
    if isinstance(base, nn.Embedding | nn.QuantizedEmbedding):
        return module(mx.array([[0, 5, 47], [5, 5, 1]]))
    x = mx.random.normal((2, 5, IN), key=mx.random.key(5)).astype(dtype)
    if isinstance(base, EXPERT_LAYERS):
        chosen = mx.array([[[0, 3], [1, 1], [2, 0], [3, 2], [0, 1]], [[2, 3], [1, 0], [2, 2], [3, 1], [0, 2]]])
        return module(x[..., None, None, :], chosen)
    return module(x)


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_a_new_adapter_changes_no_bit(method: str, kind: str) -> None:
    layer = LAYERS[kind]()
    before = np.array(run(layer))
    np.testing.assert_array_equal(run(wrap(method, layer)), before)


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_only_the_adapter_has_gradients_and_all_of_it(method: str, kind: str) -> None:
    wrapper = wrap(method, LAYERS[kind](), strength=0.1)
    _, gradients = nn.value_and_grad(wrapper, lambda: run(wrapper).square().sum())()
    flat = dict(tree_flatten(gradients))
    assert sorted(flat) == sorted(wrapper.adapter_params())
    assert all(gradient.any().item() for gradient in flat.values()), "a gradient is silently zero"


@pytest.mark.parametrize(("method", "kind"), FUSED)
def test_the_fused_layer_is_plain_and_says_the_same(method: str, kind: str) -> None:
    wrapper = wrap(method, LAYERS[kind](), strength=0.1)
    fused = wrapper.fuse()
    assert type(fused) in (nn.Linear, nn.Embedding, SwitchLinear)
    np.testing.assert_allclose(run(fused), run(wrapper), rtol=1e-4, atol=1e-4)
    assert not np.allclose(run(fused), run(wrapper.base), atol=1e-2), "the update is too small to show anything"


@pytest.mark.parametrize(("method", "kind"), FUSED)
def test_a_packed_merge_says_the_same_and_changes_no_packed_byte(method: str, kind: str) -> None:
    wrapper = wrap(method, LAYERS[kind](), strength=0.1)
    packed = np.array(wrapper.base["weight"])
    fused = wrapper.fuse_packed()
    if fused is None:
        return
    assert type(fused) is type(wrapper.base) and "scales" in fused
    np.testing.assert_array_equal(fused["weight"], packed)
    np.testing.assert_allclose(run(fused), run(wrapper), rtol=1e-4, atol=1e-4)
    assert not np.allclose(run(fused), run(wrapper.base), atol=1e-2), "the update is too small to show anything"


@pytest.mark.parametrize(("method", "kind"), [case for case in CASES if case[0] in CLOSED_FORM])
def test_parameters_are_float32_and_as_many_as_the_formula_says(method: str, kind: str) -> None:
    """Shapes of 3, 5 and 6 bits come from packed · 32 // bits, not packed · (32 // bits)."""
    layer = LAYERS[kind]()
    shape = tuple(dequantize_layer(layer, mx.float32).shape)
    assert layer_shape(layer) == shape
    arrays = wrap(method, layer).adapter_arrays()
    assert sum(array.size for array in arrays.values()) == CLOSED_FORM[method](*shape)
    assert {array.dtype for array in arrays.values()} == {mx.float32}


@pytest.mark.parametrize(("method", "kind"), [(method, kind) for method, kind in CASES if "CPU" not in kind])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_adapters_promote_no_half_precision_activation(method: str, kind: str, dtype: mx.Dtype) -> None:
    layer = LAYERS[kind]()
    layer.set_dtype(dtype)
    expected = run(layer, dtype).dtype
    assert run(wrap(method, layer, strength=0.1), dtype).dtype == expected


@pytest.mark.parametrize("kind", LAYERS)
def test_lora_update_is_the_scaled_product_of_its_factors(kind: str) -> None:
    wrapper = wrap("lora", LAYERS[kind](), strength=0.1)
    a, b = (np.array(wrapper[name], np.float64) for name in ("lora_a", "lora_b"))
    scale = 6 / RANK
    product = b @ a if a.ndim == 3 else a @ b if kind in EMBEDDING_KINDS else (a @ b).T
    np.testing.assert_allclose(wrapper.delta(), scale * product, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "kind"), [case for case in FUSED if case[1] in EMBEDDING_KINDS])
def test_an_adapted_embedding_is_adapted_as_tied_head_too(method: str, kind: str) -> None:
    wrapper = wrap(method, LAYERS[kind](), strength=0.1)
    x = mx.random.normal((7, IN), key=mx.random.key(6))
    np.testing.assert_allclose(wrapper.as_linear(x), wrapper.fuse().as_linear(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "path", "rank", "scale"),
    [
        ({"rank": 8, "alpha": 16}, "a.q_proj", 8, 2.0),
        ({"rank": 4, "alpha": 16, "rslora": True}, "a.q_proj", 4, 8.0),
        ({"rank": 8, "alpha": 16, "rank_pattern": {"q_proj": 2}}, "a.q_proj", 2, 8.0),
        ({"rank": 8, "alpha": 16, "rank_pattern": {"q_proj": 2}}, "a.k_proj", 8, 2.0),
        ({"rank": 8, "alpha": 16, "alpha_pattern": {"a.q_proj": 4}}, "a.q_proj", 8, 0.5),
        ({"rank": 8, "alpha": 16, "rslora": True, "rank_pattern": {"k_.*": 4}}, "a.k_proj", 4, 8.0),
    ],
)
def test_rank_and_scale_follow_rslora_and_the_patterns(
    settings: dict[str, object], path: str, rank: int, scale: float
) -> None:
    wrapper = resolve("lora").from_base(linear(), Adapter(**settings), path=path, key=mx.random.key(0))
    assert (wrapper.rank, wrapper.lora_a.shape, wrapper.scale) == (rank, (IN, rank), scale)


@pytest.mark.parametrize(("init", "deviation"), [("default", IN**-0.5 / 3**0.5), ("gaussian", 1 / RANK)])
def test_a_starts_random_and_b_at_zero(init: str, deviation: float) -> None:
    many = [wrap("lora", linear(), init=init) for _ in range(2)]
    assert not many[0].lora_b.any().item()
    np.testing.assert_array_equal(many[0].lora_a, many[1].lora_a, err_msg="one key gave two draws")
    assert np.std(np.array(many[0].lora_a)) == pytest.approx(deviation, rel=0.15)


def test_dropout_can_draw_one_mask_twice() -> None:
    dropout, x = Dropout(0.25), mx.ones((100, 100))
    dropout.drawn_from(mx.random.key(7))
    first, again = np.array(dropout(x)), np.array(dropout(x))
    np.testing.assert_array_equal(first, again)
    assert np.mean(first) == pytest.approx(1, abs=0.05) and np.mean(first == 0) == pytest.approx(0.25, abs=0.02)
    dropout.drawn_from(None)
    assert not np.array_equal(dropout(x), dropout(x))
    dropout.eval()
    np.testing.assert_array_equal(dropout(x), x)
    assert not dropout.parameters(), "a key is no parameter"


def test_dropout_applies_while_training_only() -> None:
    wrapper = wrap("lora", linear(), strength=0.1, dropout=0.5)
    np.testing.assert_array_equal(run(wrapper), run(wrapper))
    wrapper.train()
    assert not np.array_equal(run(wrapper), run(wrapper))
