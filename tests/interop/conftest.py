"""Adapters with random values on the tiny model, stored in the home, and directories to damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.adapters.attach import Wrappers, attach, put
from mlx_lora.config import Adapter
from mlx_lora.interop.neutral import from_wrappers
from mlx_lora.interop.peft import write as peft
from mlx_lora.interop.peft.names import Names
from mlx_lora.models.load import load
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.store import adapter as store
from mlx_lora.store import registry
from tests.conftest import write_model

TOKENS = mx.array([[5, 9, 70, 2, 33, 11, 8]])


@pytest.fixture(scope="session")
def untied_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose output head is a layer of its own; tests must not change it."""
    return write_model(tmp_path_factory.mktemp("models") / "untied", tie_word_embeddings=False)


def stored(path: Path, out: Path, **settings: Any) -> Path:
    """An adapter that does something over the model at `path`, as training stores one, in the directory `out`."""
    loaded = load(path)
    config = Adapter(**settings)
    wrappers = attach(loaded.model, config, seed=1)
    for index, wrapper in enumerate(wrappers.values()):
        keys = mx.random.split(mx.random.key(index), 4)
        for key, array in zip(keys, wrapper.adapter_params(), strict=False):
            wrapper[array] = wrapper[array] + 0.2 * mx.random.normal(wrapper[array].shape, key=key)
    manifest = store.Manifest(
        method=config.method, adapter=config.model_dump(), modules=list(wrappers),
        scales={path: wrapper.scale for path, wrapper in wrappers.items()}, base=registry.describe_base(loaded),
    )  # fmt: skip
    return store.save(out, wrappers, manifest, len(layers_of(loaded.model)))


@pytest.fixture
def make(home: Path) -> Callable[..., Path]:
    """`make(model_path, **settings)` stores an adapter that does something as `mine` and returns its directory."""

    def make(path: Path, *, name: str = "mine", **settings: Any) -> Path:
        return stored(path, home / "adapters" / name, **settings)

    return make


@pytest.fixture(scope="session")
def exported(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT directory of rank 4 on the tiny model's attention; tests must not change it."""
    folder = tmp_path_factory.mktemp("exported")
    neutral = from_wrappers(wrappers_of(tiny_path, stored(tiny_path, folder / "mine", rank=4)))
    loaded = load(tiny_path)
    return peft.write(neutral, folder / "peft", Names(loaded.model, loaded.config), base="tiny")


def wrappers_of(path: Path, adapter: Path) -> Wrappers:
    """A stored adapter's wrappers over the model at `path`."""
    return store.wrappers_for(load(path).model, store.read(adapter))


def logits(path: Path, adapter: Path | None) -> Any:
    """What the model at `path` says with the adapter."""
    loaded = load(path)
    if adapter is not None:
        put(loaded.model, store.wrappers_for(loaded.model, store.read(adapter)))
    return np.array(loaded.model(TOKENS).astype(mx.float32))


def change_config(folder: Path, **values: Any) -> None:
    """Set keys of adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_tensors(folder: Path, change: Callable[[dict[str, mx.array]], Any]) -> None:
    """Apply `change` to the tensors of adapter_model.safetensors."""
    file = folder / "adapter_model.safetensors"
    tensors: Any = mx.load(str(file))
    change(tensors)
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors, metadata={"format": "pt"})
