"""The device: its dtype, the BLAS under it, limits that are put back, and an exponential that is as good as MLX's."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora import paths
from mlx_lora.machine import allocation, blas, device, elementary, facts


def _loads(name: str | None) -> bool:
    """Whether a library can be loaded, and not only found."""
    try:
        return name is not None and bool(ctypes.CDLL(name))
    except OSError:
        return False


FOUND = _loads(ctypes.util.find_library("openblas"))


@pytest.mark.skipif(not sys.platform.startswith("linux") or not FOUND, reason="no OpenBLAS on this machine")
@pytest.mark.parametrize(("before", "loaded"), [("", True), ("import mlx.core; ", False)], ids=["in time", "too late"])
def test_openblas_is_loaded_before_mlx_or_not_at_all(before: str, loaded: bool) -> None:
    code = f"{before}from mlx_lora.machine.blas import *; print(load_blas()); import mlx.core; print(blas_loaded())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ([blas.BLAS_LIBRARY, "True"] if loaded else ["None", "False"])


def test_importing_the_module_does_not_import_mlx() -> None:
    code = "import sys, mlx_lora.machine.device; print('mlx.core' in sys.modules)"
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
    with pytest.raises(ZeroDivisionError) if fails else allocation.file_limits_kept():
        with allocation.file_limits_kept():
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
        with allocation.memory_limits():
            pass
        assert mx.set_cache_limit(cache) == 1 << 30
    finally:
        mx.set_cache_limit(cache)


@pytest.mark.processor("MLX waits for each operation, below a limit")
@pytest.mark.parametrize("fails", [False, True])
def test_a_cpu_waits_for_each_operation_inside_and_has_its_old_limit_back(fails: bool) -> None:
    original = mx.set_memory_limit(3 << 30)
    try:
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            with allocation.memory_limits():
                assert limit_now() == 0
                allocation.hold_back()
                assert not fails or 1 / 0
        assert limit_now() == 3 << 30
    finally:
        mx.set_memory_limit(original)


@pytest.mark.gpu("memory is wired, and none is held back")
@pytest.mark.parametrize("fails", [False, True])
def test_a_gpu_wires_what_metal_recommends_and_has_its_old_limits_back(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from the calls, since MLX's CPU backend takes a wired limit and does nothing with it."""
    wired: list[int] = []
    original = mx.set_wired_limit
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: wired.append(limit) or original(limit))  # type: ignore[func-returns-value]
    recommended, memory = mx.device_info()["max_recommended_working_set_size"], limit_now()
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        with allocation.memory_limits():
            cache = mx.set_cache_limit(0)
            mx.set_cache_limit(cache)
            assert (wired, cache) == ([recommended], recommended // 8)
            allocation.hold_back()
            assert limit_now() == memory
            assert not fails or 1 / 0
    assert wired == [recommended, 0]


@pytest.mark.processor("the C library holds its memory")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's own")
def test_freed_memory_is_kept_inside_and_given_back_behind() -> None:
    """Counted in pages that the system had to hand out: each of 20 arrays of 64 MB again, or few in all."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            mx.eval(mx.ones((16 << 20,)) + mx.array(1.0))
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    pages = 20 * (64 << 20) // resource.getpagesize()
    outside = faults()
    with allocation.memory_limits():
        faults()
        inside = faults()
    assert outside > pages and faults() > pages
    assert inside < pages / 4


@pytest.mark.processor("a GPU isn't held back")
def test_memory_is_held_back_a_little_below_its_peak_and_never_below_nothing() -> None:
    original = mx.set_memory_limit(3 << 30)
    try:
        mx.reset_peak_memory()
        mx.eval(mx.zeros((256 << 20) // 4))
        allocation.hold_back()
        peak = mx.get_peak_memory()
        assert peak >= 256 << 20 and limit_now() == peak - allocation.HELD_BACK
        # a small peak is close to what stays: a fixed distance would hold back everything
        mx.reset_peak_memory()
        mx.eval(mx.zeros((16 << 20) // 4))
        allocation.hold_back()
        active, peak = mx.get_active_memory(), mx.get_peak_memory()
        assert limit_now() == peak - (peak - active) // 8 > active
    finally:
        mx.set_memory_limit(original)


def limit_now() -> int:
    """MLX tells the limit only while setting another."""
    limit = mx.set_memory_limit(0)
    mx.set_memory_limit(limit)
    return int(limit)


@pytest.fixture(params=[False, True], ids=["plain", "compiled"])
def compiled(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return mx.compile if request.param else lambda function: function  # type: ignore[no-any-return]


LOWEST = float(np.finfo(np.float32).min)
SMALLEST = float(np.finfo(np.float32).tiny)


def test_the_exponential_is_as_exact_as_mlxs_own(compiled: Callable[..., Any]) -> None:
    grid = np.linspace(-80, 0, 400_001).astype(np.float32)
    halves = (np.arange(-230, 1) / 2 * np.log(2)).astype(np.float32)  # where another power of two begins
    near = np.concatenate([np.nextafter(halves, np.float32(-np.inf)), halves, -np.logspace(-30, 0, 200)])
    x = np.concatenate([grid, near[(near >= -80) & (near <= 0)].astype(np.float32)])
    ours, exact = np.array(compiled(elementary.exp_below_one)(mx.array(x))), np.exp(x.astype(np.float64))
    # what grows with x is the rounding of x·log₂e
    errors = np.abs(ours - exact) / exact
    assert (errors / (2e-7 + 8e-8 * np.abs(x))).max() < 1
    assert errors.max() < 4e-6
    assert errors.max() < 1.1 * (np.abs(np.array(mx.exp(mx.array(x))) - exact) / exact).max() + 1e-7
    assert ours.dtype == np.float32


def test_the_exponential_of_zero_is_one_and_of_very_little_is_zero(compiled: Callable[..., Any]) -> None:
    exponential = compiled(elementary.exp_below_one)
    np.testing.assert_array_equal(exponential(mx.array([0.0, -0.0])), [1, 1])
    little = np.concatenate([np.linspace(-90, -2000, 5000), -np.logspace(3.3, 38, 200), [LOWEST, -np.inf]])
    assert not np.array(exponential(mx.array(little.astype(np.float32)))).any()


@pytest.mark.processor("a GPU takes MLX's own")
def test_the_exponential_never_rises_where_it_falls_and_is_hardly_ever_denormal(compiled: Callable[..., Any]) -> None:
    x = np.linspace(-95, 0, 1_000_001).astype(np.float32)
    ours = np.array(compiled(elementary.exp_below_one)(mx.array(x)))
    assert (np.diff(ours.astype(np.float64)) >= -1e-6 * ours[:-1]).all()
    denormal = x[(ours > 0) & (ours < SMALLEST)]
    assert denormal.size == 0 or np.ptp(denormal) < np.log(2) / 2 + 1e-3


@pytest.mark.gpu("has an exponential of its own, in every dtype")
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_on_a_gpu_the_elementary_functions_are_mlxs_own(dtype: mx.Dtype) -> None:
    x = (-mx.abs(mx.random.normal((4, 50), key=mx.random.key(0))) * 5).astype(dtype)
    for ours, theirs in (
        (elementary.exp_below_one(x), mx.exp(x)),
        (elementary.sigmoid(x), mx.sigmoid(x)),
        (elementary.softmax(x), mx.softmax(x, axis=-1, precise=True)),
    ):
        assert ours.dtype == dtype and mx.array_equal(ours, theirs)


def test_the_exponential_of_nan_is_nan() -> None:
    """A step that isn't finite has to be seen as such."""
    assert np.isnan(np.array(elementary.exp_below_one(mx.array([float("nan"), -1.0])))).tolist() == [True, False]
    assert np.isnan(np.array(elementary.softmax(mx.array([[float("nan"), 1.0, 2.0], [0.0, 1.0, 2.0]])))).any(axis=1)[0]


def test_the_sigmoid_is_exact_on_both_sides_and_at_the_ends(compiled: Callable[..., Any]) -> None:
    x = np.concatenate([np.linspace(-80, 80, 100_001), [0.0, -0.0, 1e-20, -1e-20]]).astype(np.float32)
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    ours = np.array(compiled(elementary.sigmoid)(mx.array(x)))
    assert (np.abs(ours - exact) / exact / (4e-7 + 8e-8 * np.abs(np.minimum(x, 0)))).max() < 1
    ends = [-np.inf, LOWEST, -1e4, -100, 100, 1e4, -LOWEST, np.inf]
    np.testing.assert_allclose(elementary.sigmoid(mx.array(ends)), [0, 0, 0, 0, 1, 1, 1, 1], atol=1e-37)


@pytest.mark.parametrize("never", [LOWEST, -np.inf], ids=["lowest", "infinite"])
def test_the_softmax_is_exact_with_masked_entries(never: float, compiled: Callable[..., Any]) -> None:
    draw = np.random.default_rng(0)
    x = (draw.normal(size=(40, 3, 70)) * draw.choice([0.1, 5, 1000], (40, 1, 1))).astype(np.float32)
    x[draw.random(x.shape) < 0.4] = never
    x[:, :, 0] = draw.normal(size=(40, 3))  # something may be looked at
    powers = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    exact = powers / powers.sum(axis=-1, keepdims=True)
    ours = np.array(compiled(elementary.softmax)(mx.array(x)))
    np.testing.assert_allclose(ours, exact, rtol=2e-5, atol=1e-37)
    np.testing.assert_allclose(ours.sum(axis=-1), 1, rtol=1e-6)
    assert not ours[x == never].any()


def test_a_row_that_may_look_at_nothing_looks_at_everything_alike() -> None:
    """As mlx-lm's masks do with padding: finite, and without weight in any loss."""
    np.testing.assert_allclose(elementary.softmax(mx.full((2, 5), LOWEST)), np.full((2, 5), 0.2), rtol=1e-6)


@pytest.mark.parametrize("name", ["exp_below_one", "sigmoid", "softmax"])
def test_gradients_are_right_or_an_error_and_never_silently_zero(name: str) -> None:
    ours = getattr(elementary, name)
    theirs = {"exp_below_one": mx.exp, "sigmoid": mx.sigmoid, "softmax": lambda x: mx.softmax(x, axis=-1)}[name]
    x = -mx.abs(mx.random.normal((4, 50), key=mx.random.key(0))) * 5
    cotangent = mx.random.normal(x.shape, key=mx.random.key(1))
    try:
        _, (gradient,) = mx.vjp(ours, [x], [cotangent])
    except ValueError:
        return
    _, (expected,) = mx.vjp(theirs, [x], [cotangent])
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_halves_are_left_to_mlx(dtype: mx.Dtype) -> None:
    x = -mx.abs(mx.random.normal((4, 50), key=mx.random.key(0))).astype(dtype) * 5
    for ours, theirs in (
        (elementary.exp_below_one(x), mx.exp(x)),
        (elementary.sigmoid(x), mx.sigmoid(x)),
        (elementary.softmax(x), mx.softmax(x, axis=-1, precise=True)),
    ):
        assert ours.dtype == dtype and mx.array_equal(ours, theirs)


@pytest.mark.parametrize("code", [0, 1])
def test_macos_is_asked_to_keep_a_directory_out_of_backups(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own tool, once; a tool that fails stops nothing."""
    tool, asked = tmp_path / "tmutil", tmp_path / "asked"
    tool.write_text(f'#!/bin/sh\nprintf "%s|" "$@" >> "{asked}"\necho no >&2\nexit {code}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    paths.exclude_from_backups(tmp_path / "my home")
    assert asked.read_text() == f"addexclusion|{tmp_path / 'my home'}|"


def test_without_a_backup_tool_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    paths.exclude_from_backups(tmp_path)
    broken = tmp_path / "tmutil"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    paths.exclude_from_backups(tmp_path)


def test_a_description_has_what_doctor_shows() -> None:
    described = facts.collect()
    assert described["device"] == ("gpu" if device.on_gpu() else "cpu")
    assert described["memory_bytes"] > described["available_bytes"] > 0 and described["cores"] >= 1
