"""Gradients of a float16 model that as a sum over positions are too large for float16."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.data.batch import collate
from mlx_lora.data.rows import Row
from mlx_lora.models.load import load_stored
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.train.distributed import Processes
from mlx_lora.train.objectives import likelihood
from mlx_lora.train.objectives.half import gradient_scale
from mlx_lora.train.objectives.likelihood import Arrays, Loss, as_arrays
from mlx_lora.train.step import Stepper
from tests.fixed import fixed

LARGEST = float(np.finfo(np.float16).max)
POSITIONS = 256
LARGE, SMALL = 2.0**8, 2.0**-7  # what the activations before a projection are multiplied by
Gradients = dict[str, np.ndarray]


def model_in(dtype: mx.Dtype, path: Path, large: float = LARGE) -> nn.Module:
    """The tiny model with an adapter on its values and outputs, and `large` activations before the values.

    Every position sees the same token, so that what the positions add to a gradient has one direction.
    """
    loaded = load_stored(path)
    model = loaded.model
    model.set_dtype(dtype)
    model.freeze()
    for layer in model.layers:
        layer.input_layernorm.weight *= large
        layer.self_attn.q_proj.weight *= 0  # or such activations would decide all of the attention
        layer.self_attn.v_proj.weight /= large
    for index, wrapper in enumerate(attach(model, Adapter(rank=2, targets=["v_proj", "o_proj"])).values()):
        wrapper.lora_a /= large
        wrapper.lora_b = 0.5 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(index))
    model.train()
    return model


def batch(positions: int = POSITIONS, start: int = 5) -> Arrays:
    """One token all along, and one to be said after it."""
    tokens = np.full(positions + 1, start, np.int32)
    return as_arrays(collate([Row(tokens, np.array([0.0] + [1.0] * positions, np.float32))]))


def gradients_of(model: nn.Module, arrays: Arrays) -> Gradients:
    loss, gradients = Loss(take_apart(model)).with_gradients(arrays)
    assert loss.dtype == mx.float32
    return {name: np.array(array) for name, array in tree_flatten(gradients)}


def unscaled(model: nn.Module, arrays: Arrays) -> Gradients:
    _, gradients = nn.value_and_grad(model, Loss(take_apart(model)).differentiable)(arrays)
    return {name: np.array(array) for name, array in tree_flatten(gradients)}


def test_half_precision_sums_that_would_overflow_are_those_of_float32(tiny_path: Path) -> None:
    expected = gradients_of(model_in(mx.float32, tiny_path), batch())
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    assert LARGEST < largest, "this batch tests nothing"
    model = model_in(mx.float16, tiny_path)
    assert not all(np.isfinite(gradient).all() for gradient in unscaled(model, batch()).values())
    for name, gradient in gradients_of(model, batch()).items():
        size = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=2e-2 * size, err_msg=name)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_other_dtypes_have_the_bytes_of_the_plain_sum(dtype: mx.Dtype, tiny_path: Path) -> None:
    model = model_in(dtype, tiny_path, 1.0)
    ours, plain = gradients_of(model, batch()), unscaled(model, batch())
    for name, gradient in plain.items():
        assert np.array_equal(ours[name], gradient) and gradient.any(), name


@pytest.mark.parametrize(("scale", "kept"), [("root", True), ("mean", False)])
def test_half_precision_keeps_small_gradients(
    scale: str, kept: bool, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a position adds is small here: scaled to a mean, it would be lost among float16's smallest numbers."""
    expected = gradients_of(model_in(mx.float32, tiny_path, SMALL), batch())
    if scale == "mean":
        monkeypatch.setattr(likelihood, "gradient_scale", lambda dtype, positions: 1 / positions)
    ours = gradients_of(model_in(mx.float16, tiny_path, SMALL), batch())
    off = [np.linalg.norm(ours[name] - expected[name]) / np.linalg.norm(expected[name]) for name in expected]
    assert max(off) < 0.03 if kept else max(off) > 0.1


@pytest.mark.parametrize(("positions", "scale"), [(0, 1), (1, 1), (2, 0.5), (4, 0.5), (256, 2**-4), (8192, 2**-7)])
def test_the_scale_is_about_one_over_the_root_of_the_positions(positions: int, scale: float) -> None:
    assert gradient_scale(mx.float16, positions) == scale
    assert gradient_scale(mx.bfloat16, positions) == gradient_scale(mx.float32, positions) == 1


def norm(model: nn.Module, batches: list[Arrays], processes: Processes | None = None) -> float:
    """The norm of a step's mean gradient."""
    stepper = Stepper(model, Loss(take_apart(model)), fixed(iters=1), 1, 0, processes or Processes())
    tokens = sum(int(arrays["weights"].sum().item()) for arrays in batches)
    pending = stepper.dispatch(batches, tokens)
    assert pending.finite.item()
    return float(pending.norm.item())


def micro_batches() -> list[Arrays]:
    return [batch(POSITIONS, 5), batch(POSITIONS // 2, 6), batch(POSITIONS // 4, 7)]


def test_half_precision_micro_batches_of_different_lengths_add_up_in_float32(tiny_path: Path) -> None:
    """Each has a scale of its own, which must be gone before they are added."""
    expected = norm(model_in(mx.float32, tiny_path), micro_batches())
    assert norm(model_in(mx.float16, tiny_path), micro_batches()) == pytest.approx(expected, rel=1e-2)


@pytest.mark.real
def test_half_precision_processes_add_up_in_float32(tiny_path: Path, tmp_path: Path) -> None:
    """Two of MLX's own launcher, with different rows."""
    script = tmp_path / "process.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nimport mlx.core as mx\n"
        "from tests.train.objectives.test_half import Processes, micro_batches, model_in, norm\n"
        "processes = Processes(mx.distributed.init(strict=True, backend='ring'))\n"
        "mine = micro_batches()[processes.rank :: 2]\n"
        "found = norm(model_in(mx.float16, Path(sys.argv[1])), mine, processes)\n"
        "print(f'norm {found}' if processes.rank == 0 else '')\n"
    )
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring", "--"]
    paths = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*launch, sys.executable, str(script), str(tiny_path)],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    (found,) = (line.split()[1] for line in done.stdout.splitlines() if line.startswith("norm"))
    assert float(found) == pytest.approx(norm(model_in(mx.float32, tiny_path), micro_batches()), rel=1e-2)
