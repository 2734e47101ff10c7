"""Hidden states by row, computed once and read in every later epoch: in memory, or in a file without a name.

    rows      a a a | b b b b b | c        one flat array (positions, d), unpadded
    offsets   0       3           8 9

States are made from private texts and are large, so the file has mode 0600 and no name from the start: nothing of it
survives the process, however that ends. Nothing here knows models; which rows a batch holds is the caller's choice.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import psutil

from mlx_lora import ui
from mlx_lora.data.batch import Batch, Line, Lines
from mlx_lora.errors import TrainingError
from mlx_lora.models.trunk.layers import lowest_trainable
from mlx_lora.models.trunk.trunk import Trunk
from mlx_lora.models.trunk.verify import verify_start

# numpy has no bfloat16: its bits are kept.
STORED = {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16}
# Without a plan of the memory, the rest of it is for training; the rest of the disk is for everyone else.
MEMORY_SHARE, DISK_SHARE = 1 / 4, 1 / 2
# Kept states may differ by rounding between shapes of batches, and by no more.
TOLERANCE = 1e-3
Home = Mapping[str, Callable[[int], Batch | None]]
HINT = "free some space, or train without keeping hidden states"


def place(bytes_needed: int, memory: int, free_disk: int) -> str:
    """Where to keep that much: "memory" where it has that many bytes for it, else "file", else why neither has room."""
    if bytes_needed <= memory:
        return "memory"
    if bytes_needed <= free_disk * DISK_SHARE:
        return "file"
    return (
        f"the hidden states take {ui.size(bytes_needed)}, too much for {ui.size(memory)} of memory "
        f"and {ui.size(free_disk)} of disk"
    )


def bytes_of(lengths: Sequence[int], width: int, dtype: mx.Dtype) -> int:
    """Bytes that a store of these rows will take."""
    return int(sum(lengths)) * width * int(dtype.size)


class PrefixStore:
    """Hidden states by row index; `lengths` are the rows' input positions, one less than their tokens.

    `dtype` is float32, float16 or bfloat16, and comes back exactly. The file goes into `folder`; raises TrainingError
    when the disk has no room for it.
    """

    def __init__(
        self, lengths: Sequence[int], width: int, dtype: mx.Dtype, *, in_memory: bool, folder: Path | None = None
    ):
        self._dtype, self.bytes = dtype, bytes_of(lengths, width, dtype)
        self._offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._filled = np.zeros(len(lengths), bool)
        stored, shape = STORED[dtype], (int(self._offsets[-1]), width)
        flat = np.empty(shape, stored) if in_memory else np.frombuffer(_unnamed(self.bytes, folder), stored)
        self._states = flat.reshape(shape)

    def __contains__(self, index: int) -> bool:
        return bool(self._filled[index])

    def put(self, lines: Lines, hidden: mx.array) -> None:
        """Keep the states (B, T, d) of a batch whose lines hold these rows, without the padding behind them."""
        if hidden.dtype != self._dtype:
            raise ValueError(f"states are {hidden.dtype}, the store holds {self._dtype}")
        states = np.asarray(hidden.view(mx.uint16) if self._dtype == mx.bfloat16 else hidden)
        for line, values in zip(lines, states, strict=True):
            for index, here in self._places(line):
                self._row(index)[:] = values[here]
                self._filled[index] = True

    def batch(self, lines: Lines, padded_length: int) -> mx.array:
        """The states of a batch of these lines, zero padded: (B, padded_length, d). KeyError for a row never put."""
        padded = np.zeros((len(lines), padded_length, self._states.shape[1]), self._states.dtype)
        for line, values in zip(lines, padded, strict=True):
            for index, here in self._places(line):
                if index not in self:
                    raise KeyError(index)
                values[here] = self._row(index)
        states = mx.array(padded)
        return states.view(mx.bfloat16) if self._dtype == mx.bfloat16 else states

    def _places(self, line: Line) -> Iterator[tuple[int, slice]]:
        """Each row of a line with the positions that it takes there."""
        start = 0
        for index in line:
            end = start + int(self._offsets[index + 1] - self._offsets[index])
            yield index, slice(start, end)
            start = end

    def _row(self, index: int) -> np.ndarray:
        return self._states[self._offsets[index] : self._offsets[index + 1]]

    def close(self) -> None:
        """Give memory and disk back; the store holds no row afterwards."""
        self._states, self._filled = self._states[:0].copy(), np.zeros_like(self._filled)

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _unnamed(size: int, folder: Path | None) -> mmap.mmap:
    """A mapped file of `size` bytes, all of them allocated: a write to a mapping that finds no room kills the process.

    The mapping keeps the file after its descriptor is closed.
    """
    where = folder or Path(tempfile.gettempdir())
    free = shutil.disk_usage(where).free
    if size > free:
        raise TrainingError(f"hidden states take {ui.size(size)} of disk, {where} has {ui.size(free)}", hint=HINT)
    try:
        with tempfile.TemporaryFile(dir=where) as file:
            _allocate(file.fileno(), size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise TrainingError(f"can't keep hidden states in {where}: {error.strerror}", hint=HINT) from error


def _allocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros = bytes(1 << 20)
    for start in range(0, size, len(zeros)):
        os.pwrite(descriptor, zeros[: size - start], start)


class Prefix:
    """Hidden states entering layer `start` of a trunk, of training and validation rows: each computed once, then read.

    `home` finds, for the rows of one kind, the batch whose states are kept: rounding depends on a row's company, and a
    run that goes on in a later epoch must find the same states. Without one, it is the first batch that holds the row.
    """

    def __init__(self, trunk: Trunk, start: int, stores: dict[str, PrefixStore], where: str, home: Home):
        self.start, self._trunk, self._stores, self._where, self._home = start, trunk, stores, where, home

    def __str__(self) -> str:
        size = ui.size(sum(store.bytes for store in self._stores.values()))
        return f"what enters layer {self.start} is computed once a row and kept: {size} in {self._where}"

    def states(self, of: str, batch: Batch) -> mx.array:
        """States (B, T, d) of a batch of the rows called `of`, from the store once all its rows are there."""
        store, home = self._stores[of], self._home.get(of, lambda row: None)
        for row in (row for line in batch.lines for row in line):
            if row not in store:
                whole = home(row) or batch
                # once a row, so not worth a compiled graph for each shape
                states = self._trunk.entering(mx.array(whole.inputs), self.start, segments=_segments(whole))
                store.put(whole.lines, states)
        return store.batch(batch.lines, batch.inputs.shape[1])

    def difference(self, batch: Batch) -> float:
        """Largest relative difference that kept states make to what enters the output head, on a training batch."""
        segments = _segments(batch)
        direct = self._trunk.run(mx.array(batch.inputs), segments=segments).astype(mx.float32)
        kept = self._trunk.run(self.states("train", batch), start=self.start, segments=segments).astype(mx.float32)
        real = mx.array(batch.weights > 0)[..., None]
        return float((mx.abs(direct - kept) * real).max().item()) / float((mx.abs(direct) * real).max().item())

    def differs(self, batch: Batch) -> str | None:
        """Why kept states can't be used, where they make more than a difference of rounding on a training batch."""
        difference = self.difference(batch)
        return None if difference <= TOLERANCE else f"kept states differ from computed ones by {difference:.2g}"

    @property
    def memory_bytes(self) -> int:
        """Bytes that the states take in memory, outside of MLX; none where they are in a file."""
        return sum(store.bytes for store in self._stores.values()) if self._where == "memory" else 0

    def close(self) -> None:
        for store in self._stores.values():
            store.close()


def _segments(batch: Batch) -> mx.array | None:
    return None if batch.segments is None else mx.array(batch.segments)


def make(
    trunk: Trunk,
    rows: dict[str, list[int]],
    folder: Path | None,
    home: Home | None = None,
    *,
    memory: int | None = None,
) -> Prefix | str:
    """Stores for the rows' states, given the lengths of each set of rows, or the reason why there can't be any.

    They may take `memory` bytes of memory, by default a part of what is free; what takes more goes to a file.
    """
    first = lowest_trainable(trunk.model)
    if isinstance(first, str):
        return first
    if first == 0:
        return "the first layer is adapted"
    states = verify_start(trunk, first)
    if isinstance(states, str):
        return states
    width, dtype = states.shape[-1], states.dtype
    positions = {name: [length - 1 for length in lengths] for name, lengths in rows.items()}
    needed = sum(bytes_of(lengths, width, dtype) for lengths in positions.values())
    free = shutil.disk_usage(folder or tempfile.gettempdir()).free
    memory = int(psutil.virtual_memory().available * MEMORY_SHARE) if memory is None else memory
    where = place(needed, memory, free)
    if where not in ("memory", "file"):
        return where
    try:
        made = {
            name: PrefixStore(lengths, width, dtype, in_memory=where == "memory", folder=folder)
            for name, lengths in positions.items()
            if lengths
        }
    except TrainingError as error:
        return error.message
    return Prefix(trunk, first, made, "memory" if where == "memory" else "a file without a name", home or {})
