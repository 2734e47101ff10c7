"""QA-LoRA into half-precision zero-points: all of it where it was trained through the rounding, else in float32."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

from mlx_lora.adapters.attach import build, put
from mlx_lora.config import Adapter, Quantize
from mlx_lora.errors import CannotFuse
from mlx_lora.interop.fuse import Fused, fuse
from mlx_lora.machine import device
from mlx_lora.models.load import load, load_stored
from mlx_lora.store.adapter import Manifest, StoredAdapter, wrappers_for
from tests.conftest import write_model

FOUR = Quantize(bits=4, group_size=32)
TOKENS = mx.array([list(range(30, 60))])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "half", dtype=mx.float16)


def adapter_on(path: Path, zero_points: str, *, method: str = "qalora") -> StoredAdapter:
    """An update of a twentieth of what lies between two zero-points, on the mean."""
    given: dict[str, Any] = {"zero_points": zero_points} if method == "qalora" else {}
    config = Adapter(method=method, rank=2, alpha=4, **given)
    wrappers, arrays = build(load(path, quantization=FOUR).model, config, seed=1), {}
    for index, (name, wrapper) in enumerate(wrappers.items()):
        arrays[f"{name}.lora_a"] = wrapper.lora_a
        b = mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(index))
        arrays[f"{name}.lora_b"] = 3e-4 * b
    scales = dict.fromkeys(wrappers, 2.0)
    manifest = Manifest(method=method, adapter=config.model_dump(), modules=list(wrappers), scales=scales)
    return StoredAdapter(Path("random"), manifest, arrays)


def run(base: Path, out: Path, adapter: StoredAdapter, **options: Any) -> Fused:
    return fuse(partial(load_stored, base, quantization=FOUR, lazily=True), adapter, out, **options)


def arrays_of(path: Path) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = mx.load(str(path / "model.safetensors"))  # type: ignore[assignment]
    return arrays


def closeness() -> float:
    """Of logits up to 2: on a GPU they are computed in half precision."""
    return 3e-2 if device.on_gpu() else 2e-5


def live(base: Path, adapter: StoredAdapter) -> mx.array:
    reference = load(base, quantization=FOUR)
    put(reference.model, wrappers_for(reference.model, adapter))
    return reference.model(TOKENS)  # type: ignore[no-any-return]


def test_what_was_trained_through_the_rounding_is_all_there_in_four_bits(base: Path, tmp_path: Path) -> None:
    """No packed byte changes, and unmodified mlx_lm computes what base and adapter compute."""
    adapter, out = adapter_on(base, "stored"), tmp_path / "out"
    fused = run(base, out, adapter, bits="keep")
    assert fused.delta_survival > 0.999 and fused.zero_points_bytes == 0
    before = dict(load_stored(base, quantization=FOUR).model.named_modules())
    after, moved = arrays_of(out), 0.0
    for path in adapter.manifest.modules:
        for name in ("weight", "scales"):
            np.testing.assert_array_equal(after[f"{path}.{name}"], before[path][name], err_msg=path)
        assert after[f"{path}.biases"].dtype == mx.float16
        moved = max(moved, float(mx.mean(after[f"{path}.biases"] != before[path]["biases"]).item()))
    assert 0.01 < moved < 0.5, "the update is to be a small part of the spacing"
    reference = live(base, adapter)
    np.testing.assert_allclose(load(out).model(TOKENS), reference, atol=closeness())
    theirs, _ = mlx_lm.utils.load(str(out))
    theirs.set_dtype(mx.float32)
    np.testing.assert_allclose(theirs(TOKENS), reference, atol=closeness())
    if not device.on_gpu():
        assert mx.abs(load(base, quantization=FOUR).model(TOKENS) - reference).max() > 1e-3


def test_without_rounding_it_is_refused_and_float32_keeps_it(base: Path, tmp_path: Path) -> None:
    adapter, out = adapter_on(base, "float32"), tmp_path / "out"
    with pytest.raises(CannotFuse, match="survives") as refused:
        run(base, out, adapter, bits="keep")
    assert "--zero-points float32" in str(refused.value.hint) and not out.exists()
    fused = run(base, out, adapter, zero_points="float32")
    assert fused.bits == "keep" and fused.delta_survival > 0.999
    after = arrays_of(out)
    wide = [after[f"{path}.{name}"] for path in adapter.manifest.modules for name in ("scales", "biases")]
    assert {array.dtype for array in wide} == {mx.float32}
    assert fused.zero_points_bytes == sum(array.nbytes for array in wide) // 2
    np.testing.assert_allclose(load(out).model(TOKENS), live(base, adapter), atol=closeness())


def test_mlx_lm_computes_in_float32_behind_float32_zero_points(base: Path, tmp_path: Path) -> None:
    """What the command says about memory is so."""
    run(base, tmp_path / "wide", adapter_on(base, "float32"), zero_points="float32")
    run(base, tmp_path / "half", adapter_on(base, "stored"), bits="keep")
    for name, dtype in (("wide", mx.float32), ("half", mx.float16)):
        model, _ = mlx_lm.utils.load(str(tmp_path / name))
        assert model(TOKENS).dtype == dtype


@pytest.mark.parametrize(
    ("zero_points", "method", "dtype", "bits", "fault"),
    [
        ("float32", "lora", mx.float16, "keep", "only a QA-LoRA adapter"),
        ("float32", "qalora", mx.float16, "8", "are for bits=keep"),
        ("float32", "qalora", mx.float32, "keep", "in float32 already"),
        ("stored", "qalora", mx.float16, "keep", "in their own precision"),
    ],
)
def test_where_float32_would_change_nothing_it_is_refused(
    tmp_path: Path, zero_points: str, method: str, dtype: mx.Dtype, bits: str, fault: str
) -> None:
    path = write_model(tmp_path / "base", dtype=dtype)
    with pytest.raises(CannotFuse, match=fault):
        run(path, tmp_path / "out", adapter_on(path, zero_points, method=method), bits=bits, zero_points="float32")
    assert not (tmp_path / "out").exists()
