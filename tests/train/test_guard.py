"""A batch over the limit of memory is split: the gradient is the same, and the peak stays under the limit."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.adapters.attach import attach, detach
from mlx_lora.config import Adapter
from mlx_lora.models.load import load
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.train.budget.choose import Lengths, Plan, plan
from mlx_lora.train.budget.costs import costs
from mlx_lora.train.events import Finished, Saved, Step
from mlx_lora.train.trainer import train
from tests.conftest import write_model
from tests.fixed import fixed
from tests.train.test_trainer import make_rows, of

ROWS = make_rows(8, longest=440)
# One step, not clipped: what the adapter moved by is the gradient.
SETTINGS = fixed(iters=1, batch_size=8, optimizer="sgd", warmup=0.0, max_grad_norm=None, learning_rate=1.0)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose activations outweigh its weights."""
    changes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    return write_model(tmp_path_factory.mktemp("models") / "wide", **changes)


def step(path: Path, limit: int) -> tuple[Plan, dict[str, mx.array], Finished, int]:
    """The plan within `limit` bytes, the adapter after one step of it, how it ended, and its micro-batches."""
    loaded = load(path)
    attach(loaded.model, Adapter(rank=4), seed=1)
    lengths = Lengths([len(row) for row in ROWS], max(row.trained for row in ROWS))
    made = plan(costs(loaded.model, SETTINGS, dtype=mx.float32, gpu=False), lengths, SETTINGS, limit)
    events = list(train(loaded.model, ROWS, [], SETTINGS, trunk=take_apart(loaded.model), plan=made))
    assert len(of(events, Step)) == 1
    detach(loaded.model)
    return made, dict(of(events, Saved)[-1].arrays), of(events, Finished)[0], made.micro.positions


def test_a_batch_over_the_limit_is_split(wide: Path) -> None:
    whole, expected, free, positions = step(wide, 1 << 40)
    limit = int(free.peak_memory_bytes * 0.7)
    parts, arrays, limited, fewer = step(wide, limit)
    assert whole.fits and parts.fits and not parts.recompute and fewer < positions
    assert limited.stopped_by == "iters" and limited.peak_memory_bytes <= limit < free.peak_memory_bytes
    for name, array in expected.items():
        scale = float(mx.abs(array).max().item())
        np.testing.assert_allclose(arrays[name], array, rtol=0, atol=1e-5 * scale, err_msg=name)
