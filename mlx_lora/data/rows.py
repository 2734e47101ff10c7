"""Training rows: token ids with a loss weight each, in memory or in a file without a name.

    tokens   <s> user: what is 2+2? \n assistant: 4 </s>
    weights   0   0    0    0  0    0      0      1  1        weights[t] belongs to predicting token t

A file of many gigabytes becomes as many tokens. `RowFile` keeps them on disk and a few numbers a row in memory. The
file lies in the home's folder, is readable by nobody else, and is gone when the process ends, however it ends.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from mlx_lora import paths

# Bytes that wait in memory before they are written.
BUFFER = 1 << 20


@dataclass(frozen=True)
class Row:
    """`tokens` int32 (T,), `weights` float32 (T,); the first token never carries loss."""

    tokens: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def trained(self) -> int:
        """Tokens with loss."""
        return int(np.count_nonzero(self.weights))


class RowFile(Sequence[Row]):
    """Rows by number. `groups[i]` is the example that row i comes from: one example may give several rows.

    Weights are 0 or 1 here, a byte each in the file.
    """

    def __init__(self) -> None:
        self._file: Any = None
        self._buffer = bytearray()
        self._written = 0
        self._starts, self._lengths, self._trained, self._groups = array("q"), array("q"), array("q"), array("q")
        self.largest_token = -1

    def append(self, tokens: Sequence[int] | np.ndarray, weights: Sequence[float] | np.ndarray, group: int) -> None:
        """Add a row; the first token's weight becomes 0."""
        ids, flags = np.asarray(tokens, np.int32), np.asarray(weights) != 0
        flags[:1] = False
        self._starts.append(self._written + len(self._buffer))
        self._lengths.append(len(ids))
        self._trained.append(int(flags.sum()))
        self._groups.append(group)
        self.largest_token = max(self.largest_token, int(ids.max(initial=-1)))
        self._buffer += ids.tobytes() + flags.tobytes()
        if len(self._buffer) > BUFFER:
            self._flush()

    def _flush(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=paths.home())
            weakref.finalize(self, self._file.close)
        self._file.write(self._buffer)
        self._file.flush()
        self._written += len(self._buffer)
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, place: int) -> Row: ...

    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...

    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        length, start = self._lengths[place], self._starts[place]
        if start >= self._written:
            start -= self._written
            content = bytes(self._buffer[start : start + 5 * length])
        else:
            content = os.pread(self._file.fileno(), 5 * length, start)
        tokens = np.frombuffer(content, np.int32, length)
        return Row(tokens, np.frombuffer(content, np.uint8, length, 4 * length).astype(np.float32))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 (rows,)."""
        return np.array(self._lengths)

    @property
    def trained(self) -> np.ndarray:
        """Tokens with loss of each row, int64 (rows,)."""
        return np.array(self._trained)

    @property
    def groups(self) -> np.ndarray:
        """The example of each row, int64 (rows,)."""
        return np.array(self._groups)


class Chosen(Sequence[Row]):
    """Some of the rows of another sequence, by number, in the order of the numbers."""

    def __init__(self, rows: Sequence[Row], numbers: np.ndarray):
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> Row: ...

    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...

    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self.rows[int(number)] for number in self.numbers[place]]
        return self.rows[int(self.numbers[place])]

    @property
    def lengths(self) -> np.ndarray:
        return lengths(self.rows)[self.numbers]

    @property
    def trained(self) -> np.ndarray:
        return trained(self.rows)[self.numbers]


def lengths(rows: Sequence[Row]) -> np.ndarray:
    """Tokens of each row, int64 (rows,); rows in a file aren't read for it."""
    known = getattr(rows, "lengths", None)
    return np.array([len(row) for row in rows], np.int64) if known is None else known


def trained(rows: Sequence[Row]) -> np.ndarray:
    """Tokens with loss of each row, int64 (rows,); rows in a file aren't read for it."""
    known = getattr(rows, "trained", None)
    return np.array([row.trained for row in rows], np.int64) if known is None else known


def largest_token(rows: Sequence[Row]) -> int:
    """The largest token id of all rows; rows in a file aren't read for it."""
    rows = rows.rows if isinstance(rows, Chosen) else rows
    known = getattr(rows, "largest_token", None)
    return max(int(row.tokens.max()) for row in rows) if known is None else int(known)


def common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items (tokens, characters) two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
