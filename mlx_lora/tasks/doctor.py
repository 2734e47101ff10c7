"""Facts about this machine and this home that decide whether training will go well."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from mlx_lora import __version__, paths
from mlx_lora.machine import blas, facts
from mlx_lora.places.listing import model_names
from mlx_lora.store import registry

PACKAGES = ("mlx", "mlx-lm", "transformers", "numpy")
KINDS = ("models", "adapters", "runs")


@dataclass
class Examination:
    """`facts` by name, `warnings` as sentences, each with what to do."""

    facts: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def examine() -> Examination:
    """Look at device, BLAS, memory, disk, models and adapters. Changes nothing but creating the home.

    `home` is its path and its bytes: of models, of adapters, of runs, and of everything.
    """
    machine = facts.collect()
    home = paths.home()
    disk = shutil.disk_usage(home)
    examination = Examination(
        {
            "version": __version__,
            **machine,
            "packages": versions(),
            "home": {
                "path": str(home),
                **{f"{kind}_bytes": paths.directory_bytes(home / kind) for kind in KINDS},
                "total_bytes": paths.directory_bytes(home),
            },
            "disk_free_bytes": disk.free,
            "models": model_names(),
            "adapters": registry.names(),
        }
    )
    examination.warnings = list(_warnings(machine, disk.free))
    return examination


def versions() -> dict[str, str]:
    """The packages whose version decides what is computed."""
    return {name: version(name) for name in PACKAGES}


def _warnings(machine: dict[str, Any], free: int) -> list[str]:
    found = []
    if machine["openblas"] is False:
        found.append(f"OpenBLAS is not loaded, training is about 70 times slower: {blas.BLAS_HINT}")
    if not machine["compiled_kernels"]:
        found.append("no C++ compiler, MLX's CPU backend can't fuse kernels: apt-get install g++")
    if machine["available_bytes"] < 2 << 30:
        found.append("less than 2 GB of memory is available: close other programs before training")
    if free < 5 << 30:
        found.append("less than 5 GB of disk is free")
    return found
