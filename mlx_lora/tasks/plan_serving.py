"""How many requests a base can answer at once on this machine or another, before a weight is loaded."""

from __future__ import annotations

from mlx_lora.errors import ModelError
from mlx_lora.machine import device, limits
from mlx_lora.models.open import open_model
from mlx_lora.models.shapes import network, summary
from mlx_lora.serve import memory


def plan_serving(
    model: str | None, *, memory_gb: float | None = None, gpu: bool | None = None, kv_bits: int | None = None
) -> memory.ServingPlan:
    """The plan for this machine, or one with `memory_gb` gigabytes; for its device, or a GPU or a processor.

    Raises ModelError without a model, for an architecture that isn't known, and where its caches can't have `kv_bits`.
    """
    if model is None:
        raise ModelError("no model is named", hint="--model MODEL")
    gpu = device.on_gpu() if gpu is None else gpu
    shapes = network(summary(open_model(model)), gpu=gpu)
    limit = limits.limit_bytes(memory_gb=memory_gb)
    return memory.plan(shapes, base=memory.base_bytes(shapes, limit, gpu=gpu), limit=limit, kv_bits=kv_bits)
