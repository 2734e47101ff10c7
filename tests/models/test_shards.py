"""Models written module by module: the same tensors, files and index as mlx_lm writes, and appearing whole or not."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

from mlx_lora.config import Quantize
from mlx_lora.models.load import load_stored
from mlx_lora.models.save import save
from tests.conftest import write_model


def split_often(weights: dict[str, mx.array]) -> list[dict[str, mx.array]]:
    names = list(weights)
    return [{name: weights[name] for name in names[start : start + 7]} for start in range(0, len(names), 7)]


@pytest.mark.parametrize("several", [False, True], ids=["one file", "several files"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_files_and_tensors_are_those_that_mlx_lm_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: bool, dtype: mx.Dtype
) -> None:
    if several:
        monkeypatch.setattr(mlx_lm.utils, "make_shards", split_often)
    source = write_model(tmp_path / "source", dtype=dtype)
    settings = Quantize(bits=4, group_size=32)
    (tmp_path / "theirs").mkdir()
    mlx_lm.utils.save_model(tmp_path / "theirs", load_stored(source, quantization=settings).model)
    save(load_stored(source, quantization=settings, lazily=True), tmp_path / "ours", free=True)
    files = sorted(file.name for file in (tmp_path / "theirs").glob("*.safetensors"))
    assert files == sorted(file.name for file in (tmp_path / "ours").glob("*.safetensors")) and several == (
        len(files) > 1
    )
    index = "model.safetensors.index.json"
    ours, theirs = (json.loads((tmp_path / side / index).read_text()) for side in ("ours", "theirs"))
    assert ours == theirs
    for file in files:
        mine, expected = (mx.load(str(tmp_path / side / file)) for side in ("ours", "theirs"))
        assert mine.keys() == expected.keys()
        for name, array in expected.items():
            assert array.dtype == mine[name].dtype and np.array_equal(_raw(array), _raw(mine[name])), name


def _raw(array: mx.array) -> np.ndarray:  # type: ignore[type-arg]
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def test_a_model_that_was_not_freed_still_runs(tmp_path: Path) -> None:
    loaded = load_stored(write_model(tmp_path / "source"))
    before = np.array(loaded.model(mx.array([[1, 2, 3]])))
    save(loaded, tmp_path / "out")
    assert np.array_equal(before, np.array(loaded.model(mx.array([[1, 2, 3]]))))


def test_a_write_that_fails_in_its_middle_leaves_nothing(tmp_path: Path) -> None:
    loaded = load_stored(write_model(tmp_path / "source"))
    done: list[int] = []

    def fail() -> None:
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(loaded, tmp_path / "out", free=True, on_module=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
