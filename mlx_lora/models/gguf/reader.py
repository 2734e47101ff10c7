"""Open a GGUF file, or all parts of a model that was split into several, and check the types of its metadata."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from mlx_lora import files
from mlx_lora.errors import ModelError
from mlx_lora.models.gguf.header import Fields, Stored, read_header

ENDINGS = (".gguf", "")  # some programs store such files without an ending
# Required types of the metadata keys that are used here, because the format allows any type for any key.
_TEXTS = re.compile(
    r"general\.(architecture|type)|[\w-]+\.rope\.scaling\.type|tokenizer\.ggml\.(model|pre)|tokenizer\.chat_template"
)
_LISTS = {
    "tokenizer.ggml.tokens": str, "tokenizer.ggml.merges": str,
    "tokenizer.ggml.token_type": int, "tokenizer.ggml.scores": float,
}  # fmt: skip
_INTEGERS = re.compile(r"split\.(count|no|tensors\.count)|tokenizer\.ggml\.\w+_token_id")
_NUMBERS = re.compile(r"[\w-]+\.rope\.(scaling\.(?!type$|finetuned$).+|scale_linear)")
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

Tensors = dict[str, Stored]


@dataclass(frozen=True)
class Source:
    """The metadata and the tensors of one model, from one file or all of its parts; tensors are mapped, not read."""

    fields: Fields
    tensors: Tensors


def open_gguf(file: Path) -> Source:
    """The model in a GGUF file, or in all parts of which `file` is one; ModelError unless it is complete.

    The parts of a split model are named "…-00001-of-00003.gguf" and stand side by side. The first has the metadata.
    """
    fields, stored = _open(file)
    parts = fields.get("split.count", 1)
    if parts <= 1:
        return Source(fields, {tensor.name: tensor for tensor in stored})
    fields, tensors = {}, Tensors()
    paths = _parts(file, parts)
    for number, path in enumerate(paths):
        own, stored = _open(path)
        if own.get("split.no") != number or own.get("split.count") != parts:
            raise ModelError(f"{path}: not part {number + 1} of {parts}, though its name says so")
        fields = fields or own
        if twice := [tensor.name for tensor in stored if tensor.name in tensors]:
            raise ModelError(f"{path}: has tensors that another part has too: {', '.join(twice[:5])}")
        tensors |= {tensor.name: tensor for tensor in stored}
    if (expected := fields.get("split.tensors.count", len(tensors))) != len(tensors):
        raise ModelError(f"the {parts} parts of {paths[0]} have {len(tensors)} tensors together, not {expected}")
    return Source(fields, tensors)


def _parts(file: Path, count: int) -> list[Path]:
    """The paths of all parts of a model; ModelError if one is absent or the name is not a part's."""
    name = _PART.fullmatch(file.name)
    if not name or int(name["count"]) != count:
        raise ModelError(
            f"{file}: one of {count} parts, and its name doesn't lead to the others",
            hint=f"name them NAME-00001-of-{count:05d}.gguf and so on",
        )
    paths = [file.with_name(f"{name['stem']}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    if absent := [path.name for path in paths if not path.is_file()]:
        raise ModelError(f"{file}: one of {count} parts; missing beside it: {', '.join(absent)}")
    return paths


def _open(file: Path) -> tuple[Fields, list[Stored]]:
    """The metadata and the tensors of one file; ModelError unless it is a complete GGUF file."""
    try:
        if fault := files.fault(file):
            raise ModelError(f"{file}: not a GGUF file, it {fault}")
        if file.suffix not in ENDINGS:
            raise ModelError(f"{file}: not a GGUF file by its name", hint="give it the ending .gguf, if it is one")
        with open(file, "rb") as handle:
            if handle.read(4) != b"GGUF":
                raise ModelError(f"{file}: not a GGUF file")
        fields, tensors = read_header(file)
    except (OSError, LookupError, ValueError, OverflowError) as error:
        raise ModelError(f"{file}: truncated or damaged GGUF file ({error})", hint="get the file again") from error
    _check_types(fields)
    return fields, tensors


def _check_types(fields: Fields) -> None:
    """Raise one ModelError for all keys used here whose values have a wrong type."""
    faults = []
    for key, value in fields.items():
        if _TEXTS.fullmatch(key):
            fits = isinstance(value, str)
        elif key in _LISTS:
            fits = isinstance(value, list) and all(isinstance(element, _LISTS[key]) for element in value)
        elif _INTEGERS.fullmatch(key):
            fits = isinstance(value, int)
        else:
            fits = isinstance(value, int | float) and math.isfinite(value) if _NUMBERS.fullmatch(key) else True
        faults += [] if fits else [key]
    if faults:
        raise ModelError(f"the file's metadata has values of the wrong type: {', '.join(faults[:5])}")
