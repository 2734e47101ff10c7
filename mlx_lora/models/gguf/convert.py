"""Convert a GGUF file to an MLX model directory that mlx-lm can load.

Only the architecture `llama` is supported (Llama, Mistral, SmolLM and the many models of that shape). Everything in a
file must be understood: settings and tensors that the result can't represent are refused by name, never dropped.

With `keep`, Q4_0, Q4_1 and Q8_0 matrices stay quantized without loss. Their blocks of 32 values are d·q + m. That is
MLX's affine mode in groups of 32, with the file's own float16 numbers (Q4_0: m = -8·d; Q8_0: q + 128 in 8 bits and
m = -128·d). Other quantized types, such as the K-quants, have no such form and become float16.

Rotary embedding rotates pairs of neighbouring values in llama.cpp, and the two halves of a head in MLX. So the rows of
q and k are permuted in the file. The permutation is undone on whole rows, quantized or not. `tokenizer.py`
converts the tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind

from mlx_lora import paths
from mlx_lora.errors import ModelError
from mlx_lora.models.gguf.config import (
    ARCHITECTURE,
    BITS,
    ROPE_FACTORS,
    Array,
    Layout,
    Tensors,
    check_kind,
    check_tensors,
    layout_of,
    open_gguf,
    read_config,
)
from mlx_lora.models.gguf.tokenizer import write_json, write_tokenizer

# All arrays that aren't quantized get one dtype, norms included. With `keep` it is float16, the dtype of the scales: on
# a GPU, a float32 norm would make all activations after it float32. Published norms were trained in bfloat16, and
# float16 represents them exactly; values beyond float16's range are refused.
DTYPES = {"keep": mx.float16, "float16": mx.float16, "float32": mx.float32}
GROUP = 32
SHARD_BYTES = 4 << 30
_CHUNK = 1 << 24  # values dequantized at a time, so that their float32 copies need little memory


@dataclass(frozen=True)
class _Source:
    """A checked file; `packed` maps the MLX paths of matrices that stay quantized to their bits."""

    tensors: Tensors
    config: dict[str, Any]
    layout: Layout
    packed: dict[str, int]
    dtype: mx.Dtype


def import_gguf(
    file: Path,
    out: Path,
    *,
    dtype: str = "keep",
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write an MLX model directory at `out` from the GGUF `file`; `out` appears only when it is complete.

    `dtype` is "keep" (matrices stay quantized if MLX has the same format, the rest becomes float16), or "float16" or
    "float32" to dequantize everything. `on_progress` is called with the number of finished tensors and of all tensors.

    Returns `out`, `architecture`, `bytes`, `dtype` of arrays that aren't quantized, `quantization` (the default group
    size, bits and mode, or None) and `tensors` (the number of each GGUF type). Raises ModelError for a file that is
    damaged or can't be converted exactly, NameTaken if `out` exists and `force` is false.
    """
    reader, fields = open_gguf(Path(file))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    check_kind(fields, tensors)
    config = read_config(fields, tensors, tensors.pop(ROPE_FACTORS, None))
    layout = layout_of(config)
    check_tensors(tensors, layout)
    kinds = {path: tensors[f"{stem}.weight"].tensor_type for stem, (path, _) in layout.items()}
    packed = {path: BITS[kind] for path, kind in kinds.items() if dtype == "keep" and kind in BITS}
    source = _Source(tensors, config, layout, packed, _dtype_of(dtype))
    config["torch_dtype"] = str(source.dtype).removeprefix("mlx.core.")
    quantization = _quantization(source)
    with paths.written_whole(Path(out), force=force) as directory:
        config |= write_tokenizer(fields, directory, context_length=config["max_position_embeddings"])
        _save(_arrays(source, on_progress or (lambda done, total: None)), directory)
        write_json(directory / "config.json", config | ({"quantization": quantization} if quantization else {}))
    return {
        "out": str(out),
        "architecture": ARCHITECTURE,
        "bytes": paths.directory_bytes(Path(out)),
        "dtype": config["torch_dtype"],
        "quantization": quantization and {key: quantization[key] for key in ("group_size", "bits", "mode")},
        "tensors": dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
    }


def _dtype_of(name: str) -> mx.Dtype:
    """The dtype of arrays that aren't quantized. Raises ModelError for an unknown name."""
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is not supported; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def _quantization(source: _Source) -> dict[str, Any] | None:
    """config.json's `quantization`: the most common bits as the default, exceptions by the module's path."""
    if not source.packed:
        return None
    bits = Counter(source.packed.values()).most_common(1)[0][0]
    quantization: dict[str, Any] = {"group_size": GROUP, "bits": bits, "mode": "affine"}
    for path, shape in source.layout.values():
        if len(shape) > 1 and path not in source.packed:
            quantization[path] = False
        elif source.packed.get(path, bits) != bits:
            quantization[path] = {"group_size": GROUP, "bits": source.packed[path], "mode": "affine"}
    return quantization


def _arrays(source: _Source, on_progress: Callable[[int, int], None]) -> Iterator[dict[str, mx.array]]:
    """MLX's arrays by name, one tensor of the file at a time, so that at most one shard is in memory."""
    heads = {"attn_q": source.config["num_attention_heads"], "attn_k": source.config["num_key_value_heads"]}
    for done, (name, tensor) in enumerate(source.tensors.items(), start=1):
        stem, _, part = name.rpartition(".")
        path, data = source.layout[stem][0], tensor.data
        if count := heads.get(stem.rpartition(".")[2]):
            data = data[_rotary_order(len(data), count)]
        if path in source.packed and part == "weight":
            yield {f"{path}.{key}": array for key, array in _pack(name, data, tensor.tensor_type).items()}
        else:
            yield {f"{path}.{part}": _dequantize(name, data, tensor.tensor_type, source.dtype)}
        on_progress(done, len(source.tensors))
    # MLX's llama has biases on all projections of a block or on none, so biases missing in the file become zeros.
    for stem, (path, shape) in source.layout.items():
        flag = {"self_attn": "attention_bias", "mlp": "mlp_bias"}.get(path.split(".")[-2:][0])
        if flag and source.config[flag] and f"{stem}.bias" not in source.tensors:
            yield {f"{path}.bias": mx.zeros(shape[0], source.dtype)}


def _rotary_order(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """For each row in MLX's order (halves of a head), the index of that row in llama.cpp's order (pairs)."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


@np.errstate(over="ignore", invalid="ignore")  # values that aren't finite are refused below
def _pack(name: str, data: Array, kind: Kind) -> dict[str, mx.array]:
    """MLX's packed weight (uint32), scales and biases (float16) of (rows, bytes) in blocks of 32 values."""
    blocks = np.ascontiguousarray(data).reshape(len(data), -1, gguf.GGML_QUANT_SIZES[kind][1])
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
    biases = scales * np.float16(-128 if kind == Kind.Q8_0 else -8)
    if kind == Kind.Q8_0:
        values = blocks[..., 2:] ^ 0x80
    else:
        # In GGUF a byte holds the values i and i + 16 of its block, in MLX two neighbours, the first in its low bits.
        nibbles = np.concatenate([blocks[..., -16:] & 0x0F, blocks[..., -16:] >> 4], axis=-1)
        values = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    if kind == Kind.Q4_1:
        biases = np.ascontiguousarray(blocks[..., 2:4]).view("<f2")[..., 0]
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        raise ModelError(f"{name} goes beyond float16, or is damaged", hint="--dtype float32")
    weight = np.ascontiguousarray(values).reshape(len(data), -1).view("<u4")
    return {"weight": mx.array(weight), "scales": mx.array(scales), "biases": mx.array(biases)}


@np.errstate(over="ignore", invalid="ignore")  # values that aren't finite are refused below
def _dequantize(name: str, data: Array, kind: Kind, dtype: mx.Dtype) -> mx.array:
    """The values of a tensor of any type in `dtype`, dequantized some rows at a time."""
    rows, chunks = np.atleast_2d(data), []
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        try:
            values = gguf.quants.dequantize(np.ascontiguousarray(rows[start : start + step]), kind)
        except NotImplementedError:
            raise ModelError(f"{name}: tensor type {kind.name} is not supported") from None
        chunks.append(mx.array(values).astype(dtype))
        if not mx.isfinite(chunks[-1]).all().item():
            wider = None if dtype == mx.float32 else "--dtype float32"
            raise ModelError(f"{name} goes beyond {dtype}, or is damaged", hint=wider)
    return mx.concatenate(chunks) if data.ndim > 1 else chunks[0][0]


def _save(converted: Iterator[dict[str, mx.array]], directory: Path) -> None:
    """Write model.safetensors, or several files of at most SHARD_BYTES (or one tensor) and their index."""
    pending: dict[str, mx.array] = {}
    files: dict[str, str] = {}
    total = number = 0

    def write(name: str) -> None:
        mx.save_safetensors(str(directory / name), pending, metadata={"format": "mlx"})
        files.update(dict.fromkeys(pending, name))
        pending.clear()

    for arrays in converted:
        size = sum(array.nbytes for array in arrays.values())
        if pending and sum(array.nbytes for array in pending.values()) + size > SHARD_BYTES:
            number += 1
            write(f"model-{number:05d}.safetensors")
        pending |= arrays
        total += size
    write(f"model-{number + 1:05d}.safetensors" if number else "model.safetensors")
    if number:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        write_json(directory / "model.safetensors.index.json", index)
