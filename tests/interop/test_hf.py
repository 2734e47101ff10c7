"""Names that transformers has for a model's tensors; `tests/real/test_export_hf.py` loads them there."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_lora.errors import ModelError
from mlx_lora.interop import hf
from mlx_lora.quant.quantize import named_arrays
from tests.adapters.zoo import network


@pytest.mark.parametrize(("name", "expert"), [("qwen3 experts", "mlp.experts.1.down_proj"),
                                              ("mixtral experts", "block_sparse_moe.experts.1.w2")])  # fmt: skip
def test_experts_come_apart_and_read_back(name: str, expert: str) -> None:
    model = network(name)
    arrays = dict(named_arrays(model))
    written = dict(hf.renamed(model, list(arrays.items())))
    stacked = next(array for path, array in arrays.items() if "layers.0" in path and "switch_mlp.down_proj" in path)
    assert mx.array_equal(written[f"model.layers.0.{expert}.weight"], stacked[1]).item()
    assert not any("switch_mlp" in path for path in written)
    back = type(model).sanitize(network(name), dict(written))
    assert back.keys() == arrays.keys()
    assert all(mx.array_equal(back[path], arrays[path]).item() for path in arrays)


def test_dense_models_keep_their_names() -> None:
    model = network("gemma3")
    arrays = named_arrays(model)
    assert [name for name, _ in hf.renamed(model, arrays)] == [name for name, _ in arrays]


def test_an_architecture_that_was_never_compared_is_refused_by_name() -> None:
    class Model:
        pass

    Model.__module__ = "mlx_lm.models.mamba2"
    with pytest.raises(ModelError, match="mamba2: how transformers names its tensors is not known"):
        hf.check(Model())  # type: ignore[arg-type]


def test_names_that_mlx_lm_would_not_read_back_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hf.EXPERTS, "qwen3_moe", hf.NUMBERED)
    model = network("qwen3 experts")
    with pytest.raises(ModelError, match="mlx_lm doesn't read these back"):
        hf.renamed(model, named_arrays(model))


def test_a_file_beside_others_is_named_in_the_index_alone(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model-vision.safetensors"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "model.safetensors", "v": "model-vision.safetensors"}})
    )
    hf.as_one_of_several(tmp_path)
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert not (tmp_path / "model.safetensors").exists()
    assert all((tmp_path / file).exists() for file in files.values()) and files["v"] == "model-vision.safetensors"
