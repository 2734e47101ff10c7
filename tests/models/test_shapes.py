"""Modules made from a configuration alone have the shapes, the dtypes and the packing of the loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_lora.config import Quantize
from mlx_lora.errors import ModelError
from mlx_lora.machine import device
from mlx_lora.models import load as loading
from mlx_lora.models.load import LoadedModel, load, ready
from mlx_lora.models.open import read_config
from mlx_lora.models.save import save
from mlx_lora.models.shapes import network, stored_dtype, summary
from mlx_lora.quant.quantize import quantize
from tests.adapters.zoo import COMMON, MODELS
from tests.adapters.zoo import network as with_weights
from tests.conftest import write_model

LLAMA_65B = COMMON | {
    "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 22016,
    "num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 128, "vocab_size": 32000,
}  # fmt: skip


def described(model: Any) -> dict[str, tuple[Any, ...]]:
    return {path: (array.shape, array.dtype) for path, array in tree_flatten(model.parameters())}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "quantization",
    [None, Quantize(bits=4, group_size=32), Quantize(mode="nf4", group_size=32, double_quant=True)],
    ids=["plain", "4 bits", "nf4"],
)
def test_shapes_are_those_of_the_loaded_model(name: str, quantization: Quantize | None) -> None:
    kind, changes = MODELS[name]
    settings = quantization.complete() if quantization else None
    real = with_weights(name, dtype=mx.float16)
    if kind == "gemma3_text":
        real.sanitize({})  # as on loading, which drops a head of its own that the files don't have
    if settings:
        quantize(real, settings)
    ready(LoadedModel(real, None, {}, Path(), mx.float16))
    config = {"model_type": kind, **COMMON, **changes, "torch_dtype": "float16"}
    assert described(network(config, quantization=settings, gpu=device.on_gpu())) == described(real)


def test_a_packed_base_is_described_by_its_own_configuration(tmp_path: Path, tiny_path: Path) -> None:
    base = loading.load_stored(tiny_path, quantization=Quantize(bits=4, group_size=32))
    save(base, tmp_path / "packed")
    loaded = load(tmp_path / "packed")
    config = summary(tmp_path / "packed")  # which says no dtype: the files do
    assert described(network(config, gpu=device.on_gpu())) == described(loaded.model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_on_a_gpu_the_stored_dtype_stays(dtype: str, tmp_path: Path) -> None:
    config = read_config(write_model(tmp_path / "m")) | {"torch_dtype": dtype}
    assert {array.dtype for _, array in tree_flatten(network(config, gpu=True).parameters())} == {stored_dtype(config)}
    assert {array.dtype for _, array in tree_flatten(network(config, gpu=False).parameters())} == {mx.float32}


def test_the_largest_model_takes_no_memory() -> None:
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = network(LLAMA_65B, quantization={"mode": "affine", "bits": 4, "group_size": 64}, gpu=True)
    assert sum(array.nbytes for _, array in tree_flatten(model.parameters())) > 36e9
    assert mx.get_peak_memory() - before < 1 << 20


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "nobody"}, "'nobody' is not known"),
        ({"model_type": "llama"}, "hidden_size"),
        (LLAMA_65B | {"hidden_size": "wide"}, 'hidden_size is "wide"'),
        (LLAMA_65B | {"hidden_size": 1 << 40}, "hidden_size is 1099511627776, too large"),
        (LLAMA_65B | {"quantization": {"bits": 4}}, "group_size"),
        (LLAMA_65B | {"quantization": {"bits": 7, "group_size": 64}}, "quantization"),
        (LLAMA_65B | {"quantization": "4"}, "quantization"),
    ],
)
def test_what_no_model_can_be_made_of_is_an_error_with_a_hint(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        network(config, gpu=False)
    assert caught.value.hint
