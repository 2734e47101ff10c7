"""Fingerprints: what a base, a tokenizer or a set of weights is, independent of where and in how many files it lies.

A model's fingerprint is the sha256 over its tensors' names, dtypes, shapes and bytes in name order. Of a directory it
is computed once and remembered by path, size and modification time of its files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora import files, paths
from mlx_lora.errors import ModelError
from mlx_lora.models import multimodal
from mlx_lora.models.chat_format import ChatFormat
from mlx_lora.models.open import weight_files
from mlx_lora.models.save import tokenizer_files
from mlx_lora.models.shards import DTYPES
from mlx_lora.quant.quantize import named_arrays


def of_directory(path: Path) -> str:
    """Fingerprint of the weights in a model directory, from its safetensors files without loading them.

    Vision that `models.load.save` carried along doesn't count: an adapter belongs to the text model.
    Raises ModelError when the directory has none, or damaged ones.
    """
    weights = multimodal.text_files(weight_files(path))
    if not weights:
        raise ModelError(f"{path}: has no weights, model*.safetensors")
    key = json.dumps([[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in weights])
    key = hashlib.sha256(key.encode()).hexdigest()
    remembered = _remembered()
    if key not in remembered:
        tensors = {tensor.name: tensor for file in weights for tensor in files.tensors(file, ModelError)}
        found = _digest(
            (name, tensor.dtype, tensor.shape, files.tensor_bytes(tensor, ModelError))
            for name, tensor in sorted(tensors.items())
        )
        remembered[key] = {"fingerprint": found, "path": str(path.resolve())}
        _remember(remembered)
    return remembered[key]["fingerprint"]


def places(fingerprint: str) -> list[Path]:
    """Directories of which `of_directory` gave this fingerprint on this machine; they may be gone or changed."""
    return [Path(seen["path"]) for seen in _remembered().values() if seen["fingerprint"] == fingerprint]


def of_model(model: nn.Module) -> str:
    """Fingerprint of a loaded model's tensors as they are now; equals `of_directory` of the same model saved."""

    def tensors() -> Iterator[tuple[str, str, list[int], Iterable[bytes]]]:
        for name, array in sorted(named_arrays(model), key=lambda pair: pair[0]):
            dtype = DTYPES[str(array.dtype).rpartition(".")[2]]
            raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
            yield name, dtype, list(array.shape), [np.array(raw).tobytes()]

    return _digest(tensors())


def of_tokenizer(path: Path) -> str:
    """sha256 over the files of a model directory that make its tokenizer."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
    return _of_files(file for file in tokenizer_files(path) if file.name in names)


def of_template(chats: ChatFormat) -> str | None:
    """sha256 of the chat template's text, or None without one."""
    template = chats.template or getattr(chats.tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(template).encode()).hexdigest() if template else None


def _of_files(parts: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in parts:
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _digest(tensors: Iterable[tuple[str, str, list[int], Iterable[bytes]]]) -> str:
    digest = hashlib.sha256()
    for name, dtype, shape, chunks in tensors:
        digest.update(f"{name}\0{dtype}\0{shape}\0".encode())
        for chunk in chunks:
            digest.update(chunk)
    return digest.hexdigest()


def _cache_file() -> Path:
    return paths.home() / "fingerprints.json"


def _remembered() -> dict[str, dict[str, str]]:
    """What was computed, and of which directory; entries of any other form are computed anew."""
    try:
        values = dict(json.loads(_cache_file().read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
    return {
        key: seen for key, seen in values.items() if isinstance(seen, dict) and {"fingerprint", "path"} <= seen.keys()
    }


def _remember(values: dict[str, dict[str, str]]) -> None:
    temporary = _cache_file().with_suffix(f".{os.getpid()}")
    with suppress(OSError):  # a home that can't be written to costs time, and serves what is in it
        with paths.created(temporary) as stream:
            stream.write(json.dumps(values).encode())
        temporary.replace(_cache_file())
