"""Formats that llama.cpp makes itself: by its program `llama-quantize`, or by its library from a Python package.

The library runs in a process of its own, since it aborts on what it doesn't take.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from mlx_lora.errors import ModelError
from mlx_lora.interop.gguf.types import Form

PROGRAM = "llama-quantize"
# Python packages with llama.cpp's library inside, by the folder that it is in.
PACKAGES = {"llama_cpp_py_sync": "", "llama_cpp": "lib"}
LIBRARIES = ("libllama.so", "libllama.dylib")


def tool() -> Path | None:
    """What can quantize here: the program, else the library of an installed package, else None."""
    if found := shutil.which(PROGRAM):
        return Path(found)
    for package, folder in PACKAGES.items():
        spec = find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec is not None else ():
            for name in LIBRARIES:
                if (library := Path(root) / folder / name).is_file():
                    return library
    return None


def check(form: Form) -> None:
    """Raise ModelError where `form` needs llama.cpp and there is none to make it."""
    if form.by_llama_cpp and tool() is None:
        raise ModelError(
            f"GGUF type {form.name} is made by llama.cpp itself, and there is no {PROGRAM} on PATH",
            hint="install llama.cpp, or `pip install llama-cpp-py-sync`; --type q8_0 and q4_1 need neither",
        )


def quantize(source: Path, out: Path, form: Form) -> None:
    """Write the GGUF model `source` in f16 as `out` in `form`. Raises ModelError with what llama.cpp said."""
    found = tool()
    assert found is not None
    if found.name == PROGRAM:
        words = [str(found), str(source), str(out), form.name.upper()]
    else:
        script = Path(__file__).with_name("quantize_worker.py")
        words = [sys.executable, "-I", str(script), str(found), str(source), str(out), str(int(form.file_type))]
    done = subprocess.run(words, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode or not out.is_file():
        lines = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
        said = next((line for line in lines if "error" in line.lower() or "fail" in line.lower()), (lines or ["?"])[-1])
        raise ModelError(f"llama.cpp can't make {form.name} of it: {said.strip()[:300]}")
