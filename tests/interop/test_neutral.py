"""The form between formats: what is stored reads back the same, and `as_lora` finds the nearest LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.adapters.attach import Wrappers, build
from mlx_lora.adapters.targets import bare_modules
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError
from mlx_lora.interop.nearest_lora import as_lora
from mlx_lora.interop.neutral import Neutral, from_wrappers, shapes_of, to_store, usable
from mlx_lora.store.adapter import Manifest, read, wrappers_for
from tests.adapters.zoo import network

KNOWN = Manifest(method="lora", adapter={}, modules=[], scales={})
EXACT = 1e-5


def drawn(model: Any, config: Adapter, *, seed: int = 5) -> Wrappers:
    """Wrappers whose every array is random, as if trained."""
    wrappers = build(model, config, seed=1)
    for index, wrapper in enumerate(wrappers.values()):
        for number, name in enumerate(wrapper.adapter_params()):
            noise = 0.1 * mx.random.normal(wrapper[name].shape, key=mx.random.key(seed + 97 * index + number))
            wrapper[name] = wrapper[name] + noise.astype(mx.bfloat16).astype(mx.float32)
    return wrappers


def update(module: Any, matrix: int = 0) -> np.ndarray:
    """ΔW (out, in) of a module of the neutral form, of one expert where it has several; an embedding's is a table."""
    a, b = (array[matrix] if array.ndim == 3 else array for array in (module.a, module.b))
    delta = module.scale * (b @ a)
    return delta.T if module.kind == "embedding" else delta


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("llama", {"targets": "all-linear", "rank": 4, "alpha": 6}),
        ("llama", {"targets": ["q_proj", "embed_tokens"], "rank": 3, "rank_pattern": {"embed_tokens": 5}}),
        ("llama", {"rank": 4, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 3.5}}),
        ("llama", {"rank": 4, "rslora": True}),
        ("llama", {"method": "dora", "rank": 4}),
        ("llama", {"method": "qalora", "rank": 2}),
        ("llama", {"method": "vera", "rank": 8}),
        ("llama", {"method": "ia3"}),
        ("qwen3 experts", {"targets": "all-linear", "rank": 2}),
        ("qwen3 experts", {"method": "dora", "targets": "all-linear", "rank": 2}),
    ],
)
def test_what_is_stored_reads_back_the_same(tmp_path: Path, base: str, settings: dict[str, Any]) -> None:
    model = network(base)
    before = from_wrappers(drawn(model, Adapter.model_validate(settings)))
    shapes = shapes_of(bare_modules(model))
    to_store(before, tmp_path / "out", KNOWN, layers=2, shapes=shapes, force=False)
    after = from_wrappers(wrappers_for(network(base), read(tmp_path / "out")))
    assert after.method == before.method and after.modules.keys() == before.modules.keys()
    for path, module in before.modules.items():
        other = after.modules[path]
        assert (other.kind, other.rank, other.columns) == (module.kind, module.rank, module.columns)
        assert other.extras.keys() == module.extras.keys()
        for name, array in module.extras.items():
            np.testing.assert_array_equal(other.extras[name], array)
        if module.a is not None:
            np.testing.assert_array_equal(other.a, module.a)
            np.testing.assert_allclose(update(other), update(module), rtol=EXACT, atol=1e-7)


@pytest.mark.parametrize("settings", [{"method": "adalora", "rank": 4}, {"rank": 4, "init": "pissa"}])
def test_methods_that_are_lora_once_trained_come_out_as_lora(settings: dict[str, Any]) -> None:
    wrappers = drawn(network("llama"), Adapter.model_validate(settings))
    neutral = from_wrappers(wrappers)
    assert neutral.method == "lora"
    for path, wrapper in wrappers.items():
        np.testing.assert_allclose(update(neutral.modules[path]), np.array(wrapper.delta()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("base", "settings", "rank"),
    [
        ("llama", {"method": "vera", "rank": 6}, 6),
        ("llama", {"method": "qalora", "rank": 2}, 2),
        ("llama", {"method": "adalora", "rank": 4}, 4),
        ("qwen3 experts", {"method": "vera", "rank": 6, "targets": "all-linear"}, 6),
        ("qwen3 experts", {"method": "qalora", "rank": 2, "targets": "all-linear"}, 2),
    ],
)
def test_a_rank_that_holds_the_update_is_exact(base: str, settings: dict[str, Any], rank: int) -> None:
    wrappers = drawn(network(base), Adapter.model_validate(settings))
    neutral, error = as_lora(wrappers, rank)
    assert error == 0.0
    for path, wrapper in wrappers.items():
        delta, module = np.array(wrapper.delta()), neutral.modules[path]
        for index, one in enumerate(delta if delta.ndim == 3 else [delta]):
            np.testing.assert_allclose(update(module, index), one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{"method": "dora", "rank": 4}, {"method": "ia3"}, {"method": "full"}])
def test_the_nearest_lora_loses_the_tail_of_the_singular_values(settings: dict[str, Any]) -> None:
    model = network("llama")
    targets = {"targets": ["q_proj", "down_proj"]}
    wrappers = drawn(model, Adapter.model_validate(settings | targets))
    neutral, error = as_lora(wrappers, 3)
    values = [np.linalg.svd(np.array(w.delta(), np.float64), compute_uv=False) ** 2 for w in wrappers.values()]
    expected = np.sqrt(sum(v[3:].sum() for v in values) / sum(v.sum() for v in values))
    assert error == pytest.approx(expected, rel=1e-3) and error > 0.1
    found = sum(np.square(update(neutral.modules[p]) - np.array(w.delta())).sum() for p, w in wrappers.items())
    assert np.sqrt(found / sum(v.sum() for v in values)) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("settings", [{"method": "prefix"}, {"method": "glora", "rank": 2}, {"method": "bitfit"}])
def test_what_has_no_form_elsewhere_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match="has no form in other formats"):
        from_wrappers(drawn(network("llama"), Adapter.model_validate(settings)))


def test_a_changed_bias_is_refused_as_lora() -> None:
    model = network("llama")
    for layer in model.model.layers:
        layer.self_attn.k_proj["bias"] = mx.ones(32)
    wrappers = drawn(model, Adapter(method="ia3", targets=["k_proj"]))
    with pytest.raises(AdapterError, match=r"k_proj: its bias is changed too"):
        as_lora(wrappers, 4)


def test_an_adapter_for_another_base_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    neutral = from_wrappers(drawn(network("llama"), Adapter(rank=2)))
    shapes = {path: (8, 8) for path in neutral.modules}
    with pytest.raises(AdapterError, match="is for a weight .* the base's is"):
        to_store(neutral, tmp_path / "out", KNOWN, layers=2, shapes=shapes, force=False)
    with pytest.raises(AdapterError, match="the base has no"):
        to_store(Neutral("lora", neutral.modules), tmp_path / "out", KNOWN, layers=2, shapes={}, force=False)
    assert not (tmp_path / "out").exists()


def test_a_negative_scale_goes_into_b_and_an_absurd_one_is_refused() -> None:
    before = from_wrappers(drawn(network("llama"), Adapter(rank=2)))
    path, module = next(iter(before.modules.items()))
    minus = usable(Neutral("lora", {path: replace(module, scale=-2.0)})).modules[path]
    assert minus.scale == 1.0
    np.testing.assert_allclose(update(minus), -2.0 / module.scale * update(module), rtol=1e-5)
    with pytest.raises(AdapterError, match=f"{path}: its update, of scale 1e\\+300, is beyond any"):
        usable(Neutral("lora", {path: replace(module, scale=1e300)}))
