"""Check the structure of a GGUF file before gguf's reader opens it.

The reader checks no number: it slices past the file's end without an error, lets products of dimensions overflow, and
creates several objects for each element that an array claims to have. So all numbers are limited here, by the file's
size or by a limit above that of any real model. `config.py` interprets the metadata.
"""

from __future__ import annotations

import math
import mmap

import gguf
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value

# Sizes of the scalar types, by their number in the file.
_SCALAR_BYTES = {int(kind): number().itemsize for kind, number in gguf.GGUFReader.gguf_scalar_to_np.items()}
# The largest models have some hundred fields, some thousand tensors, and half a million merges.
_MOST_FIELDS, _MOST_TENSORS, _MOST_ELEMENTS = 1 << 14, 1 << 17, 1 << 22
_MOST_DIMENSIONS, _MOST_ALIGNMENT = 4, 1 << 20


class _Cursor:
    """Reads a mapped file from start to end; ValueError if it ends too early."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.elements = data, 0, 0

    def take(self, size: int) -> bytes:
        self.skip(size)
        return self.data[self.at - size : self.at]

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise ValueError("it ends inside its metadata")

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def count(self, limit: int, what: str) -> int:
        if (count := self.number(8)) > limit:
            raise ValueError(f"it claims {count} {what}; the limit is {limit}")
        return count

    def value(self, kind: int) -> None:
        """Skip a value of type `kind`; KeyError for an unknown type, or an array of arrays."""
        if kind == Value.STRING:
            self.skip(self.number(8))
        elif kind == Value.ARRAY:
            kind, count = self.number(4), self.number(8)
            if kind != Value.STRING:
                self.skip(_SCALAR_BYTES[kind] * count)
            self.elements += count
            if self.elements > _MOST_ELEMENTS:
                raise ValueError(f"its arrays have more than {_MOST_ELEMENTS} elements")
            for _ in range(count if kind == Value.STRING else 0):
                self.skip(self.number(8))
        else:
            self.skip(_SCALAR_BYTES[kind])


def check_header(data: mmap.mmap) -> None:
    """Check every length, count and offset; ValueError or KeyError if one points outside the file or is invalid."""
    cursor = _Cursor(data)
    cursor.skip(4)  # the magic
    if (version := cursor.number(4)) not in (2, 3):
        raise ValueError(f"version {version}; known: 2, 3 in little-endian order")
    tensors, fields = cursor.count(_MOST_TENSORS, "tensors"), cursor.count(_MOST_FIELDS, "fields")
    alignment = gguf.GGUF_DEFAULT_ALIGNMENT
    for _ in range(fields):
        name, kind = cursor.take(cursor.number(8)), cursor.number(4)
        if name == b"general.alignment":
            alignment = _alignment(kind, cursor)
        else:
            cursor.value(kind)
    spans = sorted(_span(cursor, alignment) for _ in range(tensors))
    start = cursor.at + -cursor.at % alignment
    end = 0
    for offset, size in spans:
        if offset < end:
            raise ValueError("its tensors overlap")
        end = offset + size
    if start + end > len(data):
        raise ValueError("it ends inside its tensors")


def _alignment(kind: int, cursor: _Cursor) -> int:
    alignment = cursor.number(4)
    if kind != Value.UINT32 or not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError("general.alignment is no power of two")
    return alignment


def _span(cursor: _Cursor, alignment: int) -> tuple[int, int]:
    """(offset of a tensor's bytes from the end of the header, number of bytes)."""
    cursor.skip(cursor.number(8))
    dimensions = cursor.number(4)
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"a tensor has {dimensions} dimensions")
    shape = [cursor.number(8) for _ in range(dimensions)]
    block, size = gguf.GGML_QUANT_SIZES[Kind(cursor.number(4))]
    if min(shape) < 1 or shape[0] % block:
        raise ValueError(f"a tensor has the shape {shape[::-1]}, in blocks of {block}")
    if (offset := cursor.number(8)) % alignment:
        raise ValueError("a tensor isn't aligned")
    return offset, math.prod(shape) // block * size
