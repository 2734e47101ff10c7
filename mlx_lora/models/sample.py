"""The first rows of a model's weights, straight from its files: nothing is loaded, and no lazy array is evaluated.

An array of a lazily loaded model that is looked at stays in memory with all of its rows.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_lora import files
from mlx_lora.errors import ModelError
from mlx_lora.models.open import weight_files

HALVES = {"F16": mx.float16, "BF16": mx.bfloat16}


def half_precision_rows(path: Path, *, rows: int = 64) -> dict[str, mx.array]:
    """(rows, in) of every matrix that the files of the model directory hold in half precision, by its name there."""
    found = {}
    for file in weight_files(path):
        with open(file, "rb") as stream:
            for tensor in files.tensors(file, ModelError):
                if tensor.dtype in HALVES and len(tensor.shape) > 1 and 0 not in tensor.shape:
                    columns = tensor.shape[-1]
                    count = min(rows, int(np.prod(tensor.shape[:-1])))
                    stream.seek(tensor.start)
                    raw = np.frombuffer(stream.read(count * columns * 2), np.uint16)
                    found[tensor.name] = mx.array(raw).view(HALVES[tensor.dtype]).reshape(count, columns)
    return found
