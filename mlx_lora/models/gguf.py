"""A GGUF file on disk becomes an MLX model directory that mlx-lm loads as it is.

One architecture, `llama` (Llama, Mistral, SmolLM and the many models of that shape), because everything a file says
has to be understood: what has no place in the result is refused by name, never dropped.

Under `keep`, Q4_0, Q4_1 and Q8_0 matrices stay packed without loss. Their blocks of 32 values are d·q + m, which is
MLX's affine mode in groups of 32 with the file's own float16 numbers (Q4_0: m = -8·d; Q8_0: q + 128 in 8 bits and
m = -128·d). Other quantized types, the K-quants among them, have no such form and become plain float16.

llama.cpp rotates neighbouring pairs of a head, MLX a head's halves, so the rows of q and k stand permuted in the file;
the order is undone on whole rows, packed or not. The tokenizer is `gguf_tokenizer.py`'s business.
"""

from __future__ import annotations

import mmap
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
from gguf import GGUFValueType as Value

from mlx_lora import paths
from mlx_lora.errors import ModelError
from mlx_lora.models.gguf_tokenizer import write_json, write_tokenizer

ARCHITECTURE = "llama"
# Everything that isn't packed gets one dtype, norms included: under `keep` it is the scales' float16, because a float32
# norm would turn every activation after it to float32 on a GPU. Nothing is lost where norms were trained in bfloat16,
# as published ones are; values that don't fit are refused.
DTYPES = {"keep": mx.float16, "float16": mx.float16, "float32": mx.float32}
GROUP = 32
BITS = {Kind.Q4_0: 4, Kind.Q4_1: 4, Kind.Q8_0: 8}
SHARD_BYTES = 4 << 30
_CHUNK = 1 << 24  # values dequantized at a time: their float32 copies stay small beside the tensor
_ROPE_FACTORS = "rope_freqs.weight"
# Settings that change what a model computes and that MLX's llama has no counterpart for.
_REFUSED = (
    "attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "attention.sliding_window",
    "attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "residual_scale", "embedding_scale",
    "use_parallel_residual", "rope.scaling.alpha", "rope.scaling.yarn_log_multiplier",
)  # fmt: skip
_SCALAR_BYTES = {int(kind): number().itemsize for kind, number in gguf.GGUFReader.gguf_scalar_to_np.items()}

Fields = dict[str, Any]
Layout = dict[str, tuple[str, tuple[int, ...]]]
Tensors = dict[str, gguf.ReaderTensor]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Source:
    """A file whose every part is understood; `packed` gives the bits of matrices that stay packed, by path in MLX."""

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
    """Write an MLX model directory at `out` from the GGUF `file`; it appears whole or not at all.

    `dtype` is "keep" (packed where MLX packs without loss, float16 elsewhere), or "float16" or "float32" for everything
    dequantized. `on_progress` is called with the tensors done and their number.

    Returns `out`, `architecture`, `bytes`, `dtype` of what isn't packed, `quantization` (the default group size, bits
    and mode, or None) and `tensors` (how many of each GGUF type). Raises ModelError for a file that is damaged or that
    can't be carried over as it is, NameTaken when `out` exists and `force` is false.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not supported; known: {', '.join(DTYPES)}")
    reader, fields = _open(Path(file))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _check_kind(fields, tensors)
    config = _config(fields, tensors, tensors.pop(_ROPE_FACTORS, None))
    layout = _layout(config)
    _check_tensors(tensors, layout)
    kinds = {path: tensors[f"{stem}.weight"].tensor_type for stem, (path, _) in layout.items()}
    packed = {path: BITS[kind] for path, kind in kinds.items() if dtype == "keep" and kind in BITS}
    source = _Source(tensors, config, layout, packed, DTYPES[dtype])

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


def _open(file: Path) -> tuple[gguf.GGUFReader, Fields]:
    """The file behind gguf's reader, and its metadata; ModelError unless it is a whole GGUF file."""
    try:
        with open(file, "rb") as handle:
            if handle.read(4) != b"GGUF":
                raise ModelError(f"{file}: not a GGUF file")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _check_header(data)
        reader = gguf.GGUFReader(file)
        return reader, {name: field.contents() for name, field in reader.fields.items()}
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ModelError(f"{file}: not a GGUF file ({error.strerror})") from None
    except (OSError, LookupError, ValueError, OverflowError, TypeError) as error:  # what damage makes the reader raise
        raise ModelError(f"{file}: truncated or damaged GGUF file ({error})", hint="get the file again") from error


def _check_header(data: mmap.mmap) -> None:
    """Follow every length of the metadata; ValueError or KeyError where one leads outside the file.

    The reader slices past the end in silence, and builds objects for as many elements as a damaged count claims.
    """
    at = 4

    def number(size: int) -> int:
        nonlocal at
        at += size
        if at > len(data):
            raise ValueError("it ends inside its metadata")
        return int.from_bytes(data[at - size : at], "little")

    def skip(kind: int) -> None:
        kind, count = (number(4), number(8)) if kind == Value.ARRAY else (kind, 1)
        for _ in range(count if kind == Value.STRING else 1):
            number(number(8) if kind == Value.STRING else _SCALAR_BYTES[kind] * count)

    version, _, fields = number(4), number(8), number(8)
    if version not in (2, 3):
        raise ValueError(f"version {version}; known: 2, 3 in little-endian order")
    for _ in range(fields):
        skip(Value.STRING)
        skip(number(4))


def _check_kind(fields: Fields, tensors: Tensors) -> None:
    """Raise ModelError for what isn't one whole model of a known architecture."""
    if (kind := fields.get("general.type", "model")) != "model":
        raise ModelError(f"the file is of type {kind!r}, not a model")
    if (architecture := fields.get("general.architecture")) != ARCHITECTURE:
        known = f"{ARCHITECTURE} (Llama, Mistral, SmolLM)"
        raise ModelError(f"GGUF architecture {architecture!r} is not supported; known: {known}")
    if (parts := fields.get("split.count", 1)) > 1:
        raise ModelError(f"the file is one of {parts} parts", hint="join them first: llama-gguf-split --merge")
    if not fields.get("llama.attention.causal", True):
        raise ModelError("attention in both directions is not supported")
    if fields.get("llama.expert_count") or any("_exps." in name for name in tensors):
        raise ModelError("mixture of experts is not supported yet")
    if found := [name for name in _REFUSED if fields.get(f"llama.{name}")]:
        raise ModelError(f"the model needs settings that MLX's llama lacks: {', '.join(found)}")


def _config(fields: Fields, tensors: Tensors, factors: gguf.ReaderTensor | None) -> dict[str, Any]:
    """config.json for mlx_lm's llama, from the `llama.*` metadata and the embedding's shape."""
    hidden, heads = _setting(fields, "embedding_length"), _setting(fields, "attention.head_count")
    kv_heads = _setting(fields, "attention.head_count_kv", heads)
    head_dim = _setting(fields, "attention.key_length", hidden // heads)
    layers = _setting(fields, "block_count")
    if layers > len(tensors) or "token_embd.weight" not in tensors:
        raise ModelError(f"the file's {len(tensors)} tensors are too few for {layers} layers and an embedding")
    if heads % kv_heads or head_dim % 2:
        raise ModelError(f"{heads} heads, {kv_heads} key heads and {head_dim} values a head don't fit together")
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := _setting(fields, key, head_dim)) != head_dim:
            raise ModelError(f"llama.{key} {size} differs from the head size {head_dim}, which MLX's llama lacks")
    vocabulary = int(tensors["token_embd.weight"].shape[-1])
    if len(fields.get("tokenizer.ggml.tokens") or []) > vocabulary:
        raise ModelError(f"the file names more tokens than its embedding's {vocabulary} rows")
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": _setting(fields, "feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": _setting(fields, "context_length"),
        "rms_norm_eps": _setting(fields, "attention.layer_norm_rms_epsilon", kind=float),
        "rope_theta": _setting(fields, "rope.freq_base", 10000.0, kind=float),
        "attention_bias": any(".attn_" in name and name.endswith(".bias") for name in tensors),
        "mlp_bias": any(".ffn_" in name and name.endswith(".bias") for name in tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if scaling := _rope_scaling(fields, config, np.ones(1) if factors is None else factors.data):
        config["rope_scaling"] = scaling
    return config


def _setting(fields: Fields, key: str, default: Any = None, *, kind: type[int] | type[float] = int) -> Any:
    """A positive number of the architecture, one for all layers."""
    value = fields.get(f"llama.{key}", default)
    if not isinstance(value, kind) or not 0 < value < float("inf"):
        raise ModelError(f"llama.{key} is {value!r}, not a positive {kind.__name__}")
    # The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06.
    return float(str(np.float32(value))) if kind is float else value


def _rope_scaling(fields: Fields, config: dict[str, Any], factors: Array) -> dict[str, Any] | None:
    """The `rope_scaling` of config.json that rotates as llama.cpp does; ModelError where there is none."""
    kind = fields.get("llama.rope.scaling.type", "linear")
    factor = fields.get("llama.rope.scaling.factor") or fields.get("llama.rope.scale_linear") or 1.0
    neutral = ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")
    if all(fields.get(f"llama.rope.scaling.{name}", 1.0) == 1.0 for name in neutral):
        if kind == "none" or (kind in ("linear", "yarn") and factor == 1.0):
            return None if np.all(factors == 1.0) else _llama3_scaling(config, factors)
        if kind == "linear" and np.all(factors == 1.0):
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn" and np.all(factors == 1.0):
            original = fields.get("llama.rope.scaling.original_context_length", config["max_position_embeddings"])
            fast = fields.get("llama.rope.scaling.yarn_beta_fast", 32.0)
            slow = fields.get("llama.rope.scaling.yarn_beta_slow", 1.0)
            limits = {"original_max_position_embeddings": original, "beta_fast": fast, "beta_slow": slow}
            return {"rope_type": "yarn", "factor": factor, **limits}
    settings = {key.removeprefix("llama."): value for key, value in fields.items() if ".rope.scal" in key}
    also = "" if np.all(factors == 1.0) else f" with {_ROPE_FACTORS}"
    raise ModelError(f"this rope scaling is not supported: {settings}{also}; known: linear, yarn, llama3")


def _llama3_scaling(config: dict[str, Any], factors: Array) -> dict[str, Any]:
    """Llama 3's rope settings, in whose place the file holds the divisor of each frequency.

    The divisor is 1 for short waves, `factor` for long ones, and between them 1 / ((1-s)/factor + s) with
    s = (original/wave - low) / (high - low). All published models share low 1, high 4 and original 8192; other
    settings would not give back the file's divisors, and are refused.
    """
    low, high, original, factor = 1.0, 4.0, 8192, float(factors.max())
    exponents = np.arange(0, config["head_dim"], 2) / config["head_dim"]
    waves = 2 * np.pi * config["rope_theta"] ** exponents
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    if factors.shape != waves.shape or not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-5):
        raise ModelError(f"{_ROPE_FACTORS} is not Llama 3's rope scaling, and MLX's llama has no place for another")
    limits = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    return {"rope_type": "llama3", "factor": factor, **limits}


def _layout(config: dict[str, Any]) -> Layout:
    """Name of a tensor in the file, without `.weight` -> its path in MLX and the shape of its weight."""
    hidden, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    block: Layout = {
        "attn_norm": ("input_layernorm", (hidden,)),
        "attn_q": ("self_attn.q_proj", (queries, hidden)),
        "attn_k": ("self_attn.k_proj", (keys, hidden)),
        "attn_v": ("self_attn.v_proj", (keys, hidden)),
        "attn_output": ("self_attn.o_proj", (hidden, queries)),
        "ffn_norm": ("post_attention_layernorm", (hidden,)),
        "ffn_gate": ("mlp.gate_proj", (inner, hidden)),
        "ffn_up": ("mlp.up_proj", (inner, hidden)),
        "ffn_down": ("mlp.down_proj", (hidden, inner)),
    }
    layout: Layout = {"token_embd": ("model.embed_tokens", (rows, hidden)), "output_norm": ("model.norm", (hidden,))}
    if not config["tie_word_embeddings"]:
        layout["output"] = ("lm_head", (rows, hidden))
    for n in range(config["num_hidden_layers"]):
        layout |= {f"blk.{n}.{name}": (f"model.layers.{n}.{path}", shape) for name, (path, shape) in block.items()}
    return layout


def _check_tensors(tensors: Tensors, layout: Layout) -> None:
    """Raise one ModelError for all tensors that are missing, unknown, of another shape, or packed vectors."""
    faults = [f"{stem}.weight is missing" for stem in layout if f"{stem}.weight" not in tensors]
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        shape = tuple(int(size) for size in reversed(tensor.shape))
        expected = layout.get(stem, ("", ()))[1]
        if part == "bias":
            expected = expected[:1] if stem.startswith("blk.") and len(expected) == 2 else ()
        if not expected or part not in ("weight", "bias"):
            faults.append(f"{name} is unknown")
        elif shape != expected:
            faults.append(f"{name} has shape {shape}, not {expected}")
        elif len(shape) == 1 and tensor.tensor_type in BITS:
            faults.append(f"{name} is a vector in {tensor.tensor_type.name}")
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ModelError(f"the file's tensors are not those of its architecture: {'; '.join(faults[:5])}{more}")


def _quantization(source: _Source) -> dict[str, Any] | None:
    """config.json's `quantization`: the commonest bits as the default, and every module that differs by its path."""
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
    """MLX's arrays by name, one tensor of the file after another, so that never more than a shard is in memory."""
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
    # MLX's llama has a bias on all of a block's projections or on none; zeros stand for the ones the file lacks.
    for stem, (path, shape) in source.layout.items():
        flag = {"self_attn": "attention_bias", "mlp": "mlp_bias"}.get(path.split(".")[-2:][0])
        if flag and source.config[flag] and f"{stem}.bias" not in source.tensors:
            yield {f"{path}.bias": mx.zeros(shape[0], source.dtype)}


def _rotary_order(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """For each row in MLX's order, two halves a head, the row that holds it in llama.cpp's order of pairs."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


@np.errstate(over="ignore", invalid="ignore")  # what isn't finite is refused
def _pack(name: str, data: Array, kind: Kind) -> dict[str, mx.array]:
    """MLX's packed weight (uint32), scales and biases (float16) of (rows, bytes) in blocks of 32 values."""
    blocks = np.ascontiguousarray(data).reshape(len(data), -1, gguf.GGML_QUANT_SIZES[kind][1])
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
    biases = scales * np.float16(-128 if kind == Kind.Q8_0 else -8)
    if kind == Kind.Q8_0:
        values = blocks[..., 2:] ^ 0x80
    else:
        # A byte holds the values i and i + 16 of its block; MLX wants neighbours side by side, low bits first.
        nibbles = np.concatenate([blocks[..., -16:] & 0x0F, blocks[..., -16:] >> 4], axis=-1)
        values = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    if kind == Kind.Q4_1:
        biases = np.ascontiguousarray(blocks[..., 2:4]).view("<f2")[..., 0]
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        raise ModelError(f"{name} goes beyond float16, or is damaged", hint="--dtype float32")
    weight = np.ascontiguousarray(values).reshape(len(data), -1).view("<u4")
    return {"weight": mx.array(weight), "scales": mx.array(scales), "biases": mx.array(biases)}


@np.errstate(over="ignore", invalid="ignore")  # what isn't finite is refused
def _dequantize(name: str, data: Array, kind: Kind, dtype: mx.Dtype) -> mx.array:
    """The values of a tensor of any type in `dtype`, some rows at a time."""
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
