"""The device: its dtype, the BLAS under it, and limits that are put back."""

from __future__ import annotations

import ctypes.util
import resource
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_lora import device

FOUND = bool(ctypes.util.find_library("openblas"))


@pytest.mark.skipif(not sys.platform.startswith("linux") or not FOUND, reason="no OpenBLAS on this machine")
@pytest.mark.parametrize(("before", "loaded"), [("", True), ("import mlx.core; ", False)], ids=["in time", "too late"])
def test_openblas_is_loaded_before_mlx_or_not_at_all(before: str, loaded: bool) -> None:
    code = (
        f"{before}from mlx_lora import device; print(device.load_blas()); import mlx.core; print(device.blas_loaded())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ([device.BLAS_LIBRARY, "True"] if loaded else ["None", "False"])


def test_importing_the_module_does_not_import_mlx() -> None:
    code = "import sys, mlx_lora.device; print('mlx.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("stored", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_activations_are_float32_on_a_cpu_and_the_models_own_on_a_gpu(stored: mx.Dtype) -> None:
    assert device.activation_dtype(stored) == (stored if device.on_gpu() else mx.float32)


@pytest.mark.parametrize("fails", [False, True])
def test_file_limits_are_kept_and_other_limits_can_be_set(fails: bool) -> None:
    """Importing a library must not change the process's limits."""
    original, limits = resource.setrlimit, resource.getrlimit(resource.RLIMIT_NOFILE)
    cores = resource.getrlimit(resource.RLIMIT_CORE)
    with pytest.raises(ZeroDivisionError) if fails else device.file_limits_kept():
        with device.file_limits_kept():
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            resource.setrlimit(resource.RLIMIT_CORE, (0, cores[1]))
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
            assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
            assert not fails or 1 / 0
    resource.setrlimit(resource.RLIMIT_CORE, cores)
    assert resource.setrlimit is original


def test_memory_limits_are_put_back() -> None:
    """A wired limit that is raised is put back."""
    cache = mx.set_cache_limit(1 << 30)
    try:
        with device.memory_limits():
            pass
        assert mx.set_cache_limit(cache) == 1 << 30
    finally:
        mx.set_cache_limit(cache)


def test_a_description_has_what_doctor_shows() -> None:
    facts = device.describe()
    assert facts["device"] == ("gpu" if device.on_gpu() else "cpu")
    assert facts["memory_bytes"] > facts["available_bytes"] > 0 and facts["cores"] >= 1
