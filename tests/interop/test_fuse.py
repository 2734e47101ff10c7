"""Fusing: what survives is measured before anything is written, and the result is an ordinary model directory."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import build, put
from mlx_lora.config import Adapter, Quantize
from mlx_lora.errors import CannotFuse, NameTaken
from mlx_lora.interop.fuse import Fused, fuse
from mlx_lora.measure import Agreement, compare, predictions, rows_of_tokens
from mlx_lora.models.load import LoadedModel, load, load_stored
from mlx_lora.quant.quantize import layer_settings
from mlx_lora.store.adapter import Manifest, StoredAdapter

TOKENS = list(range(30, 60))
ROWS = rows_of_tokens([TOKENS, TOKENS[::-1]])


def adapter_on(loaded: LoadedModel, strength: float) -> StoredAdapter:
    """An adapter whose update has a given size against the weights."""
    config = Adapter(rank=4, alpha=4)
    wrappers = build(loaded.model, config, seed=1)
    arrays = {}
    for index, (path, wrapper) in enumerate(wrappers.items()):
        b = strength * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(index))
        arrays |= {f"{path}.lora_a": wrapper.lora_a, f"{path}.lora_b": b}
    manifest = Manifest(
        method="lora", adapter=config.model_dump(), modules=list(wrappers), scales=dict.fromkeys(wrappers, 1.0)
    )
    return StoredAdapter(Path("random"), manifest, arrays)


def run(base: Path, out: Path, strength: float, *, quantize: bool, bits: str | None, force: bool = False) -> Fused:
    settings = Quantize(bits=4, group_size=32) if quantize else None
    adapter = adapter_on(load(base, quantization=settings), strength)
    stored = partial(load_stored, base, quantization=settings, lazily=True)
    return fuse(stored, adapter, out, bits=bits, force=force)


def agreement(base: Path, out: Path, strength: float, *, quantize: bool) -> Agreement:
    reference = load(base, quantization=Quantize(bits=4, group_size=32) if quantize else None)
    put(reference.model, _wrappers(reference, adapter_on(reference, strength)))
    return compare(predictions(reference.model, ROWS), predictions(load(out).model, ROWS), ROWS)


@pytest.mark.parametrize(
    ("quantize", "bits", "survival"),
    [(False, None, 0.999), (False, "keep", 0.999), (False, "mixed", 0.9), (False, "8", 0.9),
     (True, None, 0.9), (True, "mixed", 0.9), (True, "8", 0.9), (True, "16", 0.99)],
)  # fmt: skip
def test_fused_model_says_what_base_and_adapter_say(
    tiny_path: Path, tmp_path: Path, quantize: bool, bits: str | None, survival: float
) -> None:
    fused = run(tiny_path, tmp_path / "out", 0.3, quantize=quantize, bits=bits)
    assert fused.delta_survival > survival
    agreed = agreement(tiny_path, tmp_path / "out", 0.3, quantize=quantize)
    assert agreed.kl < 0.01 and agreed.top1_agreement > 0.9
    model, _ = mlx_lm.utils.load(str(tmp_path / "out"))
    model.set_dtype(mx.float32)
    reference = load(tiny_path, quantization=Quantize(bits=4, group_size=32) if quantize else None)
    put(reference.model, _wrappers(reference, adapter_on(reference, 0.3)))
    theirs, ours = (np.array(m(mx.array([TOKENS]))) for m in (model, reference.model))
    tolerance = {0.999: 1e-4, 0.99: 1e-2, 0.9: 0.2}[survival]
    assert np.abs(theirs - ours).max() < tolerance


def _wrappers(loaded: LoadedModel, adapter: StoredAdapter):  # type: ignore[no-untyped-def]
    from mlx_lora.store.adapter import wrappers_for

    return wrappers_for(loaded.model, adapter)


def test_sixteen_bits_are_half_precision_and_mixed_is_eight_bits_over_a_plain_base(
    tiny_path: Path, tmp_path: Path
) -> None:
    run(tiny_path, tmp_path / "half", 0.3, quantize=False, bits="16")
    assert {array.dtype for _, array in tree_flatten(load_stored(tmp_path / "half").model.parameters())} == {mx.float16}
    run(tiny_path, tmp_path / "mixed", 0.3, quantize=False, bits="mixed")
    layers = dict(load_stored(tmp_path / "mixed").model.named_modules())
    assert layer_settings(layers["model.layers.0.self_attn.q_proj"]) == {"mode": "affine", "bits": 8, "group_size": 32}
    assert layer_settings(layers["model.layers.0.mlp.up_proj"]) is None


def test_mixed_keeps_untouched_layers_as_they_were(tiny_path: Path, tmp_path: Path) -> None:
    settings = Quantize(bits=4, group_size=32)
    run(tiny_path, tmp_path / "out", 0.3, quantize=True, bits="mixed")
    before = dict(load_stored(tiny_path, quantization=settings).model.named_modules())
    after = dict(load_stored(tmp_path / "out").model.named_modules())
    touched = layer_settings(after["model.layers.0.self_attn.q_proj"])
    assert touched == {"mode": "affine", "bits": 8, "group_size": 32}
    untouched = "model.layers.0.mlp.up_proj"
    assert layer_settings(after[untouched]) == {"mode": "affine", "bits": 4, "group_size": 32}
    assert mx.array_equal(before[untouched].weight, after[untouched].weight)


def test_mixed_keeps_layers_plain_whose_update_eight_bits_would_lose(tiny_path: Path, tmp_path: Path) -> None:
    """A short training moves weights by less than an 8-bit step."""
    fused = run(tiny_path, tmp_path / "out", 0.003, quantize=True, bits="mixed")
    layers = dict(load_stored(tmp_path / "out").model.named_modules())
    assert layer_settings(layers["model.layers.0.self_attn.q_proj"]) is None and fused.delta_survival > 0.99
    assert layer_settings(layers["model.layers.0.mlp.up_proj"]) == {"mode": "affine", "bits": 4, "group_size": 32}
    mlx_lm.utils.load(str(tmp_path / "out"))


def test_an_update_lost_in_four_bits_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    """Fusing into 4 bits can erase an adapter in silence."""
    with pytest.raises(CannotFuse, match="survives") as refused:
        run(tiny_path, tmp_path / "out", 0.003, quantize=True, bits="keep")
    assert "mixed" in str(refused.value.hint) and not (tmp_path / "out").exists()
    forced = run(tiny_path, tmp_path / "out", 0.003, quantize=True, bits="keep", force=True)
    assert forced.delta_survival < 0.5


def test_survival_equals_numpy(tiny_path: Path, tmp_path: Path) -> None:
    fused = run(tiny_path, tmp_path / "out", 0.3, quantize=True, bits="keep", force=True)
    base = load(tiny_path, quantization=Quantize(bits=4, group_size=32))
    adapter = adapter_on(base, 0.3)
    result = dict(load(tmp_path / "out").model.named_modules())
    lost = meant = 0.0
    for path in adapter.manifest.modules:
        a, b = (np.array(adapter.arrays[f"{path}.lora_{x}"], np.float64) for x in "ab")
        before, after = (_dense(modules[path]) for modules in (dict(base.model.named_modules()), result))
        lost += ((after - before - (a @ b).T) ** 2).sum()
        meant += ((a @ b) ** 2).sum()
    assert fused.delta_survival == pytest.approx(1 - np.sqrt(lost / meant), abs=1e-4)


def _dense(layer) -> np.ndarray:  # type: ignore[no-untyped-def,type-arg]
    return np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits), np.float64)


def test_an_existing_directory_is_left_alone(tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(NameTaken):
        run(tiny_path, tmp_path / "out", 0.3, quantize=False, bits=None)
    assert not list((tmp_path / "out").iterdir())
