"""The number formats of a merged GGUF file: which there are, who makes them, and which tensor gets which."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType as FileType
from numpy.typing import NDArray

from mlx_lora.errors import ModelError, nearest
from mlx_lora.models.gguf.tensors import Tensor

ROWS_BYTES = 1 << 26  # bytes of float32 values quantized at a time
WRITTEN = {
    "f32": (Kind.F32, FileType.ALL_F32),
    "f16": (Kind.F16, FileType.MOSTLY_F16),
    "bf16": (Kind.BF16, FileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, FileType.MOSTLY_Q8_0),
    "q5_1": (Kind.Q5_1, FileType.MOSTLY_Q5_1),
    "q5_0": (Kind.Q5_0, FileType.MOSTLY_Q5_0),
    "q4_1": (Kind.Q4_1, FileType.MOSTLY_Q4_1),
    "q4_0": (Kind.Q4_0, FileType.MOSTLY_Q4_0),
}
# Formats that llama.cpp makes itself, from the same model in f16.
BY_LLAMA_CPP = {
    name: FileType[f"MOSTLY_{name.upper()}"]
    for name in (
        "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "iq4_nl", "iq4_xs",
    )
}  # fmt: skip
TYPES = (*WRITTEN, *BY_LLAMA_CPP)
PLAIN = (Kind.F32, Kind.F16, Kind.BF16)
# Small matrices that llama.cpp leaves in float32: an expert's router, and a convolution of a few taps.
PRECISE = ("ffn_gate_inp", "shortconv.conv")


@dataclass(frozen=True)
class Form:
    """What is asked for: `name` of TYPES, `kind` of most matrices in the file written here, llama.cpp's `file_type`."""

    name: str
    kind: Kind
    file_type: FileType

    @property
    def by_llama_cpp(self) -> bool:
        return self.name in BY_LLAMA_CPP


def form_of(name: str) -> Form:
    """The form called `name`. Raises ModelError naming those there are."""
    if name in WRITTEN:
        return Form(name, *WRITTEN[name])
    if name in BY_LLAMA_CPP:
        return Form(name, Kind.F16, BY_LLAMA_CPP[name])
    raise ModelError(f"GGUF type {name!r} is not known{nearest(name, TYPES)}")


def kind_of(tensor: Tensor, form: Form, *, tied: bool) -> Kind:
    """The format of a tensor's weight, as llama.cpp chooses it where it can be written here.

    Vectors are F32. The output head, or the embedding that is one, has at least 8 bits (llama.cpp takes Q6_K, which
    can't be written here). Rows that blocks of 32 don't divide stay F16.
    """
    if len(tensor.shape) == 1 or tensor.name.endswith(PRECISE):
        return Kind.F32
    if form.kind in PLAIN:
        return form.kind
    if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[form.kind][0]:
        return Kind.F16
    head = tensor.name == "output" or (tied and tensor.name == "token_embd")
    return Kind.Q8_0 if head else form.kind


def stored_bytes(shape: tuple[int, ...], kind: Kind) -> int:
    """Bytes of a tensor in a file."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=np.int64)) // block * size


def encoded(name: str, values: NDArray[np.float32], kind: Kind) -> NDArray[np.uint8]:
    """The bytes of float32 values in a file, quantized some rows at a time.

    Raises ModelError for values that the format can't hold.
    """
    rows = values.reshape(-1, values.shape[-1])
    result = np.empty((len(rows), stored_bytes((rows.shape[1],), kind)), np.uint8)
    step = max(1, ROWS_BYTES // (4 * rows.shape[1]))
    for start in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[start : start + step], np.float32)
        with np.errstate(over="ignore"):
            result[start : start + step] = gguf.quants.quantize(part, kind).view(np.uint8)
        if not np.isfinite(part).all() or (kind == Kind.F16 and np.abs(part).max(initial=0) > np.finfo(np.float16).max):
            raise ModelError(f"{name}: its values go beyond {kind.name}", hint="--type bf16 or f32 holds them")
    return result


def decoded(data: NDArray[np.uint8], shape: tuple[int, ...], kind: Kind) -> NDArray[np.float32]:
    """The float32 values that `encoded` stored."""
    plain = {Kind.F32: np.float32, Kind.F16: np.float16}
    given = data.view(plain[kind]) if kind in plain else data
    return np.asarray(gguf.quants.dequantize(given, kind), np.float32).reshape(shape)
