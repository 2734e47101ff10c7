"""Rows become padded batches whose membership and order are a pure function of (seed, epoch).

    lengths 3 7 4 8, two rows a batch:      a a a . | b b b b b b b .        grouped by length, so little padding
                                            c c c c | d d d d d d d d

Every row is in every epoch exactly once; the last step of an epoch may be smaller, never dropped. numpy only, so a
prefetching thread may run it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_lora.data.encode import Row

# Padded sizes grow in steps of a fraction of their power of two, so that few shapes are compiled and little is padded:
# a sixteenth, at least 8 for lengths and 16 for positions with loss.
PARTS, LEAST_LENGTH, LEAST_POSITIONS = 16, 8, 16
# Rows are sorted by length within this many optimizer steps; beyond it the order stays random.
WINDOW = 128
# Evaluations keep no activations, but logits: this bounds them whatever the batch size.
EVALUATED_POSITIONS = 2048


@dataclass(frozen=True)
class Batch:
    """`inputs`, `targets` int32 (B, T) and `weights` float32 (B, T): the loss of predicting targets from inputs.

    `real` counts positions that aren't padding; padding has weight 0 and token 0.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    real: int

    @property
    def trained(self) -> int:
        """Positions with loss."""
        return int(np.count_nonzero(self.weights))

    def with_loss(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(positions, targets, weights) of the positions with loss, in the flattened batch, padded with weight 0."""
        (positions,) = np.nonzero(self.weights.reshape(-1))
        padding = padded(len(positions), LEAST_POSITIONS) - len(positions)
        positions = np.concatenate([positions, np.zeros(padding, positions.dtype)]).astype(np.int32)
        weights = self.weights.reshape(-1)[positions].copy()
        weights[len(weights) - padding :] = 0
        return positions, self.targets.reshape(-1)[positions], weights


def padded(size: int, least: int) -> int:
    """The smallest planned size that holds `size`: a multiple of its power of two's PARTS, and of `least`."""
    step = max((1 << (size - 1).bit_length()) // 2 // PARTS, least)
    return -(-size // step) * step


def collate(rows: Sequence[Row]) -> Batch:
    """Pad rows to one planned length, and shift them into inputs and targets."""
    longest = max(len(row) for row in rows) - 1
    width = padded(longest, LEAST_LENGTH)
    inputs, targets = np.zeros((2, len(rows), width), np.int32)
    weights = np.zeros((len(rows), width), np.float32)
    for index, row in enumerate(rows):
        length = len(row) - 1
        inputs[index, :length] = row.tokens[:-1]
        targets[index, :length] = row.tokens[1:]
        weights[index, :length] = row.weights[1:]
    return Batch(inputs, targets, weights, real=sum(len(row) - 1 for row in rows))


def epoch_steps(
    lengths: Sequence[int], *, batch_size: int, grad_accumulation: int, seed: int, epoch: int
) -> list[list[np.ndarray]]:
    """The optimizer steps of an epoch, each a list of micro-batches, each the indices of its rows.

    One step is smaller where the rows don't divide; which one is drawn, so that it isn't always the longest rows.
    """
    rows_per_step = batch_size * grad_accumulation
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    sizes = np.asarray(lengths)
    window = WINDOW * rows_per_step
    windows = [order[start : start + window] for start in range(0, len(order), window)]
    order = np.concatenate([part[np.argsort(sizes[part], kind="stable")] for part in windows])
    counts = np.full(-(-len(order) // rows_per_step), rows_per_step)
    counts[generator.integers((len(counts) - 1) // WINDOW * WINDOW, len(counts))] -= -len(order) % rows_per_step
    steps = np.split(order, np.cumsum(counts)[:-1])
    return [
        [steps[index][start : start + batch_size] for start in range(0, len(steps[index]), batch_size)]
        for index in generator.permutation(len(steps))
    ]


def steps_per_epoch(rows: int, *, batch_size: int, grad_accumulation: int) -> int:
    """Optimizer steps in one pass over `rows` rows."""
    return -(-rows // (batch_size * grad_accumulation))


def by_length(rows: Sequence[Row], batch_size: int) -> Iterator[Batch]:
    """Batches of all rows, shortest first: the fixed order of every evaluation.

    Long rows come fewer at a time, so that no batch of more than one row exceeds EVALUATED_POSITIONS.
    """
    waiting: list[Row] = []
    for row in sorted(rows, key=len):
        if waiting and (len(waiting) == batch_size or (len(waiting) + 1) * len(row) > EVALUATED_POSITIONS):
            yield collate(waiting)
            waiting = []
        waiting.append(row)
    if waiting:
        yield collate(waiting)
