"""`adapters blend`: a scaled update is exactly that, per method, and auto keeps most of the gain within a bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.adapters.attach import build, put
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError
from mlx_lora.models.load import LoadedModel
from mlx_lora.store import adapter as store
from mlx_lora.store.adapter import Manifest, wrappers_for
from mlx_lora.study.drift import Moved
from mlx_lora.study.statistics import Difference
from mlx_lora.tasks.blend import blend, choose, search
from tests.cli.conftest import Ran

Run = Callable[..., Ran]
PATTERNS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}}


def stored(home: Path, model: LoadedModel, name: str, **settings: Any) -> None:
    """An adapter with random arrays in the home."""
    config = Adapter(**settings)
    wrappers, draw = build(model.model, config), np.random.default_rng(1)
    for wrapper in wrappers.values():
        for key in wrapper.adapter_params():
            wrapper[key] = mx.array(draw.normal(0, 0.2, wrapper[key].shape)).astype(mx.bfloat16).astype(mx.float32)
    manifest = Manifest(
        method=config.method, adapter=config.model_dump(), modules=list(wrappers),
        scales={path: wrapper.scale for path, wrapper in wrappers.items()},
    )  # fmt: skip
    store.save(home / "adapters" / name, wrappers, manifest, 3)


def deltas(model: LoadedModel, folder: Path) -> dict[str, np.ndarray]:
    wrappers = wrappers_for(model.model, store.read(folder))
    return {path: np.array(wrapper.delta()) for path, wrapper in wrappers.items()}


@pytest.mark.parametrize(
    "settings", [{"rank": 4}, {"rank": 4, **PATTERNS}, {"method": "adalora", "rank": 4}, {"method": "vera", "rank": 8}]
)
def test_the_update_is_scaled_and_nothing_else(home: Path, tiny: LoadedModel, settings: dict[str, Any]) -> None:
    stored(home, tiny, "mine", **settings)
    blend("mine", 0.3, "third")
    before, after = (deltas(tiny, home / "adapters" / name) for name in ("mine", "third"))
    assert before.keys() == after.keys()
    for path, delta in before.items():
        np.testing.assert_allclose(after[path], 0.3 * delta, rtol=1e-5, atol=1e-6 * np.abs(delta).max())
    manifest = store.read(home / "adapters" / "third").manifest
    assert manifest.parents == ["mine:0.3"] and manifest.metrics["blend"]["scale"] == 0.3
    if settings.get("method") != "vera":
        old, new = (store.read(home / "adapters" / name).arrays for name in ("mine", "third"))
        assert all((old[key] == new[key]).all().item() for key in old), "the arrays are the very same"


def test_a_scaled_bias_shifts_that_much(home: Path, tiny: LoadedModel) -> None:
    stored(home, tiny, "mine", method="bitfit")
    blend("mine", 0.5, "half")
    old, new = (store.read(home / "adapters" / name).arrays for name in ("mine", "half"))
    assert old.keys() == new.keys() and len(old) > 3
    for key in old:
        assert mx.allclose(new[key], 0.5 * old[key].astype(mx.float32), rtol=1e-6).item()


@pytest.mark.parametrize("method", ["dora", "ia3", "prefix", "prompt", "bottleneck", "glora", "lora+prefix"])
def test_what_is_not_additive_is_refused_by_name(home: Path, tiny: LoadedModel, method: str) -> None:
    stored(home, tiny, "mine", method=method)
    with pytest.raises(AdapterError, match=rf"mine is of method {method.replace('+', '.')}: .*can be scaled"):
        blend("mine", 0.5, "half")
    assert not (home / "adapters" / "half").exists()


def test_a_scale_leads_from_the_base_to_the_adapter(home: Path, tiny: LoadedModel) -> None:
    stored(home, tiny, "mine", rank=4)
    tokens, said = mx.array([[1, 2, 3, 4, 5]]), {}
    for name, scale in (("whole", 1.0), ("little", 1e-4)):
        blend("mine", scale, name)
    for name in ("mine", "whole", "little"):
        put(tiny.model, wrappers_for(tiny.model, store.read(home / "adapters" / name)))
        said[name] = np.array(tiny.model(tokens))
    put(tiny.model, {})
    np.testing.assert_array_equal(said["whole"], said["mine"])
    np.testing.assert_allclose(said["little"], np.array(tiny.model(tokens)), atol=2e-2)
    assert np.abs(said["mine"] - said["little"]).max() > 0.5


def looked(scale: float) -> tuple[Moved, Moved]:
    """A task that is learned at half the scale already, and drift that grows with the square of it."""
    none = Difference(0.0, (0.0, 0.0), 1.0, "permutation", 0.0, 10)
    loss = 2.0 - 1.6 * min(2 * scale, 1.0) + 0.1 * max(scale - 0.5, 0)
    return Moved(scale, 2.0, loss, none), Moved(scale**2, 1.0, 1.0 + scale, none)


def test_auto_keeps_most_of_the_gain_at_the_smallest_scale() -> None:
    seen: list[float] = []
    tried, base = search(lambda scale: (seen.append(scale), looked(scale))[1], None)
    best = choose(tried, None)
    assert base == (2.0, 1.0) and [one.scale for one in tried] == sorted({0.2, 0.4, 0.5, 0.6, 0.8, 1.0})
    assert best.scale == 0.5 and best.kept >= 0.9 and len(seen) == len(set(seen)) == 6
    assert [one.kept for one in tried if one.scale < best.scale] == pytest.approx([0.41290, 0.82581], abs=1e-4)


def test_auto_takes_the_best_within_the_bound() -> None:
    tried, _ = search(looked, 0.2)
    best = choose(tried, 0.2)
    assert best.scale == 0.4 and best.kl_general == pytest.approx(0.16)
    assert choose(search(looked, 0.1)[0], 0.1).scale == 0.3, "between two that were tried"
    with pytest.raises(AdapterError, match="no scale is within 0.001 nats of the base: 0.1"):
        choose(search(lambda scale: looked(scale), 0.001)[0], 0.001)


def test_an_adapter_that_gains_nothing_is_not_blended() -> None:
    none = looked(1.0)[0].difference
    with pytest.raises(AdapterError, match="gains nothing"):
        search(lambda scale: (Moved(0.1, 2.0, 2.5, none), None), None)


def test_a_gain_that_may_be_chance_is_said() -> None:
    said: list[str] = []
    search(looked, None, said.append)
    assert len(said) == 1 and "gain of 1.55 nats on so few rows (10)" in said[0]
    sure = Difference(-1.55, (-1.8, -1.3), 0.001, "permutation", 0.3, 60)
    search(lambda scale: (replace(looked(scale)[0], difference=sure), None), None, said.append)
    assert len(said) == 1


def test_the_command(run: Run, trained: Ran, home: Path, tiny: LoadedModel, tiny_path: Path, data: Path) -> None:
    half = run("adapters", "blend", "mine", "--scale", 0.5, "--name", "half", "--json")
    assert half.code == 0 and half.json["scale"] == 0.5
    assert run("adapters", "verify", "half", "--model", tiny_path).code == 0
    whole, scaled = (deltas(tiny, home / "adapters" / name) for name in ("mine", "half"))
    for path, delta in whole.items():
        np.testing.assert_allclose(scaled[path], delta / 2, rtol=1e-5, atol=1e-8)
    assert "exists" in run("adapters", "blend", "mine", "--scale", 0.5, "--name", "half").err
    auto = run(
        "adapters", "blend", "mine", "--scale", "auto", "--name", "auto", "--model", tiny_path, "--data", data,
        "--forget", "none",
    )  # fmt: skip
    assert auto.code == 0 and "chosen" in auto.out and "0 (base)" in auto.out, auto.err
    learned = run(
        "adapters", "blend", "mine", "--scale", "auto", "--name", "learned", "--data", data / "train.jsonl",
        "--forget", "none",
    )  # fmt: skip
    assert learned.code == 0 and "holds the rows that mine learned" in learned.err
    for words, said, code in (
        (("--scale", "auto"), "name them with --data", 1),
        (("--scale", "much"), "a number or auto", 2),
        (("--scale", "-1"), "is not above 0", 1),
        (("--scale", "0.5", "--data", data, "--max-drift", "1"), "--data and --max-drift would change nothing", 1),
        (("--scale", "auto", "--data", data, "--forget", "none", "--max-drift", "1"), "--forget", 1),
    ):
        ran = run("adapters", "blend", "mine", "--name", "other", *words)
        assert (ran.code, said in ran.err) == (code, True), (words, ran.err)
