"""Rows become padded or packed batches whose membership and order are a pure function of (seed, epoch).

    lengths 3 7 4 8, two rows a batch:      a a a . | b b b b b b b .        grouped by length, so little padding
                                            c c c c | d d d d d d d d
    packed:                                 a a a c c c c . | …              rows share a line, kept apart by a mask

An optimizer step has the number of rows that was asked for, every row is in every epoch exactly once, and the last
step of an epoch may be smaller, never dropped. Where a step's rows are many or long it is cut into micro-batches of at
most MOST_POSITIONS, whose gradients are summed. numpy only, so a prefetching thread may run it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_lora.data.rows import Row, lengths

# Padded sizes grow by a sixteenth of their power of two, at least 8: few shapes are compiled, little is padded.
PARTS, LEAST = 16, 8
# Rows are sorted by length within this many optimizer steps; beyond it the order stays random.
WINDOW = 128
# Positions of a micro-batch, unless a single row is longer: enough to keep a processor busy, and what bounds memory.
MOST_POSITIONS = 2048
# Positions of a packed line, unless a single row is longer: attention costs the square of it.
PACKED_POSITIONS = 512
# Columns beyond this share of a batch's are all of it: too little is saved.
MOST_COLUMNS = 3 / 4

Line = list[int]
Lines = list[Line]


@dataclass(frozen=True)
class Batch:
    """`inputs`, `targets` int32 (B, T) and `weights` float32 (B, T): the loss of predicting targets from inputs.

    `lines` are the indices of the rows in each of the B lines; `segments` int32 (B, T) tells rows apart where lines
    are packed (1, 2, …, and 0 for padding), else None. `real` counts positions that aren't padding; padding has weight
    0 and token 0.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    real: int
    lines: Lines
    segments: np.ndarray | None = None

    @property
    def trained(self) -> int:
        """Positions with loss."""
        return int(np.count_nonzero(self.weights))

    def columns(self) -> np.ndarray | None:
        """Consecutive columns (B, M) of each line that hold all its positions with loss; None if M is most of T.

        M is some eighths of T, so that few shapes are compiled.
        """
        width = self.weights.shape[1]
        there = self.weights != 0
        first, last = there.argmax(axis=1), width - there[:, ::-1].argmax(axis=1)
        eighth = -(-width // 8)
        needed = -(-int((last - first).max()) // eighth) * eighth
        if needed > MOST_COLUMNS * width:
            return None
        return (np.minimum(first, width - needed)[:, None] + np.arange(needed)).astype(np.int32)

    def with_loss(self, columns: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(positions, targets, weights) of the positions with loss, padded with weight 0.

        Positions count in the flattened batch, or in its flattened `columns`.
        """
        weights, targets = self.weights, self.targets
        if columns is not None:
            weights, targets = (np.take_along_axis(array, columns, axis=1) for array in (weights, targets))
        (positions,) = np.nonzero(weights.reshape(-1))
        padding = padded(len(positions)) - len(positions)
        positions = np.concatenate([positions, np.zeros(padding, positions.dtype)]).astype(np.int32)
        chosen = weights.reshape(-1)[positions].copy()
        chosen[len(chosen) - padding :] = 0
        return positions, targets.reshape(-1)[positions], chosen


def padded(size: int) -> int:
    """The smallest planned size that holds `size`: a multiple of a sixteenth of its power of two, and of 8."""
    step = max((1 << max(size - 1, 0).bit_length()) // 2 // PARTS, LEAST)
    return -(-size // step) * step


def collate(rows: Sequence[Row], lines: Lines | None = None, *, packed: bool = False) -> Batch:
    """Lay rows into lines of one planned length, shifted into inputs and targets; by default a line for each row."""
    lines = [[index] for index in range(len(rows))] if lines is None else lines
    real = [sum(len(rows[index]) - 1 for index in line) for line in lines]
    width = padded(max(real))
    inputs, targets, segments = np.zeros((3, len(lines), width), np.int32)
    weights = np.zeros((len(lines), width), np.float32)
    for number, line in enumerate(lines):
        start = 0
        for segment, row in enumerate((rows[index] for index in line), start=1):
            here = slice(start, start + len(row) - 1)
            inputs[number, here], targets[number, here] = row.tokens[:-1], row.tokens[1:]
            weights[number, here], segments[number, here] = row.weights[1:], segment
            start = here.stop
    return Batch(inputs, targets, weights, sum(real), lines, segments if packed else None)


def epoch_steps(
    lengths: Sequence[int],
    *,
    batch_size: int,
    grad_accumulation: int,
    seed: int,
    epoch: int,
    packing: bool = False,
    share: tuple[int, int] = (0, 1),
    most: int | None = None,
) -> list[list[Lines]]:
    """The optimizer steps of an epoch, each a list of micro-batches, each the lines of row indices that it holds.

    One step is smaller where the rows don't divide; which one is drawn, so that it isn't always the longest rows.
    Packed rows need no company of their own length and come in random order. `share` (rank, size) picks one process's
    part of every step, which may be empty; `most` bounds a micro-batch's positions, MOST_POSITIONS by default.
    """
    rows_per_step = batch_size * grad_accumulation
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    sizes = np.asarray(lengths)
    if not packing:
        window = WINDOW * rows_per_step
        windows = [order[start : start + window] for start in range(0, len(order), window)]
        order = np.concatenate([part[np.argsort(sizes[part], kind="stable")] for part in windows])
    counts = np.full(-(-len(order) // rows_per_step), rows_per_step)
    counts[generator.integers((len(counts) - 1) // WINDOW * WINDOW, len(counts))] -= -len(order) % rows_per_step
    steps = np.split(order, np.cumsum(counts)[:-1])
    rank, size = share
    return [
        micro_batches(
            sorted(steps[index].tolist(), key=lambda row: lengths[row])[rank::size], lengths, batch_size, packing, most
        )
        for index in generator.permutation(len(steps))
    ]


def micro_batches(
    indices: Line, lengths: Sequence[int], batch_size: int, packing: bool = False, most: int | None = None
) -> list[Lines]:
    """Cut rows that come shortest first into micro-batches of at most `batch_size` rows and `most` positions.

    A single line is never cut: a long row, or packed short ones.
    """
    most = most or MOST_POSITIONS
    lines = pack(indices, lengths) if packing else [[index] for index in indices]
    parts: list[Lines] = []
    for line in lines:
        width = padded(sum(lengths[index] - 1 for index in line))
        held = parts[-1] if parts else []
        rows = sum(map(len, held)) + len(line)
        if not held or rows > batch_size or (len(held) + 1) * width > most:
            parts.append([])
        parts[-1].append(line)
    return parts


def pack(indices: Line, lengths: Sequence[int]) -> Lines:
    """Lay rows into as few lines as first fit, longest first, finds; emptiest line first.

    A line holds PACKED_POSITIONS, or the longest row.
    """
    longest_first = sorted(indices, key=lambda index: -lengths[index])
    room = max([PACKED_POSITIONS, *(lengths[index] - 1 for index in longest_first[:1])])
    lines: Lines = []
    used: list[int] = []
    for index in longest_first:
        size = lengths[index] - 1
        place = next((number for number, taken in enumerate(used) if taken + size <= room), len(lines))
        if place == len(lines):
            lines.append([])
            used.append(0)
        lines[place].append(index)
        used[place] += size
    return [line for _, line in sorted(zip(used, lines, strict=True))]


def steps_per_epoch(rows: int, *, batch_size: int, grad_accumulation: int) -> int:
    """Optimizer steps in one pass over `rows` rows."""
    return -(-rows // (batch_size * grad_accumulation))


def by_length(
    rows: Sequence[Row], batch_size: int, share: tuple[int, int] = (0, 1), most: int | None = None
) -> Iterator[Batch]:
    """Batches of all rows, shortest first: the fixed order of every evaluation; `share`, `most` as in `epoch_steps`."""
    tokens = lengths(rows).tolist()
    rank, size = share
    shortest_first = sorted(range(len(rows)), key=tokens.__getitem__)
    for lines in micro_batches(shortest_first, tokens, batch_size, most=most)[rank::size]:
        yield collate(rows, lines)
