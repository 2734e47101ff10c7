"""Our side alone: what it costs at the start of a run to compare every way of running a model with the model itself."""

from __future__ import annotations

import time
from typing import Any

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.models.load import load
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.packing import packing_refused
from mlx_lora.models.trunk.verify import take_apart, verify


def run(*, model: str, steps: int) -> dict[str, Any]:
    """Seconds to take a model apart, to verify its parts, and to try packing, after one warm-up."""
    network = load(model).model
    attach(network, Adapter())
    found: dict[str, list[float]] = {"take_apart": [], "seconds": [], "packing": []}
    for step in range(steps + 1):
        marks = [time.perf_counter()]
        trunk = take_apart(network)
        marks.append(time.perf_counter())
        assert not verify(trunk, recompute=True, columns=True).notes
        marks.append(time.perf_counter())
        assert packing_refused(trunk) is None
        marks.append(time.perf_counter())
        if step:
            for name, before, after in zip(found, marks, marks[1:], strict=False):
                found[name].append(after - before)
    return {**found, "layers": len(layers_of(network))}
