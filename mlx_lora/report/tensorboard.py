"""A run's numbers as TensorBoard's events, in a folder that the user named. Weights & Biases reads the same files.

Numbers and steps alone: no text, no path, no setting. Nothing is sent; a user who wants it elsewhere sends the files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_lora.errors import MlxLoraError
from mlx_lora.train.events import Evaluated, Event, Step

# Seconds until what was written can be seen by a TensorBoard that is open.
FLUSH = 5


@contextmanager
def tensorboard(folder: Path) -> Iterator[Callable[[Event], None]]:
    """Write what the yielded function hears to a new event file in `folder`, which a resumed run adds to."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        hint = "pip install 'mlx-lora[tensorboard]'; without it, `mlx-lora report` draws the curves"
        raise MlxLoraError("TensorBoard's files need tensorboardX", hint=hint) from None
    try:
        writer = SummaryWriter(str(folder), flush_secs=FLUSH)
    except OSError as error:
        raise MlxLoraError(f"{folder}: {error.strerror}", hint="name a folder that can be written") from None

    def hear(event: Event) -> None:
        if isinstance(event, Step | Evaluated):
            for name, value in numbers(event).items():
                if math.isfinite(value):  # a step that was skipped has a loss that isn't
                    writer.add_scalar(name, value, event.step)

    with writer:
        yield hear


def numbers(event: Step | Evaluated) -> dict[str, float]:
    """The scalars of an event, by the names that TensorBoard groups at the slash; losses in nats, memory in bytes."""
    if isinstance(event, Evaluated):
        drift = {} if event.drift is None else {"validation/drift": event.drift}
        return {"validation/loss": event.loss, **drift}
    return {
        "train/loss": event.loss,
        "train/learning_rate": event.learning_rate,
        "train/gradient_norm": event.gradient_norm,
        "speed/tokens_per_second": event.tokens_per_second,
        "memory/peak_bytes": event.peak_memory,
    }
