"""Read the structure of a GGUF file: its metadata, and where each tensor's bytes are.

All numbers are limited, by the file's size or by a limit above that of any real model, before anything is made of them.
(gguf's own reader checks none of them, and needs half a minute for a vocabulary of 262144 tokens.) `config.py`
interprets the metadata.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value

from mlx_lora.models.gguf.tensors import Array

# numpy's types of the scalars, by their number in the file.
_SCALARS = {int(kind): np.dtype(number).newbyteorder("<") for kind, number in gguf.GGUFReader.gguf_scalar_to_np.items()}
_PLAIN = {Kind.F16: "<f2", Kind.F32: "<f4", Kind.F64: "<f8"}
# The largest models have some hundred fields, some thousand tensors, and half a million merges.
_MOST_FIELDS, _MOST_TENSORS, _MOST_ELEMENTS = 1 << 14, 1 << 17, 1 << 22
_MOST_DIMENSIONS, _MOST_ALIGNMENT = 4, 1 << 20

Fields = dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """One tensor of a file. `shape` has rows first.

    `data` is mapped, not read: values of `shape` for F16, F32 and F64, bytes (…, bytes of a row) for other types.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    data: Array


class _Cursor:
    """Reads a mapped file from start to end; ValueError if it ends too early."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.elements = data, 0, 0

    def take(self, size: int) -> bytes:
        self.at += size
        if self.at > len(self.data):
            raise ValueError("it ends inside its metadata")
        return self.data[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        return self.take(self.number(8)).decode("utf-8")

    def count(self, limit: int, what: str) -> int:
        if (count := self.number(8)) > limit:
            raise ValueError(f"it claims {count} {what}; the limit is {limit}")
        return count

    def value(self, kind: int) -> Any:
        """A value of type `kind`; KeyError for an unknown type, or an array of arrays."""
        if kind == Value.STRING:
            return self.text()
        if kind != Value.ARRAY:
            return np.frombuffer(self.take(_SCALARS[kind].itemsize), _SCALARS[kind])[0].item()
        kind, count = self.number(4), self.number(8)
        self.elements += count
        if kind != Value.STRING and _SCALARS[kind].itemsize * count > len(self.data) - self.at:
            raise ValueError("it ends inside its metadata")
        if self.elements > _MOST_ELEMENTS:
            raise ValueError(f"its arrays have more than {_MOST_ELEMENTS} elements")
        if kind == Value.STRING:
            return [self.text() for _ in range(count)]
        return np.frombuffer(self.take(_SCALARS[kind].itemsize * count), _SCALARS[kind]).tolist()


def read_header(file: Path) -> tuple[Fields, list[Stored]]:
    """The metadata and the tensors of a file; ValueError or KeyError if anything in it is invalid or points outside."""
    with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data)
        cursor.take(4)  # the magic
        if (version := cursor.number(4)) not in (2, 3):
            raise ValueError(f"version {version}; known: 2, 3 in little-endian order")
        tensors, count = cursor.count(_MOST_TENSORS, "tensors"), cursor.count(_MOST_FIELDS, "fields")
        fields: Fields = {}
        alignment = gguf.GGUF_DEFAULT_ALIGNMENT
        for _ in range(count):
            name, kind = cursor.text(), cursor.number(4)
            if name in fields:
                raise ValueError(f"it has {name} twice")
            fields[name] = cursor.value(kind)
            if name == "general.alignment":
                alignment = _alignment(kind, fields[name])
        infos = [_info(cursor, alignment) for _ in range(tensors)]
        start = cursor.at + -cursor.at % alignment
        _check_spans(infos, len(data) - start)
    whole = np.memmap(file, np.uint8, "r").view(np.ndarray)
    return fields, [_stored(info, whole[start:]) for info in infos]


def _alignment(kind: int, alignment: int) -> int:
    if kind != Value.UINT32 or not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError("general.alignment is no power of two")
    return alignment


@dataclass(frozen=True)
class _Info:
    """A tensor as the header lists it: `offset` in bytes from the end of the header, `size` in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    offset: int
    size: int


def _info(cursor: _Cursor, alignment: int) -> _Info:
    name = cursor.text()
    dimensions = cursor.number(4)
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"a tensor has {dimensions} dimensions")
    shape = tuple(cursor.number(8) for _ in range(dimensions))[::-1]
    kind = Kind(cursor.number(4))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise ValueError(f"a tensor has the shape {list(shape)}, in blocks of {block}")
    if (offset := cursor.number(8)) % alignment:
        raise ValueError("a tensor isn't aligned")
    return _Info(name, shape, kind, offset, math.prod(shape) // block * size)


def _check_spans(infos: list[_Info], available: int) -> None:
    end = 0
    for info in sorted(infos, key=lambda info: (info.offset, info.size)):
        if info.offset < end:
            raise ValueError("its tensors overlap")
        end = info.offset + info.size
    if end > available:
        raise ValueError("it ends inside its tensors")
    if len({info.name for info in infos}) != len(infos):
        raise ValueError("two of its tensors have the same name")


def _stored(info: _Info, data: Array) -> Stored:
    values = data[info.offset : info.offset + info.size]
    if info.kind in _PLAIN:
        return Stored(info.name, info.shape, info.kind, values.view(_PLAIN[info.kind]).reshape(info.shape))
    return Stored(info.name, info.shape, info.kind, values.reshape(*info.shape[:-1], -1))
