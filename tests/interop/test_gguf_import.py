"""GGUF adapters into the home: the file that we write for llama.cpp comes back in the last bit, others are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.errors import MlxLoraError
from mlx_lora.interop.gguf.adapter import write_adapter
from mlx_lora.interop.gguf.plan import plan_of
from mlx_lora.interop.neutral import from_wrappers
from mlx_lora.models.open import open_model
from mlx_lora.store import adapter as store
from mlx_lora.tasks.import_adapter import import_adapter
from tests.interop.conftest import logits, wrappers_of

Make = Callable[..., Path]
SETTINGS: dict[str, dict[str, Any]] = {
    "all-linear": {"rank": 4, "alpha": 8, "targets": "all-linear"},
    "patterns": {"rank": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    "embedding": {"rank": 4, "targets": ["embed_tokens", "lm_head", "v_proj"]},
}


def written(path: Path, adapter: Path, file: Path) -> Path:
    return write_adapter(from_wrappers(wrappers_of(path, adapter)), plan_of(open_model(path).config), file)


@pytest.mark.parametrize("case", SETTINGS)
def test_it_comes_back_in_the_last_bit(case: str, make: Make, untied_path: Path, tmp_path: Path) -> None:
    mine = make(untied_path, **SETTINGS[case])
    file = written(untied_path, mine, tmp_path / "a.gguf")
    back = import_adapter(file, "back", str(untied_path))
    assert (back.format, back.method) == ("gguf", "lora")
    before, after = store.read(mine), store.read(back.path)
    assert set(before.manifest.modules) == set(after.manifest.modules) and before.manifest.base == after.manifest.base
    if case == "all-linear":
        for name, array in before.arrays.items():
            assert mx.array_equal(array, after.arrays[name]).item(), name
    np.testing.assert_allclose(logits(untied_path, back.path), logits(untied_path, mine), rtol=1e-5, atol=1e-5)


def test_what_is_no_adapter_for_this_base_is_refused(
    make: Make, untied_path: Path, tiny_path: Path, home: Path, tmp_path: Path
) -> None:
    mine = make(untied_path, rank=4, targets=["lm_head"])
    file = written(untied_path, mine, tmp_path / "a.gguf")
    with pytest.raises(MlxLoraError, match="output"):
        import_adapter(file, "back", str(tiny_path))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(MlxLoraError):
        import_adapter(file, "back", str(untied_path))
    assert [entry.name for entry in (home / "adapters").iterdir()] == ["mine"], "something was written"
