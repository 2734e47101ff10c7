"""VeRA's frozen pair in an adapter's file: read where it is, refused where it doesn't fit, else drawn from the seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError
from mlx_lora.models.load import LoadedModel
from mlx_lora.store.adapter import Manifest, read, wrappers_for, write

RANK = 8
# The tiny model's q_proj is (64, 64) and its down_proj (64, 128).
PAIR = {"vera_A": (RANK, 128), "vera_B": (64, RANK)}


def pair(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: np.full(shape, 0.5, np.float32) for name, shape in (PAIR | shapes).items()}


def written(tiny: LoadedModel, out: Path, shared: dict[str, Any], *, method: str = "vera") -> Path:
    config = Adapter(method=method, rank=RANK, targets=["q_proj", "down_proj"])
    wrappers = attach(tiny.model, config)
    scales = {path: wrapper.scale for path, wrapper in wrappers.items()}
    manifest = Manifest(method=method, adapter=config.model_dump(), modules=list(wrappers), scales=scales)
    stored = {path: wrapper.stored_arrays() for path, wrapper in wrappers.items()}
    return write(out, stored, scales, manifest, 3, shared=shared)


def test_the_pair_of_the_file_is_used_and_is_one_for_all(tiny: LoadedModel, tmp_path: Path) -> None:
    adapter = written(tiny, tmp_path / "a", pair(vera_A=(RANK, 200)))
    wrappers = list(wrappers_for(tiny.model, read(adapter)).values())
    assert len({id(array) for wrapper in wrappers for array in wrapper._pair}) == 2
    for wrapper in wrappers:
        a, b = wrapper.projections()
        assert a.shape == (wrapper.base.weight.shape[1], RANK) and b.shape == (64, RANK)
        assert (a == 0.5).all().item() and (b == 0.5).all().item()


def test_without_one_it_is_drawn_from_the_seed(tiny: LoadedModel, tmp_path: Path) -> None:
    adapter = written(tiny, tmp_path / "a", {})
    first, second = (next(iter(wrappers_for(tiny.model, read(adapter)).values())) for _ in range(2))
    assert mx.array_equal(first._pair[0], second._pair[0]).item() and first._pair[0].shape == (128, RANK)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": (pair(vera_A=(RANK + 1, 128)), "vera_A has shape (9, 128), the base needs (8, 128)"),
    "inputs": (pair(vera_A=(RANK, 127)), "vera_A has shape (8, 127)"),
    "outputs": (pair(vera_B=(63, RANK)), "vera_B has shape (63, 8)"),
    "one dimension": (pair(vera_B=(512,)), "vera_B has shape (512,)"),
    "half": ({"vera_A": pair()["vera_A"]}, "vera_B is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_pair_that_doesnt_fit_is_refused(case: str, tiny: LoadedModel, tmp_path: Path) -> None:
    shared, message = REFUSED[case]
    adapter = written(tiny, tmp_path / "a", shared)
    with pytest.raises(AdapterError) as caught:
        wrappers_for(tiny.model, read(adapter))
    assert message in caught.value.message


def test_a_pair_is_no_part_of_another_method(tiny: LoadedModel, tmp_path: Path) -> None:
    adapter = written(tiny, tmp_path / "a", pair(), method="lora")
    with pytest.raises(AdapterError, match="vera_A is not part of this method"):
        wrappers_for(tiny.model, read(adapter))
