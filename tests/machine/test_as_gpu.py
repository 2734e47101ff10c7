"""`pytest --as-gpu`: what this process and those that it starts take for the device. Without it: what there is."""

from __future__ import annotations

import os
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_lora.machine import device, facts, limits


def test_the_option_decides_what_this_process_takes_for_the_device(request: pytest.FixtureRequest) -> None:
    real = mx.default_device().type == mx.gpu
    assert device.on_gpu() == (real or request.config.getoption("--as-gpu"))


@pytest.mark.gpu("has facts of its own")
def test_a_gpu_says_how_much_memory_may_be_wired() -> None:
    assert 0 < limits.limit_bytes() < mx.device_info()["memory_size"]
    found = facts.collect()
    assert found["device"] == "gpu" and found["compiled_kernels"]
    assert found["working_set_bytes"] == mx.device_info()["max_recommended_working_set_size"]


def test_processes_that_tests_start_take_the_same_device() -> None:
    code = "from mlx_lora.machine import device; print(device.on_gpu())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == str(device.on_gpu())
