"""What only a process with MLX in it knows about the machine."""

from __future__ import annotations

from typing import Any


def run() -> dict[str, Any]:
    from mlx_lora.machine import facts

    facts = facts.collect()
    return {key: facts[key] for key in ("device", "openblas", "compiled_kernels")}
