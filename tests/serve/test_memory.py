"""What serving takes: rows by their shapes, against what caches hold after a pass, on every architecture."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_lora.models.load import load
from mlx_lora.serve import memory
from mlx_lora.serve.service import open_service
from tests.models.tiny import mixed, plain
from tests.models.tiny.build import build

CONFIGS = {**plain.CONFIGS, **mixed.CONFIGS}
TOKENS = 512
QUICK = ("llama", "gemma2", "deepseek_v3", "nemotron_h")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.real) for name in CONFIGS]
)
def test_a_row_takes_no_more_than_is_said_and_hardly_less(family: str) -> None:
    model = build(family, CONFIGS[family])
    cache = make_prompt_cache(model)
    for start in range(0, TOKENS, 64):
        model(mx.full((1, 64), start // 64 + 1), cache=cache)
        mx.eval([layer.state for layer in cache])
    layers = [part for layer in cache for part in getattr(layer, "caches", [layer])]
    held = sum(
        array.nbytes for layer in layers for _, array in tree_flatten(layer.state) if isinstance(array, mx.array)
    )
    windows = any(getattr(layer, "max_size", None) or getattr(layer, "chunk_size", None) for layer in layers)
    assert held <= memory.row_bytes(model, TOKENS) <= (4 if windows else 1.01) * held


def test_nothing_is_evaluated_to_know_it(tiny_path: Path) -> None:
    model = load(tiny_path).model
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    memory.row_bytes(model, TOKENS)
    assert mx.get_peak_memory() - before < 20_000, "a pass takes more"


def test_memory_is_shared_and_never_more_than_there_is(tiny_path: Path) -> None:
    model = load(tiny_path).model
    row = memory.row_bytes(model, memory.ROW_TOKENS)
    wide = memory.plan(model, base=1 << 20, limit=1 << 34)
    assert wide.fits and wide.rows == memory.MOST_ROWS and wide.prompts < 4 << 30 and wide.peak <= wide.limit
    narrow = memory.plan(model, base=1 << 20, limit=(1 << 20) + 7 * row)
    assert narrow.fits and narrow.rows == 3 and narrow.limits.rows == 3
    assert narrow.limits.prompt_cache_bytes == narrow.parts["prompt_cache"] > 0
    assert not memory.plan(model, base=1 << 20, limit=1 << 20).fits


def test_a_service_keeps_to_what_the_machine_has(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = memory.plan(load(tiny_path).model, base=0, limit=1 << 24).limits
    monkeypatch.setattr("mlx_lora.machine.limits.limit_bytes", lambda: mx.get_active_memory() + (1 << 24))
    with open_service(str(tiny_path)) as service:
        assert service.scheduler.limits.rows == limits.rows
        assert service.scheduler.limits.adapter_bytes == pytest.approx(limits.adapter_bytes, rel=0.01)
