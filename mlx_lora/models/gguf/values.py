"""The values of one tensor of a GGUF file as MLX's arrays, converted some rows at a time, and what that changed."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Kind

from mlx_lora.errors import ModelError
from mlx_lora.models.gguf.packing import FORMS, GROUP, Form, pack
from mlx_lora.models.gguf.tensors import Array, Tensor

_CHUNK = 1 << 24  # values converted at a time, so that their float32 copies need little memory


class Losses:
    """Sums, by type of tensor, the squares of all values that could change and of their changes."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, kind: Kind, before: mx.array, after: mx.array) -> None:
        """Count float32 values before and after a conversion."""
        changed, whole = self._sums.get(kind.name, (0.0, 0.0))
        changed += mx.square(after.astype(mx.float32) - before).sum().item()
        self._sums[kind.name] = changed, whole + mx.square(before).sum().item()

    def errors(self) -> dict[str, float]:
        """Root mean square of the changes over that of the values, by type of tensor, where something changed."""
        return {kind: (changed / whole) ** 0.5 for kind, (changed, whole) in self._sums.items() if changed and whole}


def unpacked(name: str, tensor: Tensor, data: Array, kind: Kind, dtype: mx.Dtype, losses: Losses) -> mx.array:
    """A tensor of any type as MLX's plain array in `dtype`: a weight of `tensor.mlx_shape`, or the tensor's bias.

    Raises ModelError for an unsupported type and for values beyond `dtype`.
    """
    chunks = []
    bias = name.endswith(".bias")
    for _, values in _float32(name, tensor.rows_to_mlx(data), kind):
        before = mx.array(values - 1 if tensor.plus_one else values)
        chunks.append(before.astype(dtype))
        if not mx.isfinite(chunks[-1]).all().item():
            wider = None if dtype == mx.float32 else "--dtype float32"
            raise ModelError(f"{name} goes beyond {dtype}, or is damaged", hint=wider)
        if dtype != mx.float32 and kind != Kind.F16:
            losses.add(kind, before, chunks[-1])
    return mx.concatenate(chunks).reshape(tensor.shape[:-1] if bias else tensor.mlx_shape)


def packed(name: str, tensor: Tensor, data: Array, kind: Kind, form: Form, losses: Losses) -> dict[str, mx.array]:
    """A quantized matrix as MLX's `weight`, `scales` and, in the affine mode, `biases`, scales and biases float16.

    The file's own numbers are kept if its type has a packed form; otherwise the values are quantized again.
    """
    rows = tensor.rows_to_mlx(data).reshape(-1, data.shape[-1])
    parts: list[dict[str, mx.array]] = []
    if form.exact:
        step = _rows_at_once(tensor.shape[-1])
        parts = [pack(name, rows[start : start + step], kind) for start in range(0, len(rows), step)]
    else:
        for start, values in _float32(name, rows, kind):
            before = mx.array(values)
            if not mx.isfinite(before).all().item():
                raise ModelError(f"{name} has values that are not finite: the file is damaged")
            chunk = rows[start : start + len(values)]
            parts.append(pack(name, chunk, kind) if kind in FORMS else _quantized(name, before, form))
            losses.add(kind, before, _restored(parts[-1], form))
    whole = {key: mx.concatenate([part[key] for part in parts]) for key in parts[0]}
    return {key: array.reshape(*tensor.shape[:-1], -1) for key, array in whole.items()}


def _quantized(name: str, values: mx.array, form: Form) -> dict[str, mx.array]:
    weight, scales, biases = mx.quantize(values, group_size=GROUP, bits=form.bits)
    part = {"weight": weight, "scales": scales.astype(mx.float16), "biases": biases.astype(mx.float16)}
    if not all(mx.isfinite(part[key]).all().item() for key in ("scales", "biases")):
        raise ModelError(f"{name} goes beyond float16, or is damaged", hint="--dtype float32")
    return part


def _restored(part: dict[str, mx.array], form: Form) -> mx.array:
    scales, biases = (part[key].astype(mx.float32) for key in ("scales", "biases"))
    return mx.dequantize(part["weight"], scales, biases, group_size=GROUP, bits=form.bits)


def _rows_at_once(columns: int) -> int:
    return max(1, _CHUNK // columns)


def _float32(name: str, data: Array, kind: Kind) -> Iterator[tuple[int, Array]]:
    """(index of the first row, float32 values) of some rows at a time; a vector counts as one row after another."""
    rows = data.reshape(-1, data.shape[-1]) if data.ndim > 1 else data[None]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    step = _rows_at_once(rows.nbytes // len(rows) // size * block)
    for start in range(0, len(rows), step):
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # values that aren't finite are refused by the callers
                values = gguf.quants.dequantize(np.ascontiguousarray(rows[start : start + step]), kind)
        except NotImplementedError:
            raise ModelError(f"{name}: tensor type {kind.name} is not supported") from None
        yield start, np.asarray(values, np.float32)
