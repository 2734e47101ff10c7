"""What the first fields of a GGUF file say of it, without reading its vocabulary or its tensors."""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# Sizes of the format's scalars by their number; a string and an array have numbers of their own.
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING = 8
# Writers put `general.…` first, and the vocabulary, which is an array, after the settings.
_MOST_FIELDS, _LONGEST = 64, 1 << 16


@dataclass(frozen=True)
class Head:
    """`architecture` is `general.architecture`; `type` is `general.type`: model, adapter, mmproj; "" where unsaid."""

    architecture: str
    type: str

    @property
    def is_model(self) -> bool:
        """Whether the file is a language model; projectors of vision and adapters are files beside one."""
        return self.type in ("", "model") and self.architecture != "clip"


def read_head(file: Path) -> Head:
    """The head of a GGUF file. Raises ValueError where it isn't one, or doesn't say its architecture; OSError."""
    if not stat.S_ISREG(os.stat(file).st_mode):  # a named pipe would keep its reader waiting
        raise ValueError("not a regular file")
    with open(file, "rb") as stream:
        if _take(stream, 4) != b"GGUF":
            raise ValueError("not a GGUF file")
        (version,) = struct.unpack("<I", _take(stream, 4))
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version}")
        _, fields = struct.unpack("<QQ", _take(stream, 16))
        found: dict[str, str] = {}
        for _ in range(min(fields, _MOST_FIELDS)):
            name = _string(stream)
            (kind,) = struct.unpack("<I", _take(stream, 4))
            if kind == _STRING and name.startswith("general."):
                found[name] = _string(stream)
            elif not _skipped(stream, kind) or found.keys() >= {"general.architecture", "general.type"}:
                break
    if "general.architecture" not in found:
        raise ValueError("it doesn't say its architecture")
    return Head(found["general.architecture"], found.get("general.type", ""))


def _skipped(stream: BinaryIO, kind: int) -> bool:
    """Go past a value; False for an array, behind which nothing is looked for."""
    if kind == _STRING:
        (length,) = struct.unpack("<Q", _take(stream, 8))
        if length > _LONGEST << 8:
            raise ValueError("a text in it is longer than any")
        stream.seek(length, 1)
        return True
    if kind not in _BYTES:
        return False
    stream.seek(_BYTES[kind], 1)
    return True


def _string(stream: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", _take(stream, 8))
    if length > _LONGEST:
        raise ValueError("a text in it is longer than any")
    return _take(stream, length).decode("utf-8", errors="replace")


def _take(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise ValueError("it ends inside its metadata")
    return content
