"""What is full fine-tuning's own: everything trains, whatever kind of module it is, and the base stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach, build, detach, put
from mlx_lora.adapters.full import Full, own_parameters
from mlx_lora.adapters.targets import bare_modules
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError
from mlx_lora.store.adapter import Manifest, read, save, wrappers_for
from tests.adapters.zoo import network

ALL = Adapter(method="full", targets="all")
# Kinds that no other method wraps, with an input for each.
OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "RMSNorm": (lambda: nn.RMSNorm(16), (3, 16)),
    "LayerNorm": (lambda: nn.LayerNorm(16), (3, 16)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 9, 4)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 5, 5, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (2, 5, 5, 4)),
    "BatchNorm": (lambda: nn.BatchNorm(4), (2, 5, 5, 4)),
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("kind", OTHERS)
def test_norms_and_convolutions_train_and_start_as_their_base(kind: str, dtype: mx.Dtype) -> None:
    make, shape = OTHERS[kind]
    layer = make()
    layer.set_dtype(dtype)
    layer.freeze()
    layer.eval()
    x = mx.random.normal(shape, key=mx.random.key(1)).astype(dtype)
    before = layer(x)
    wrapper = Full.from_base(layer, ALL, path="layer", key=mx.random.key(0))
    after = wrapper(x)
    np.testing.assert_array_equal(after, before)
    assert after.dtype == before.dtype
    wrapper.train()
    np.testing.assert_array_equal(wrapper(x), before, err_msg="running statistics are the base's")
    wrapper.eval()
    assert set(wrapper.adapter_params()) == {name for name in ("weight", "bias") if name in layer}
    assert {array.dtype for array in wrapper.adapter_arrays().values()} == {mx.float32}
    assert set(wrapper.adapter_params()) == wrapper.PRECISE, "an update is smaller than what bf16 rounds away"
    _, gradients = nn.value_and_grad(wrapper, lambda: wrapper(x).square().sum())()
    assert sorted(dict(tree_flatten(gradients))) == sorted(wrapper.adapter_params())
    wrapper["weight"] = wrapper["weight"] + 0.5
    assert not np.allclose(wrapper(x), before, atol=1e-2)
    np.testing.assert_array_equal(layer(x), before, err_msg="the base changed")
    fused = wrapper.fuse()
    assert type(fused) is type(layer)
    fused.set_dtype(dtype)
    np.testing.assert_array_equal(fused(x), wrapper(x))
    np.testing.assert_allclose(wrapper.delta(), np.full(layer.weight.shape, 0.5), atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3 experts", "llama untied"])
def test_all_is_every_parameter_of_the_model(name: str) -> None:
    """Norms of a model's own making and routers too."""
    model = network(name)
    parameters = {path: array for path, array in tree_flatten(model.parameters())}
    tokens = mx.array([[1, 2, 3, 4]])
    before = np.array(model(tokens))
    wrappers = attach(model, ALL)
    mine = {f"{path}.{key}" for path, wrapper in wrappers.items() for key in wrapper.adapter_params()}
    assert mine == set(parameters)
    np.testing.assert_array_equal(model(tokens), before)
    assert {key for key, _ in tree_flatten(model.trainable_parameters())} == mine
    detach(model)
    assert all(array is parameters[path] for path, array in tree_flatten(model.parameters()))


def test_layers_choose_what_is_inside_them_only() -> None:
    model = network("llama untied")
    found = list(build(model, ALL.model_copy(update={"layers": 1})))
    assert found and all(path.startswith("model.layers.1.") for path in found)
    assert any(path.endswith("input_layernorm") for path in found)
    assert "lm_head" in build(model, ALL) and "model.norm" in build(model, ALL)


def test_other_targets_are_found_as_for_any_method() -> None:
    found = build(network("llama"), Adapter(method="full", targets=["q_proj"]))
    assert list(found) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_a_packed_base_is_refused_with_what_works(mode: str) -> None:
    model = network("llama")
    nn.quantize(model, group_size=32, bits=4, mode=mode)
    with pytest.raises(AdapterError, match="half-precision base can, or method lora"):
        build(model, ALL)


def test_a_module_without_parameters_of_its_own_is_refused() -> None:
    for path, module in bare_modules(network("llama")).items():
        refused = Full.refusal(module, ALL, path) is not None
        assert refused == (not own_parameters(module)), path


def test_a_tied_head_computes_with_what_was_trained() -> None:
    model = network("llama")
    tokens = mx.array([[1, 2, 3]])
    wrapper = attach(model, Adapter(method="full", targets=["embed_tokens"]))["model.embed_tokens"]
    wrapper["weight"] = 2 * wrapper["weight"]
    x = mx.random.normal((2, wrapper["weight"].shape[1]))
    np.testing.assert_allclose(wrapper.as_linear(x), 2 * wrapper.base.as_linear(x), rtol=1e-6)
    np.testing.assert_allclose(wrapper(tokens), 2 * wrapper.base(tokens), rtol=1e-6)


def test_stored_weights_are_what_mlx_lm_loads(tmp_path: Path) -> None:
    """Under the parameters' own names, and not rounded."""
    from mlx_lm.tuner.utils import load_adapters

    tokens, model = mx.array([[5, 17, 3, 80]]), network("llama")
    config = ALL.model_copy(update={"layers": 1})
    bare, wrappers = np.array(model(tokens)), attach(model, config)
    for wrapper in wrappers.values():
        wrapper["weight"] = wrapper["weight"] + 0.01 * mx.random.normal(wrapper["weight"].shape, key=mx.random.key(4))
    manifest = Manifest(
        method="full", adapter=config.model_dump(), modules=list(wrappers), scales=dict.fromkeys(wrappers, 1.0)
    )
    folder = save(tmp_path / "adapter", wrappers, manifest, layers=2)
    learned = np.array(model(tokens))
    put(model, wrappers_for(model, read(folder)))
    np.testing.assert_array_equal(model(tokens), learned)
    theirs = load_adapters(network("llama"), str(folder)).eval()
    np.testing.assert_allclose(theirs(tokens), learned, rtol=1e-5, atol=1e-5)
    assert not np.allclose(learned, bare, atol=1e-2)
