"""Memory that nobody planned: `fuse` held two bases, `quantize --verify` up to three. Real processes, large layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench.process import side

pytestmark = pytest.mark.real
LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 8, 2048, 5504, 32000
# Bytes in float32, in which a processor computes.
LAYER = 4 * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
HEAD = 4 * VOCABULARY * HIDDEN
# What the allocator, the blocks of rows that MLX prepares ahead, and the states of a short row take.
SMALL = 400e6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The float16 source of 1.1 GB, and what a process takes that reads no weight of it."""
    folder = tmp_path_factory.mktemp("large")
    source = str(folder / "source")
    side("memory_7b.write", folder=source, layers=LAYERS, hidden=HIDDEN, intermediate=INTERMEDIATE)
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"text": "The river had risen above the lower meadow."}) + "\n")
    nothing = side("memory_7b.nothing", model=source)["process_bytes"]
    packed = side("memory_7b.quantize", model=source, out=str(folder / "packed"), verify=str(rows))
    return {"folder": folder, "rows": str(rows), "nothing": nothing, "packed": packed}


def test_quantize_with_its_comparison_holds_the_result_or_one_layer_of_the_source(made: dict[str, Any]) -> None:
    packed = made["packed"]
    alive = max(packed["result_bytes"], HEAD) + LAYER
    assert packed["process_bytes"] - made["nothing"] <= alive + SMALL


def test_fuse_with_its_comparison_holds_one_model_and_one_layer(made: dict[str, Any]) -> None:
    folder: Path = made["folder"]
    model, adapter = str(folder / "packed"), str(folder / "adapter")
    side("memory_7b.adapter", model=model, folder=adapter)
    fused = side("memory_7b.fuse", model=model, adapter=adapter, out=str(folder / "fused"), data=made["rows"])
    assert fused["process_bytes"] - made["nothing"] <= fused["result_bytes"] + LAYER + SMALL
