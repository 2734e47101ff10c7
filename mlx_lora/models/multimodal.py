"""Carry along the parts of a checkpoint that aren't the text model: vision, audio, projectors, processors.

Only the text model trains here, and mlx_lm drops the other tensors on loading. They are copied from the source's files
into a separate file of the output, byte for byte and a chunk at a time, so a fused model handles images and sound as
its base did. The file is listed in the index, because mlx_vlm reads the files that the index names.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import files
from mlx_lora.errors import ModelError
from mlx_lora.files import Tensor
from mlx_lora.models.architectures import BESIDE_TEXT, BESIDE_TEXT_RENAMED, HEADS_APART, STALE_HEADS
from mlx_lora.models.index import INDEX
from mlx_lora.quant.quantize import layer_settings, named_arrays

VISION_FILE = "model-vision.safetensors"
# A copy of the embedding as an output head, for mlx_vlm: see HEADS_APART.
HEAD_FILE = "model-head.safetensors"
# Settings of the processors that prepare images and sound for such a model; a part of it, like its tokenizer.
PROCESSOR_FILES = "*processor_config.json"
# Metadata that identify the files written here: a checkpoint of other origin may have files of the same names.
_MARK = {"format": "mlx", "written_by": "mlx-lora"}


@dataclass(frozen=True)
class Extras:
    """Tensors and files that are copied beside a text model.

    `tensors`: by the name in the output. `processors`: files. `stale`: prefixes of heads that are left out. `head`: the
    copy of the embedding for HEAD_FILE.
    """

    tensors: dict[str, Tensor]
    processors: list[Path]
    stale: list[str]
    head: dict[str, mx.array]

    @property
    def bytes(self) -> int:
        return sum(tensor.length for tensor in self.tensors.values()) + sum(a.nbytes for a in self.head.values())

    def as_dict(self) -> dict[str, Any]:
        """`carried` of `--json`: the number of tensors, their files, and heads that were left out as stale."""
        written = [VISION_FILE] * bool(self.tensors) + [HEAD_FILE] * bool(self.head)
        names = written + [file.name for file in self.processors]
        return {"vision": len(self.tensors), "files": names, "stale": self.stale}


def extras(path: Path, weights: list[Path], model: nn.Module) -> Extras:
    """The extras of the directory at `path`, from whose weight files `model` was loaded. Reads only their headers."""
    text_arrays = dict(named_arrays(model))
    architecture = _architecture(model)
    prefixes = BESIDE_TEXT.get(architecture, ())
    unused = [
        tensor for file in weights for tensor in files.tensors(file, ModelError) if tensor.name not in text_arrays
    ]
    carried = {_renamed(tensor.name, architecture): tensor for tensor in unused if tensor.name.startswith(prefixes)}
    stale = {prefix for tensor in unused for prefix in STALE_HEADS if tensor.name.startswith(prefix)}
    head = _separate_head(architecture, text_arrays) if carried else {}
    return Extras(carried, sorted(path.glob(PROCESSOR_FILES)), sorted(stale), head)


def _separate_head(architecture: str, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """The quantized embedding under the name of the head that mlx_vlm needs, if the model has no such head."""
    embedding, head = HEADS_APART.get(architecture, ("", ""))
    if f"{embedding}.scales" not in arrays or f"{head}.weight" in arrays:
        return {}
    return {name.replace(embedding, head): array for name, array in arrays.items() if name.startswith(f"{embedding}.")}


def tie_again(path: Path, model: nn.Module) -> None:
    """Tie mlx_lm's model's head to the embedding again, so that it doesn't load the copy in `HEAD_FILE`."""
    file = path / HEAD_FILE
    if file.exists() and _is_ours(file):
        model.language_model.tie_word_embeddings = True
        model.language_model.pop("lm_head", None)


def _architecture(model: nn.Module) -> str:
    return type(model).__module__.rpartition(".")[2]


def _renamed(name: str, architecture: str) -> str:
    for old, new in BESIDE_TEXT_RENAMED.get(architecture, {}).items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def write(carried: Extras, folder: Path) -> None:
    """Copy all extras into `folder`, which already has the text model and its index."""
    for file in carried.processors:
        shutil.copyfile(file, folder / file.name)
    if not carried.tensors:
        return
    # Sorted by the bytes of a number, largest first, as safetensors does: then every tensor is aligned for its dtype.
    ordered = sorted(carried.tensors.items(), key=lambda item: (-_alignment(item[1]), item[0]))
    header: dict[str, Any] = {"__metadata__": _MARK}
    end = 0
    for name, tensor in ordered:
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [end, end + tensor.length]}
        end += tensor.length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / VISION_FILE, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            stream.writelines(files.tensor_bytes(tensor, ModelError))
    weight_map = dict.fromkeys(carried.tensors, VISION_FILE)
    if carried.head:
        mx.save_safetensors(str(folder / HEAD_FILE), carried.head, _MARK)
        weight_map |= dict.fromkeys(carried.head, HEAD_FILE)
    index = json.loads((folder / INDEX).read_text())
    index["metadata"]["total_size"] += carried.bytes
    index["weight_map"] = dict(sorted({**index["weight_map"], **weight_map}.items()))
    (folder / INDEX).write_text(json.dumps(index, indent=4))


def _alignment(tensor: Tensor) -> int:
    """Bytes of one number."""
    numbers = 1
    for size in tensor.shape:
        numbers *= size
    return tensor.length // numbers if numbers else 0


def text_files(weights: list[Path]) -> list[Path]:
    """Those of a directory's weight files that hold its text model: all except the files that `write` writes."""
    return [file for file in weights if file.name not in (VISION_FILE, HEAD_FILE) or not _is_ours(file)]


def _is_ours(file: Path) -> bool:
    return files.metadata(file, ModelError) == _MARK


def quantization(carried: Extras, source: dict[str, Any], written: dict[str, Any] | None, model: nn.Module) -> Any:
    """config.json's `quantization` for the output; `written` is that of the text model, None if it isn't quantized.

    A source from mlx_vlm may have quantized vision layers, in the format that its config.json (`source`) names. They
    keep that format, listed by layer, whatever the format of the text model is now.
    """
    modules = dict(model.named_modules())
    layers: dict[str, Any] = {}
    if carried.head:
        embedding, head = HEADS_APART[_architecture(model)]
        layers[head] = layer_settings(modules[embedding])
    packed = [name.removesuffix(".scales") for name in carried.tensors if name.endswith(".scales")]
    source_quantization = source.get("quantization")
    common: dict[str, Any] = {}
    if packed and isinstance(source_quantization, dict):
        common = {key: source_quantization[key] for key in ("mode", "bits", "group_size") if key in source_quantization}
        layers |= {
            path: source_quantization[path] if isinstance(source_quantization.get(path), dict) else common
            for path in packed
        }
    if written is None and layers:
        written = common | {path: False for path, module in modules.items() if hasattr(module, "to_quantized")}
    return written | layers if written else None
