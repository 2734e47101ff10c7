"""Arrays in an unnamed temporary file: hidden states of many rows, only one of which is in memory at a time.

The file lies in the home folder, no other user can read it, and it disappears when the process ends, even by a crash.
"""

from __future__ import annotations

import tempfile
import weakref

import mlx.core as mx
import numpy as np

from mlx_lora import paths


class StatesFile:
    """Float arrays by number; storing an array under a number again replaces the previous one."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(dir=paths.home())
        weakref.finalize(self, self._file.close)
        self._places: dict[int, tuple[int, tuple[int, ...], mx.Dtype]] = {}
        self._end = 0

    def __setitem__(self, number: int, array: mx.array) -> None:
        start, shape, dtype = self._places.get(number, (self._end, (), array.dtype))
        if shape != array.shape or dtype != array.dtype:
            start, self._end = self._end, self._end + array.nbytes
        self._file.seek(start)
        raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        self._file.write(np.ascontiguousarray(np.array(raw)).data)
        self._places[number] = (start, tuple(array.shape), array.dtype)

    def __getitem__(self, number: int) -> mx.array:
        start, shape, dtype = self._places[number]
        bytes_ = int(np.prod(shape)) * dtype.size
        self._file.seek(start)
        raw = np.frombuffer(self._file.read(bytes_), np.uint8)
        return mx.array(raw).view(dtype).reshape(shape)

    def __contains__(self, number: int) -> bool:
        return number in self._places
