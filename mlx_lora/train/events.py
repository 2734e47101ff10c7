"""What training reports. The trainer yields these; whoever listens shows, stores or counts them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Step:
    """One optimizer step. `loss` is its token-weighted mean; `skipped`: it was not finite and changed nothing."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    peak_memory: int
    skipped: bool = False


@dataclass(frozen=True)
class Note:
    """Something that training chose by itself, and why."""

    text: str


@dataclass(frozen=True)
class Evaluated:
    """Validation loss over all validation rows after `step` steps; `best` when the lowest of any trained adapter.

    `drift` is KL(base ‖ tuned) per token with loss, in nats, where `max_drift` is set; over it none is the best.
    """

    step: int
    loss: float
    best: bool
    drift: float | None = None


@dataclass(frozen=True)
class Saved:
    """A snapshot of the adapter's arrays, worth writing down: `best` or `last`."""

    step: int
    kind: str
    arrays: dict[str, mx.array] = field(repr=False)


@dataclass(frozen=True)
class Checkpoint:
    """All that the steps after `step` depend on: float32 masters, the optimizer's memory, MLX's random key, counters.

    Written down, a later run goes on from it to the same bytes.
    """

    step: int
    arrays: dict[str, mx.array] = field(repr=False)
    progress: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Finished:
    """The end: `stopped_by` is iters, epochs, patience, drift, interrupted, memory or nonfinite; `valid_loss` is of the
    last step, None if it wasn't evaluated. Bytes and seconds are the loop's, `largest_micro_batch` is in positions.
    `kept_states_bytes`, part of the peak, are hidden states that were kept in memory."""

    iters: int
    epochs: float
    train_loss: float | None
    valid_loss: float | None
    best_valid_loss: float | None
    trained_tokens: int
    computed_tokens: int
    padding_fraction: float
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    kept_states_bytes: int
    largest_micro_batch: int
    trainable_parameters: int
    skipped_steps: int
    stopped_by: str


@dataclass(frozen=True)
class Interrupted:
    """Training was asked to stop; the adapter as it is comes next, if any step was taken, then Finished."""

    step: int


Event = Note | Step | Evaluated | Saved | Checkpoint | Finished | Interrupted
