"""The recorded figures: which benchmarks there are, and one JSON file for each with the machine it ran on.

A file holds no path and no name of a host.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.bench import cases
from tests.bench.process import side

# The README begins with what its readers would use instead.
FIRST = ("mlx_lm", "peft")
FOLDER = Path(__file__).parent / "results"
PACKAGES = ("mlx", "mlx-lm", "torch", "peft", "transformers", "numpy")


def names() -> list[str]:
    """The benchmarks, by name."""
    found = (module.name for module in pkgutil.iter_modules(cases.__path__))
    return sorted(found, key=lambda name: (name not in FIRST, name))


def case(name: str) -> Any:
    """The module of a benchmark."""
    return importlib.import_module(f"{cases.__name__}.{name}")


def write(name: str, figures: dict[str, Any], *, quick: bool, renewed: bool = False) -> None:
    """Record what a benchmark measured; `renewed` figures are a part, and the record says how the others were made."""
    record = (
        read()[name] | {"figures": figures}
        if renewed
        else {
            "name": name,
            "command": f"python -m tests.bench {name}{' --quick' if quick else ''}",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "figures": figures,
        }
    )
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def read() -> dict[str, dict[str, Any]]:
    """Every record there is, by name."""
    files = {name: FOLDER / f"{name}.json" for name in names()}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        **side("machine"),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _cpu() -> str:
    """The processor's model, from wherever this system says it."""
    import platform
    import subprocess

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return asked.stdout.strip() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def one_line(name: str, figures: dict[str, Any]) -> str:
    """What a program reads."""
    return json.dumps({"name": name, "figures": figures})
