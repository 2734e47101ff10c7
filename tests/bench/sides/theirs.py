"""mlx_lm's side: `mlx_lm.tuner.trainer.train` itself, listened to through its callback.

Its model is cast to float32, so that no side computes in emulated halves. Rows are exactly as long as the longest that
it is allowed, so it pads nothing, and its batches hold the same tokens as ours.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import TrainingArgs
from mlx_lm.tuner.trainer import train as train_theirs
from mlx_lm.tuner.utils import linear_to_lora_layers

from tests.bench.sides import rows as plain

RATE, LAYERS = 1e-4, 16
# alpha / rank of our default adapter
LORA = {"rank": 8, "scale": 2.0, "dropout": 0.0}


class Listener(TrainingCallback):
    """Times steps from report to report, as our side is timed from event to event."""

    def __init__(self) -> None:
        self.ended, self.losses, self.peak = [time.perf_counter()], [], 0

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.ended.append(time.perf_counter())
        self.losses.append(train_info["train_loss"])
        self.peak = mx.get_peak_memory()


class Rows:
    """Rows as mlx_lm's datasets give them: token ids and the index of the first with loss."""

    def __init__(self, rows: list[plain.PlainRow]):
        self.rows = [(row.tokens, row.first if row.first > 1 else 0) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[list[int], int]:
        return self.rows[index]

    def process(self, row: tuple[list[int], int]) -> tuple[list[int], int]:
        return row


def run(*, model: str, rows: str, steps: int, grad_checkpoint: str = "off") -> dict[str, Any]:
    """The same rows in every step: rank 8 on every linear of the last layers."""
    return train(_loaded(model), plain.read(rows), steps, grad_checkpoint)


def length(*, model: str, length: int, steps: int, grad_checkpoint: str, mask: str = "completion") -> dict[str, Any]:
    """One random row of `length` positions."""
    network = _loaded(model)
    return train(network, plain.random(network.args.vocab_size, 1, length, mask), steps, grad_checkpoint)


def vocabulary(*, vocabulary: int, steps: int, rows: int = 4, length: int = 512) -> dict[str, Any]:
    """A Gemma-3-like model with random weights, loss on every token."""
    from tests.bench.sides.random_models import gemma3

    model = gemma3(vocabulary)
    linear_to_lora_layers(model, len(model.layers), LORA)
    return train(model, plain.random(vocabulary, rows, length, "all"), steps)


def _loaded(path: str) -> nn.Module:
    model, _ = utils.load_model(Path(path))
    model.set_dtype(mx.float32)
    model.freeze()
    linear_to_lora_layers(model, LAYERS, LORA)
    return model


def train(model: nn.Module, rows: list[plain.PlainRow], steps: int, grad_checkpoint: str = "off") -> dict[str, Any]:
    mx.eval(model.parameters())
    mx.clear_cache()
    mx.reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArgs(
            batch_size=len(rows),
            iters=steps + 1,
            steps_per_report=1,
            max_seq_length=len(rows[0].tokens),
            adapter_file=f"{folder}/adapters.safetensors",
            grad_checkpoint=grad_checkpoint == "on",
        )
        listener = Listener()
        optimizer = mlx.optimizers.Adam(learning_rate=RATE)
        train_theirs(model, optimizer, CacheDataset(Rows(rows)), args=arguments, training_callback=listener)
    return {
        "seconds": [after - before for before, after in zip(listener.ended[1:], listener.ended[2:], strict=False)],
        "peak_bytes": listener.peak,
        "losses": listener.losses,
        "trainable_parameters": sum(array.size for _, array in tree_flatten(model.trainable_parameters())),
        "trained_tokens": sum(row.trained for row in rows),
        "base_bytes": sum(array.nbytes for _, array in tree_flatten(model.parameters())),
    }
