"""The process of one side: `python -m tests.bench.worker SIDE OPTIONS`; the last line it prints is JSON.

OpenBLAS goes in before MLX, for our side and for mlx_lm's alike. torch is hidden from both: transformers would load it
for nothing, and who uses them has no torch installed.
"""

from __future__ import annotations

import importlib.util
import json
import sys


def process_bytes() -> int:
    """The most memory that this process has held, in bytes.

    Linux keeps ru_maxrss across exec, so the parent's would count; VmHWM is this process's alone.
    """
    import resource

    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def hide(package: str) -> None:
    """Make a package look as if it weren't installed."""
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == package else find(name, *rest)


def main() -> None:
    name, options = sys.argv[1], json.loads(sys.argv[2])
    module, _, function = name.partition(".")
    if module != "torch_peft":
        from mlx_lora.machine import blas

        blas.load_blas()
        hide("torch")
    found = getattr(importlib.import_module(f"tests.bench.sides.{module}"), function or "run")(**options)
    if "seconds" in found:
        found["process_bytes"] = process_bytes()
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
