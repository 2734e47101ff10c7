"""A model's tensors written to safetensors files one module at a time, so that a lazy model is never whole in memory.

MLX's own writer evaluates every tensor of a file before the first byte is written, and a file holds 5 GB. Here the
header is written first, from shapes and dtypes that are known without computing anything; then each module's tensors
are computed, written and freed. File names, sizes and the index are mlx_lm's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from mlx_lora.machine import allocation
from mlx_lora.models.index import INDEX

with allocation.file_limits_kept():
    import mlx_lm.utils as mlx_lm_utils

# MLX's dtype names, as safetensors writes them.
DTYPES = {
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "uint32": "U32", "uint8": "U8", "int8": "I8",
    "int32": "I32", "int64": "I64", "uint16": "U16", "int16": "I16", "uint64": "U64", "bool": "BOOL",
}  # fmt: skip

Named = list[tuple[str, mx.array]]


def write_shards(
    folder: Path,
    arrays: Named,
    *,
    parameters: int,
    computed_with: Mapping[str, mx.array] | None = None,
    on_module: Callable[[], None] = lambda: None,
) -> None:
    """Write named arrays, those of a module side by side, and their index; empties `arrays` as it goes.

    What the caller holds no other reference to is freed once it is written. `parameters` is the number that the index
    states. `computed_with` has arrays by module path that are evaluated together with the tensors of that module, for
    what is computed from the same source: that source is freed afterwards.
    """
    shards = [list(shard.items()) for shard in mlx_lm_utils.make_shards(dict(arrays))]
    arrays.clear()
    total, files = 0, dict[str, str]()
    for number in range(len(shards)):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        shard, shards[number] = shards[number], []
        total += sum(array.nbytes for _, array in shard)
        files |= dict.fromkeys((tensor for tensor, _ in shard), name)
        with open(folder / name, "wb") as stream:
            stream.write(_header(shard))
            for _ in _write_modules(stream, shard, computed_with or {}):
                on_module()
    index = {
        "metadata": {"total_size": total, "total_parameters": parameters},
        "weight_map": dict(sorted(files.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=4))


def _header(shard: Named) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, array in shard:
        dtype = DTYPES[str(array.dtype).rpartition(".")[2]]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_modules(stream: BinaryIO, shard: Named, computed_with: Mapping[str, mx.array]) -> Iterator[None]:
    """Compute, write and free the tensors of one module after another."""
    sizes = [(path, len(list(named))) for path, named in groupby(shard, key=lambda pair: _module(pair[0]))]
    shard.reverse()  # popped from its end: nothing else may hold what is written
    for path, count in sizes:
        module = [shard.pop()[1] for _ in range(count)]
        mx.eval(module, computed_with.get(path, []))
        while module:
            for part in _parts(module.pop(0)):
                stream.write(part)
        mx.clear_cache()
        yield


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _parts(array: mx.array, *, size: int = 1 << 24) -> Iterator[memoryview]:
    """The bytes of an array, a part of its leading rows at a time: only a part is ever copied."""
    if array.ndim == 0 or not array.size:
        array = array.reshape(-1)
    rows = max(size // max(math.prod(array.shape[1:]) * array.itemsize, 1), 1)
    for start in range(0, array.shape[0], rows):
        part = mx.contiguous(array[start : start + rows])
        yield np.array(part.view(mx.uint16) if part.dtype == mx.bfloat16 else part).data
