"""Peak memory of `quantize` (with its measurement) and of `fuse` (mixed, with its comparison) on LLaMA-7B's shape.

`python -m tests.bench memory_7b --quick` does it with two of the 32 layers. The whole shape needs 24 GB of disk.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import line, side

# What the fused model is compared on.
TEXTS = ("The river had risen above the lower meadow.", "Nobody had seen the miller since the first snow.") * 4
# Weights of one layer, and of the embedding or the head: 4 · 4096² + 3 · 4096 · 11008, and 32000 · 4096.
LAYER, END = 4 * 4096**2 + 3 * 4096 * 11008, 32000 * 4096


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Figures by command. The home is a folder of the benchmark's own."""
    layers = 2 if quick else 32
    cache = Path(os.environ.get("MLX_LORA_TEST_CACHE", "~/.cache/mlx-lora-tests")).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="memory-7b-", dir=cache) as name:
        folder = Path(name)
        os.environ["MLX_LORA_HOME"] = str(folder / "home")
        source, packed, fused, adapter = (str(folder / word) for word in ("source", "packed", "fused", "adapter"))
        found: dict[str, Any] = {"layers": layers}
        found["source"] = side("memory_7b.write", folder=source, layers=layers)
        found["nothing"] = side("memory_7b.nothing", model=source)
        found["quantize"] = side("memory_7b.quantize", model=source, out=packed)
        print(f"  quantize: {line(found['quantize'])}", flush=True)
        side("memory_7b.adapter", model=packed, folder=adapter)
        rows = folder / "rows.jsonl"  # text that the model would generate itself takes an hour on a processor
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        found["fuse"] = side("memory_7b.fuse", model=packed, adapter=adapter, out=fused, data=str(rows))
        print(f"  fuse: {line(found['fuse'])}", flush=True)
    return found


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    packed = figures["quantize"]["result_bytes"]
    # What has to be alive at the peak, beside one layer: the model that runs whole.
    alive = {"quantize": packed, "fuse": figures["fuse"]["result_bytes"]}
    rows = [
        [command, *(value / 1e9 for value in (run["process_bytes"], figures["nothing"]["process_bytes"],
         alive[command], packed)), run["seconds"][0], run["kl"]]
        for command, run in figures.items() if command in alive
    ]  # fmt: skip
    title = (
        f"Peak memory of the process on LLaMA-7B's shape, {figures['layers']} layers, random weights: a float16 source "
        f"of {figures['source']['bytes'] / 1e9:.1f} GB is quantized to 4 bits and measured, an adapter is fused into "
        f"the result and compared. One layer is {LAYER * 4 / 1e9:.2f} GB in float32, which a processor computes in, "
        f"the head of the source {END * 4 / 1e9:.2f} GB."
    )
    header = ["command", "peak GB", "of it without weights", "the model that runs", "packed base GB", "s", "KL"]
    return [(title, header, rows)]
