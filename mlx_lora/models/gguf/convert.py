"""Convert a GGUF file to an MLX model directory that mlx-lm can load.

`names.py` lists the architectures. Everything in a file that changes what its model computes must be understood:
settings and tensors that the result can't represent are refused by name, never dropped.

With `keep`, matrices stay packed where MLX has the file's form (`packing.py`), and other quantized types, such as Q6_K
and the IQ types, become float16, or with `pack` are quantized again. Every change of a value is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from gguf import GGMLQuantizationType as Kind

from mlx_lora import paths
from mlx_lora.errors import ModelError
from mlx_lora.models.gguf.config import check_kind, check_tensors, read_config, unknown_keys
from mlx_lora.models.gguf.packing import FORMS, GROUP, Form
from mlx_lora.models.gguf.reader import Tensors, open_gguf
from mlx_lora.models.gguf.tensors import Architecture, Layout, layout_of
from mlx_lora.models.gguf.tokenizer import write_json, write_tokenizer
from mlx_lora.models.gguf.values import Losses, packed, unpacked

# All arrays that aren't quantized get one dtype, norms included. With `keep` it is float16, the dtype of the scales: on
# a GPU, a float32 norm would make all activations after it float32. Published norms were trained in bfloat16, and
# float16 represents them exactly; values beyond float16's range are refused.
DTYPES = {"keep": mx.float16, "float16": mx.float16, "float32": mx.float32}
PACKED_BITS = (2, 3, 4, 5, 6, 8)
SHARD_BYTES = 4 << 30
_PLAIN = (Kind.F32, Kind.F16, Kind.BF16, Kind.F64)


@dataclass(frozen=True)
class _Model:
    """A checked file; `forms` are the packed matrices' by name in the file."""

    tensors: Tensors
    layout: Layout
    forms: dict[str, Form]
    dtype: mx.Dtype
    losses: Losses


def import_gguf(
    file: Path,
    out: Path,
    *,
    dtype: str = "keep",
    pack_bits: int | None = None,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write an MLX model directory at `out` from the GGUF `file`; `out` appears only when it is complete.

    `file` may be any part of a split model. `dtype` is "keep" (matrices stay packed if MLX has the same form, the rest
    becomes float16), or "float16" or "float32" to dequantize everything. With `pack_bits` (2, 3, 4, 5, 6 or 8),
    quantized matrices without such a form are quantized again, in groups of 32. `on_progress` gets the number of
    finished tensors and of all tensors.

    Returns `out`, `architecture`, `bytes`, `dtype` of arrays that aren't quantized, `quantization` (the default group
    size, bits and mode, or None), `tensors` (the number of each GGUF type), `errors` (the relative error of each type
    that changed) and `notes` (what was left out). Raises ModelError for a file that is damaged or can't be converted,
    NameTaken if `out` exists and `force` is false.
    """
    half = _dtype_of(dtype, pack_bits)
    source = open_gguf(Path(file))
    kinds = dict(Counter(tensor.kind.name for tensor in source.tensors.values()))
    architecture = check_kind(source)
    config = read_config(architecture, source)
    layout = layout_of(architecture, config)
    check_tensors(source.tensors, layout, [kind for kind in Kind if kind not in _PLAIN])
    model = _Model(source.tensors, layout, _forms(source.tensors, layout, dtype, pack_bits), half, Losses())
    quantization = _write(model, source.fields, config, Path(out), force, on_progress or (lambda done, total: None))
    return {
        "out": str(out),
        "architecture": architecture.name,
        "bytes": paths.directory_bytes(Path(out)),
        "dtype": config["torch_dtype"],
        "quantization": quantization and {key: quantization[key] for key in ("group_size", "bits", "mode")},
        "tensors": kinds,
        "errors": model.losses.errors(),
        "notes": _notes(architecture, source.fields, config, model),
    }


def _write(
    model: _Model,
    fields: dict[str, Any],
    config: dict[str, Any],
    out: Path,
    force: bool,
    on_progress: Callable[[int, int], None],
) -> dict[str, Any] | None:
    """Write the whole directory, complete `config`, and return config.json's `quantization`."""
    config["torch_dtype"] = str(model.dtype).removeprefix("mlx.core.")
    quantization = _quantization(model)
    with paths.written_whole(out, force=force) as directory:
        ids = write_tokenizer(fields, directory, context_length=config["max_position_embeddings"])
        _save(_arrays(model, config, on_progress), directory)
        write_json(directory / "config.json", config | ids | ({"quantization": quantization} if quantization else {}))
    return quantization


def _dtype_of(name: str, pack_bits: int | None) -> mx.Dtype:
    """The dtype of arrays that aren't quantized. Raises ModelError for an unknown name or number of bits."""
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is not supported; known: {', '.join(DTYPES)}")
    if pack_bits is not None and pack_bits not in PACKED_BITS:
        raise ModelError(f"{pack_bits} bits are not supported; known: {', '.join(map(str, PACKED_BITS))}")
    if pack_bits is not None and name != "keep":
        raise ModelError(f"dtype {name} dequantizes everything, so nothing is left to pack", hint="--dtype keep")
    return DTYPES[name]


def _forms(tensors: Tensors, layout: Layout, dtype: str, pack_bits: int | None) -> dict[str, Form]:
    """MLX's form of each matrix that stays packed, or is packed again with `pack_bits`, by its name in the file."""
    forms: dict[str, Form] = {}
    for name, tensor in layout.items() if dtype == "keep" else ():
        kind = tensors[f"{name}.weight"].kind
        if tensor.kind not in ("linear", "embedding", "experts") or kind in _PLAIN:
            continue
        if kind in FORMS:
            forms[name] = FORMS[kind]
        elif pack_bits and tensor.shape[-1] % GROUP == 0:
            forms[name] = Form(pack_bits, exact=False)
    return forms


def _quantization(model: _Model) -> dict[str, Any] | None:
    """config.json's `quantization`: the most common form as the default, exceptions by the module's path."""
    if not model.forms:
        return None
    common = Counter((form.bits, form.mode) for form in model.forms.values()).most_common(1)[0][0]
    quantization: dict[str, Any] = Form(*common).settings
    for name, tensor in model.layout.items():
        form = model.forms.get(name)
        if form is None and tensor.kind in ("linear", "embedding", "experts"):
            quantization[tensor.path] = False
        elif form is not None and (form.bits, form.mode) != common:
            quantization[tensor.path] = form.settings
    return quantization


def _notes(architecture: Architecture, fields: dict[str, Any], config: dict[str, Any], model: _Model) -> list[str]:
    """What the directory lacks of the file, and where MLX computes otherwise than llama.cpp, in one sentence each."""
    notes = []
    if unknown := unknown_keys(architecture, fields):
        notes.append(f"left out metadata that is not known: {', '.join(unknown)}")
    wide = Counter(
        model.tensors[f"{name}.weight"].kind.name
        for name, tensor in model.layout.items()
        if tensor.kind in ("linear", "embedding", "experts") and name not in model.forms
    )
    for kind in _PLAIN:
        wide.pop(kind.name, None)
    if wide and model.dtype == mx.float16 and model.forms:
        named = ", ".join(f"{count} of {kind}" for kind, count in wide.items())
        notes.append(f"matrices without a packed form in MLX became float16 ({named}); --pack 6 keeps them small")
    if architecture.name == "gemma2" and config["sliding_window"] < config["max_position_embeddings"]:
        notes.append(f"mlx_lm computes gemma2 without its window of {config['sliding_window']} tokens")
    if config.get("rope_scaling", {}).get("rope_type") == "longrope":
        original = config["rope_scaling"]["original_max_position_embeddings"]
        notes.append(f"mlx_lm rotates texts below {original} tokens by the factors for long texts too")
    return notes


def _arrays(
    model: _Model, config: dict[str, Any], on_progress: Callable[[int, int], None]
) -> Iterator[dict[str, mx.array]]:
    """MLX's arrays by name, one tensor of the file at a time, so that at most one shard is in memory."""
    for done, (name, stored) in enumerate(model.tensors.items(), start=1):
        stem, _, part = name.rpartition(".")
        tensor = model.layout[stem]
        data, kind = stored.data, stored.kind
        if stem in model.forms and part == "weight":
            arrays = packed(name, tensor, data, kind, model.forms[stem], model.losses)
            yield {f"{tensor.path}.{key}": array for key, array in arrays.items()}
        else:
            parameter = "bias" if part == "bias" else tensor.parameter
            yield {f"{tensor.path}.{parameter}": unpacked(name, tensor, data, kind, model.dtype, model.losses)}
        on_progress(done, len(model.tensors))
    # MLX's llama has biases on all projections of a block or on none, so biases missing in the file become zeros.
    for stem, tensor in model.layout.items():
        flag = {"self_attn": "attention_bias", "mlp": "mlp_bias"}.get(tensor.path.split(".")[-2:][0])
        if flag and tensor.bias == "optional" and config.get(flag) and f"{stem}.bias" not in model.tensors:
            yield {f"{tensor.path}.bias": mx.zeros(tensor.shape[:-1], model.dtype)}


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
