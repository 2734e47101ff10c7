"""On a CPU packed weights are unpacked once for generating, where memory allows, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import build, put
from mlx_lora.config import Adapter, Quantize
from mlx_lora.machine import device
from mlx_lora.models import unpack
from mlx_lora.models.load import LoadedModel, load
from mlx_lora.models.unpack import unpack_once
from mlx_lora.quant.dense import dense_weight
from mlx_lora.serve.engine import Engine
from tests.conftest import write_model

TOKENS = mx.array([[5, 9, 40, 7, 200, 3]])
MODES = [("affine", 4, 32), ("affine", 3, 64), ("affine", 8, 64), ("mxfp4", 4, 32), ("nf4", 4, 64)]


def packed(path: Path, mode: str = "affine", bits: int = 4, group_size: int = 32) -> LoadedModel:
    settings: dict[str, Any] = {"mode": mode, "bits": bits, "group_size": group_size}
    return load(path, quantization=Quantize(**settings))


def unpacked_layers(loaded: LoadedModel) -> set[str]:
    return {name for name, module in loaded.model.named_modules() if dense_weight(module) is not None}


def never(*arguments: Any, **named: Any) -> mx.array:
    raise AssertionError("a packed weight was unpacked for a token")


@pytest.mark.processor("a GPU multiplies by packed weights")
@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_no_weight_is_unpacked_for_every_token(
    tiny_path: Path, mode: str, bits: int, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = packed(tiny_path, mode, bits, group_size)
    before = np.array(loaded.model(TOKENS))
    assert unpack_once(loaded)
    np.testing.assert_allclose(loaded.model(TOKENS), before, rtol=2e-4, atol=2e-4)
    monkeypatch.setattr(mx, "quantized_matmul", never)
    monkeypatch.setattr("mlx_lora.quant.matmul.multiply_unpacked", never)
    monkeypatch.setattr("mlx_lora.quant.nf4.multiply_unpacked", never)
    assert len(list(Engine(loaded).stream(TOKENS[0].tolist(), max_tokens=3))) > 0


@pytest.mark.processor("a GPU multiplies by packed weights")
def test_a_packed_embedding_is_unpacked_where_it_is_the_head_alone(tiny_path: Path, tmp_path: Path) -> None:
    """Reading the rows of a few tokens is cheap."""
    tied, apart = packed(tiny_path), packed(write_model(tmp_path / "apart", tie_word_embeddings=False))
    assert unpack_once(tied) and unpack_once(apart)
    assert "model.embed_tokens" in unpacked_layers(tied)
    assert "lm_head" in unpacked_layers(apart) and "model.embed_tokens" not in unpacked_layers(apart)


@pytest.mark.processor("a GPU multiplies by packed weights")
def test_parameters_are_as_before_and_a_replaced_array_counts(tiny_path: Path) -> None:
    """What is saved, fingerprinted and merged is the packed layer; a merge into it must not be ignored."""
    loaded = packed(tiny_path)
    before = {name: id(array) for name, array in tree_flatten(loaded.model.parameters())}
    assert unpack_once(loaded)
    assert {name: id(array) for name, array in tree_flatten(loaded.model.parameters())} == before
    layer = loaded.model.layers[0].self_attn.q_proj
    assert dense_weight(layer) is not None
    layer.biases = layer.biases + 1
    assert dense_weight(layer) is None


@pytest.mark.processor("a GPU multiplies by packed weights")
@pytest.mark.parametrize("method", ["lora", "dora", "qalora", "glora"])
def test_adapters_give_the_same_over_unpacked_weights(tiny_path: Path, method: str) -> None:
    outputs = []
    for once in (False, True):
        loaded = packed(tiny_path)
        assert not once or unpack_once(loaded)
        wrappers = build(loaded.model, Adapter(method=method, rank=2), seed=1)
        for index, wrapper in enumerate(wrappers.values()):
            for name in wrapper.adapter_params():
                key = mx.random.key(index)
                wrapper[name] = wrapper[name] + 0.1 * mx.random.normal(wrapper[name].shape, key=key)
        put(loaded.model, wrappers)
        outputs.append(np.array(loaded.model(TOKENS)))
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu("a GPU multiplies by packed weights")
def test_on_a_gpu_weights_stay_packed(tiny_path: Path) -> None:
    loaded = packed(tiny_path)
    assert not unpack_once(loaded) and not unpacked_layers(loaded)


@pytest.mark.processor("a GPU multiplies by packed weights")
def test_without_memory_weights_stay_packed_and_it_is_said(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = packed(tiny_path)
    free = SimpleNamespace(limit_bytes=lambda: mx.get_active_memory() + 400_000)
    monkeypatch.setattr(unpack, "limits", free)
    with caplog.at_level("INFO", "mlx_lora"):
        assert not unpack_once(loaded)
    assert not unpacked_layers(loaded) and "unpacked for every token" in caplog.text and "400 kB" in caplog.text


def test_on_a_gpu_and_in_a_plain_model_nothing_is_unpacked(
    tiny_path: Path, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = packed(tiny_path)
    with caplog.at_level("INFO", "mlx_lora"):
        assert not unpack_once(tiny)
        monkeypatch.setattr(device, "on_gpu", lambda: True)
        assert not unpack_once(loaded)
    assert not unpacked_layers(loaded) and not caplog.messages
