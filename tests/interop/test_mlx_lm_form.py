"""mlx-lm's form of an adapter: unmodified mlx_lm says the same with ours, and its old configurations are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

from mlx_lora.errors import AdapterError
from mlx_lora.store import adapter as store
from mlx_lora.tasks.export_adapter import export_adapter
from mlx_lora.tasks.import_adapter import import_adapter
from tests.interop.conftest import TOKENS, logits

Make = Callable[..., Path]
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "patterns": {"rank": 4, "rank_pattern": {"q_proj": 2, "v_proj": 8}, "alpha_pattern": {"k_proj": 3}},
    "embedding": {"rank": 4, "targets": ["embed_tokens", "lm_head", "v_proj"]},
    "dora": {"method": "dora", "rank": 4, "targets": "all-linear"},
}


def mlx_lm_says(path: Path, adapter: Path) -> Any:
    model, _ = mlx_lm.utils.load(str(path), adapter_path=str(adapter))
    return np.array(model(TOKENS).astype(mx.float32))


@pytest.mark.parametrize("case", SETTINGS)
def test_mlx_lm_loads_what_is_written_and_it_comes_back(
    case: str, make: Make, untied_path: Path, home: Path, tmp_path: Path
) -> None:
    mine = make(untied_path, **SETTINGS[case])
    exported = export_adapter("mine", "mlx-lm", tmp_path / "out", model=str(untied_path))
    beside = {"README.md", "export.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {store.CONFIG, store.WEIGHTS, *beside}
    expected = logits(untied_path, mine)
    assert exported.relative_error == 0 and np.abs(expected - logits(untied_path, None)).max() > 0.1
    np.testing.assert_allclose(mlx_lm_says(untied_path, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    back = import_adapter(tmp_path / "out", "back", str(untied_path))
    np.testing.assert_allclose(logits(untied_path, back.path), expected, rtol=1e-5, atol=1e-5)
    before, after = store.read(mine), store.read(back.path)
    assert after.manifest.base == before.manifest.base and set(after.manifest.modules) == set(before.manifest.modules)


NEAREST: dict[str, tuple[dict[str, Any], int, float]] = {
    "vera": ({"method": "vera", "rank": 8, "targets": ["q_proj", "down_proj"]}, 8, 0.0),
    "qalora": ({"method": "qalora", "rank": 2, "targets": "all-linear"}, 2, 0.0),
    "dora": ({"method": "dora", "rank": 4}, 4, 1.0),
}


@pytest.mark.parametrize("case", NEAREST)
def test_as_lora_writes_the_nearest_lora_and_its_error(
    case: str, make: Make, untied_path: Path, home: Path, tmp_path: Path
) -> None:
    settings, rank, most = NEAREST[case]
    mine = make(untied_path, **settings)
    if case != "dora":
        with pytest.raises(AdapterError, match=f"mlx-lm has no {case}"):
            export_adapter("mine", "mlx-lm", tmp_path / "out", model=str(untied_path))
        assert not (tmp_path / "out").exists()
    exported = export_adapter("mine", "mlx-lm", tmp_path / "out", model=str(untied_path), rank=rank)
    assert exported.method == "lora" and exported.rank == rank
    said = mlx_lm_says(untied_path, tmp_path / "out")
    if most:
        assert 0 < exported.relative_error < most
    else:
        assert exported.relative_error == 0
        np.testing.assert_allclose(said, logits(untied_path, mine), rtol=1e-4, atol=1e-4)


def older(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the configuration of an exported directory as an older mlx-lm did."""
    config = json.loads((folder / store.CONFIG).read_text())
    config.pop("alpha")
    config["lora_parameters"].pop("alpha")
    change(config)
    (folder / store.CONFIG).write_text(json.dumps(config))


OLD: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "2025": ("lora", lambda config: config.update(optimizer="adam", iters=100, wandb=None)),
    "alpha that is ignored": (
        "lora", lambda config: (config.update(optimizer="adam"), config["lora_parameters"].update(alpha=99.0)),
    ),
    "2024: alpha": (  # scale was 4 = 0.5 · 32 / 4
        "lora", lambda config: config["lora_parameters"].update(scale=0.5, alpha=32.0),
    ),
    "lora_layers": (
        "lora", lambda config: (config.update(lora_layers=config.pop("num_layers")), config.pop("fine_tune_type")),
    ),
    "use_dora": (
        "dora",
        lambda config: (
            config.update(lora_layers=config.pop("num_layers"), use_dora=True), config.pop("fine_tune_type"),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OLD)
def test_older_configurations_are_read(case: str, make: Make, tiny_path: Path, home: Path, tmp_path: Path) -> None:
    method, change = OLD[case]
    mine = make(tiny_path, method=method, rank=4, alpha=16)
    export_adapter("mine", "mlx-lm", tmp_path / "out", model=str(tiny_path))
    older(tmp_path / "out", change)
    back = import_adapter(tmp_path / "out", "back", str(tiny_path))
    np.testing.assert_allclose(logits(tiny_path, back.path), logits(tiny_path, mine), rtol=1e-5, atol=1e-5)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "full": (lambda folder: older(folder, lambda config: config.update(fine_tune_type="full")), "'full' is not supp"),
    "no rank": (lambda folder: older(folder, lambda config: config["lora_parameters"].pop("rank")), "no usable rank"),
    "ours": (lambda folder: (folder / store.MANIFEST).write_text("{}"), "is an adapter of mlx-lora already"),
    "no weights": (lambda folder: (folder / store.WEIGHTS).unlink(), "adapters.safetensors"),
    "pickle": (lambda folder: (folder / store.WEIGHTS).rename(folder / "adapters.npz"), "adapters.safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cant_be_used_is_refused(case: str, make: Make, tiny_path: Path, home: Path, tmp_path: Path) -> None:
    damage, message = REFUSED[case]
    make(tiny_path, rank=4)
    export_adapter("mine", "mlx-lm", tmp_path / "out", model=str(tiny_path))
    damage(tmp_path / "out")
    with pytest.raises(AdapterError) as caught:
        import_adapter(tmp_path / "out", "back", str(tiny_path))
    assert message in caught.value.message
    assert [entry.name for entry in (home / "adapters").iterdir()] == ["mine"], "something was written"


def test_another_base_is_refused(make: Make, tiny_path: Path, untied_path: Path, home: Path, tmp_path: Path) -> None:
    make(untied_path, rank=4, targets=["lm_head"])
    export_adapter("mine", "mlx-lm", tmp_path / "out", model=str(untied_path))
    with pytest.raises(AdapterError, match="lm_head"):
        import_adapter(tmp_path / "out", "back", str(tiny_path))
