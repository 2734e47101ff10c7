"""Files from elsewhere, checked before any library reads them: kind, size, first bytes, and safetensors headers.

Knows nothing of models, adapters or rows. A file that is a pickle, by name or by content, is never opened further:
reading one runs code. What can't be a plain file (a pipe, a device, a directory) would be read for ever, or not at all.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mlx_lora.errors import MlxLoraError

# Endings of files that can hold a pickle, whatever is inside.
PICKLES = frozenset((".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"))
# First bytes of what is sometimes renamed; a pickle's are its protocol, 2 to 5.
_DISGUISES = {
    b"PK\x03\x04": "a zip archive, as PyTorch keeps pickles in",
    b"\x93NUMPY": "a numpy array file, which can hold a pickle",
    **{bytes((0x80, protocol)): "a pickle, and reading one runs code" for protocol in range(2, 6)},
}
# What stands in a repository for a large file that Git LFS keeps elsewhere.
LFS_POINTER = "a Git LFS pointer, not the file itself"
_LFS_START = b"version https://git-lfs.github.com/spec/v1"
_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}

# Most bytes of a configuration, an index, a recipe or a template; and of a vocabulary, as in tokenizer.json.
SMALL, LARGE = 32 << 20, 256 << 20
# Most levels of JSON. What reads it later walks it with a stack.
DEEPEST = 100

# Bytes of a safetensors header, as in the library; the largest dimension MLX has, and more of them than any tensor has.
_LONGEST_HEADER, _LARGEST_DIMENSION, _MOST_DIMENSIONS = 100_000_000, 2**31 - 1, 8
_CHUNK = 1 << 24
# What MLX reads, by safetensors' names; float8 as the bytes it is.
_DTYPES = frozenset(
    ("BOOL", "U8", "U16", "U32", "U64", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "C64", "F8_E4M3", "F8_E8M0")
)


def inside(path: Path, root: Path) -> bool:
    """Whether `path` lies in `root`, wherever links lead."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def fault(file: Path, *, most: int | None = None, archive: bool = False) -> str | None:
    """Why `file` isn't read: no plain file, more than `most` bytes, a pickle or an archive. None when it may be.

    `archive` is for kinds of files that are zip archives.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            return f"is {_KINDS.get(stat.S_IFMT(status.st_mode), 'a device')}, not a file"
        if file.suffix.lower() in PICKLES:
            return f"is never opened: a {file.suffix} file can be a pickle, and reading one runs code"
        if most is not None and status.st_size > most:
            return f"has {status.st_size / 1e6:.0f} MB, more than any such file needs ({most / 1e6:.0f} MB)"
        return _disguise(file, archive)
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        return f"can't be read ({getattr(error, 'strerror', None) or error})"


def _disguise(file: Path, archive: bool = False) -> str | None:
    with open(file, "rb") as stream:
        start = stream.read(len(_LFS_START))
    if start == _LFS_START:
        return f"is {LFS_POINTER}"
    if archive and start.startswith(b"PK"):
        return None
    return next((f"is {kind}" for first, kind in _DISGUISES.items() if start.startswith(first)), None)


def read_text(file: Path, error: type[MlxLoraError], *, most: int = SMALL) -> str:
    """The text of a UTF-8 file that `fault` has nothing against; else `error`."""
    if found := fault(file, most=most):
        raise error(f"{file}: {found}")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{file}: can't be read ({problem})") from None


def read_json(file: Path, error: type[MlxLoraError], *, finite: bool = False) -> Any:
    """The value of a JSON file; `error` for anything else, and with `finite` for NaN and infinity too."""
    hooks: dict[str, Any] = {"parse_float": _finite, "parse_constant": _finite} if finite else {}
    if found := fault(file, most=SMALL):
        raise error(f"{file}: {found}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"), **hooks)
    except RecursionError:
        raise error(f"{file}: not readable as JSON (nested too deeply)") from None
    except (OSError, ValueError) as problem:
        raise error(f"{file}: not readable as JSON ({problem})") from None
    if too_deep(value):
        raise error(f"{file}: not readable as JSON (nested too deeply)")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a number here")
    return value


def too_deep(value: Any) -> bool:
    """Whether a JSON value has more than DEEPEST levels."""
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def mappings(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object inside a value, itself first."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield value
        if isinstance(value, dict | list):
            pending += _inside(value)


def safetensors_fault(file: Path) -> str | None:
    """What keeps a safetensors file from being loaded: its header's length, JSON, types, shapes, offsets. None if fine.

    The safetensors library checks that tensors fill the file in order, without gaps, each with the bytes its shape and
    type need. Names given twice and what MLX can't hold are left to this function.
    """
    try:
        # A sound header may begin like a pickle does, so the first bytes count only once the file isn't safetensors.
        if not stat.S_ISREG(file.stat().st_mode):
            return f"not a readable safetensors file, it {fault(file)}"
        with safe_open(file, framework="numpy"):
            pass
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, _LONGEST_HEADER)), object_pairs_hook=_unique)
        for name, tensor in header.items():
            if name != "__metadata__":
                _check_tensor(name, tensor)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        found = fault(file)
        return f"not a readable safetensors file{f', it {found}' if found else f' ({error})'}"
    return None


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in a safetensors file; `dtype` is the format's own name, `start` counts from the file's."""

    name: str
    dtype: str
    shape: list[int]
    file: Path
    start: int
    length: int


def tensors(file: Path, error: type[MlxLoraError]) -> Iterator[Tensor]:
    """The tensors of a safetensors file by its header alone; `error` where it can't be read."""
    header, data = _header(file, error)
    with _readable(file, error):
        for name, info in header.items():
            if name != "__metadata__":
                start, end = info["data_offsets"]
                yield Tensor(name, info["dtype"], info["shape"], file, data + start, end - start)


def metadata(file: Path, error: type[MlxLoraError]) -> Any:
    """What a safetensors file says of itself in its header, or None; `error` where it can't be read."""
    return _header(file, error)[0].get("__metadata__")


def _header(file: Path, error: type[MlxLoraError]) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and where its data begins."""
    with _readable(file, error), open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > file.stat().st_size:
            raise ValueError("the header is longer than the file")
        return dict(json.loads(stream.read(length)).items()), 8 + length


@contextmanager
def _readable(file: Path, error: type[MlxLoraError]) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error, OverflowError) as problem:
        raise error(f"{file}: not a readable safetensors file ({problem})") from None


def tensor_bytes(tensor: Tensor, error: type[MlxLoraError]) -> Iterator[bytes]:
    """The bytes of a tensor, a chunk at a time; `error` where the file ends before the tensor does."""
    with open(tensor.file, "rb") as stream:
        stream.seek(tensor.start)
        left = tensor.length
        while left > 0:
            chunk = stream.read(min(_CHUNK, left))
            if not chunk:
                raise error(f"{tensor.file}: ends before its tensors do")
            left -= len(chunk)
            yield chunk


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is given twice")
    return values


def _check_tensor(name: str, tensor: dict[str, Any]) -> None:
    if tensor["dtype"] not in _DTYPES:
        raise ValueError(f"{name} has type {tensor['dtype']}, which MLX doesn't have")
    if len(tensor["shape"]) > _MOST_DIMENSIONS or any(size > _LARGEST_DIMENSION for size in tensor["shape"]):
        raise ValueError(f"{name} has a shape that MLX can't hold")


@contextmanager
def refusing(error: type[MlxLoraError], message: str) -> Iterator[None]:
    """Turn whatever a library raises over a damaged file into one `error`: the message and the first line of its own.

    A panic in a library written in Rust is no Exception; leaving the process to it would be a traceback.
    """
    try:
        yield
    except MlxLoraError:
        raise
    except BaseException as problem:
        if not isinstance(problem, Exception) and type(problem).__name__ != "PanicException":
            raise
        lines = str(problem).strip().splitlines()
        raise error(f"{message}: {lines[0][:300] if lines else ''} ({type(problem).__name__})") from problem
