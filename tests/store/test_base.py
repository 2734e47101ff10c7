"""An adapter's base, found on this disk by its name or where its fingerprint was seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_lora import paths
from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter, Quantize
from mlx_lora.errors import AdapterError, ModelError
from mlx_lora.models.load import load_stored, ready
from mlx_lora.models.save import save as save_model
from mlx_lora.store import registry
from mlx_lora.store.adapter import MANIFEST, Manifest, StoredAdapter, read, save
from mlx_lora.store.base import base_for
from tests.conftest import write_model

Train = Callable[..., StoredAdapter]


@pytest.fixture
def train() -> Train:
    """`train(name, base, quantization=…)` stores an adapter over a base, as training does."""

    def train(name: str, base: Path, *, quantization: Quantize | None = None) -> StoredAdapter:
        loaded = load_stored(base, quantization=quantization)
        described = registry.describe_base(loaded)
        wrappers = attach(ready(loaded).model, config := Adapter(rank=2))
        manifest = Manifest(
            method="lora", adapter=config.model_dump(), modules=list(wrappers), scales=dict.fromkeys(wrappers, 8.0),
            base=described,
        )  # fmt: skip
        return read(save(paths.room("adapters", name), wrappers, manifest, layers=3))

    return train


def test_the_place_where_it_was_trained_is_remembered_and_not_in_the_manifest(train: Train, tmp_path: Path) -> None:
    base = write_model(tmp_path / "somewhere")
    mine = train("mine", base)
    assert base_for(None, [mine]).path == base
    assert str(tmp_path) not in (mine.path / MANIFEST).read_text()


def test_the_homes_model_of_its_name_comes_first(train: Train, tmp_path: Path, home: Path) -> None:
    mine = train("mine", base := write_model(tmp_path / "base"))
    named = Path(shutil.copytree(base, home / "models" / "base"))
    assert base_for(None, [mine]).path == named
    shutil.rmtree(base)
    assert base_for(None, [mine]).path == named


def test_another_model_of_its_name_is_passed_over(train: Train, tmp_path: Path, home: Path) -> None:
    mine = train("mine", base := write_model(tmp_path / "base"))
    write_model(home / "models" / "base", seed=1)
    assert base_for(None, [mine]).path == base
    shutil.rmtree(base)
    with pytest.raises(AdapterError) as refused:
        base_for(None, [mine])
    assert "mine was trained over base" in refused.value.message
    assert f"{home / 'models' / 'base'} holds another model" in refused.value.message
    assert f"{base} is gone" in refused.value.message
    assert "--model MODEL" in str(refused.value.hint)


def test_its_source_or_the_same_packed_tensors_serve_a_base_packed_on_loading(train: Train, tmp_path: Path) -> None:
    packing = Quantize(bits=4, group_size=32)
    mine = train("mine", base := write_model(tmp_path / "base"), quantization=packing)
    opened = base_for(None, [mine])
    assert opened.path == base and registry.open_stored(opened, [mine]).quantized is not None
    save_model(load_stored(base, quantization=packing), tmp_path / "packed")
    other = train("other", tmp_path / "packed")
    shutil.rmtree(base)
    assert base_for(None, [mine, other]).path == tmp_path / "packed"


def test_a_repository_in_the_hubs_cache_is_found_by_its_name(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = write_model(tmp_path / "hub" / "models--owner--tiny" / "snapshots" / "0123")
    mine = train("mine", snapshot)
    (paths.home() / "fingerprints.json").unlink()
    assert base_for(None, [mine]).path == snapshot
    shutil.rmtree(snapshot)
    with pytest.raises(AdapterError, match="no model 'owner/tiny'") as refused:
        base_for(None, [mine])
    assert "mlx-lora pull owner/tiny" in str(refused.value.hint)


def test_a_model_that_is_named_wins(train: Train, tmp_path: Path) -> None:
    mine = train("mine", write_model(tmp_path / "base"))
    other = write_model(tmp_path / "other", seed=1)
    assert base_for(str(other), [mine]).path == other
    with pytest.raises(AdapterError, match="another base"):
        registry.open_base(base_for(str(other), [mine]), [mine])


def test_adapters_of_two_bases_are_refused_with_both_names(train: Train, tmp_path: Path) -> None:
    mine, yours = (train(name, write_model(tmp_path / f"b-{name}", seed=seed)) for seed, name in enumerate("my"))
    with pytest.raises(AdapterError, match="m over b-m .*y over b-y "):
        base_for(None, [mine, yours])


def test_without_model_and_without_a_base_to_know_it_is_asked_for(train: Train, tmp_path: Path) -> None:
    theirs = train("theirs", write_model(tmp_path / "base"))
    values = json.loads((theirs.path / MANIFEST).read_text())
    (theirs.path / MANIFEST).write_text(json.dumps(values | {"base": None}))
    with pytest.raises(AdapterError, match="theirs doesn't say which base"):
        base_for(None, [read(theirs.path)])
    with pytest.raises(ModelError, match="no model is named"):
        base_for(None, [])


def test_a_base_name_that_is_a_path_leads_nowhere(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest may come from anybody."""
    monkeypatch.chdir(tmp_path)
    theirs = train("theirs", base := write_model(tmp_path / "base"))
    (paths.home() / "fingerprints.json").unlink()
    values = json.loads((theirs.path / MANIFEST).read_text())
    for name in (str(base), "./base", "../base", "base"):
        values["base"]["name"] = name
        (theirs.path / MANIFEST).write_text(json.dumps(values))
        with pytest.raises(AdapterError, match="not found"):
            base_for(None, [read(theirs.path)])


def test_no_two_adapters_have_one_label(train: Train, tmp_path: Path) -> None:
    mine = train("mine", write_model(tmp_path / "base"))
    for elsewhere in (tmp_path / "x" / "mine", tmp_path / "with spaces"):
        shutil.copytree(mine.path, elsewhere)
        assert registry.label(elsewhere) == str(elsewhere) != registry.label(mine.path) == "mine"
        assert registry.find(registry.label(elsewhere)) == elsewhere
