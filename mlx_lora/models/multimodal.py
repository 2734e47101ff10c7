"""What a checkpoint holds beside the text model that trains here: vision, audio, projectors, processors.

mlx_lm drops such tensors on loading. They are copied from the source's files into a file of their own in what is
written, byte for byte and a chunk at a time, so a fused model sees as its base did. The file is in the index, from
which mlx_vlm takes the names of the files it reads. Knows nothing about adapters.
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
# The embedding once more as an output head, for mlx_vlm: see HEADS_APART.
HEAD_FILE = "model-head.safetensors"
# What prepares pictures and sound for such a model; it belongs to the model as its tokenizer does.
PROCESSOR_FILES = "*processor_config.json"
# Tells the files that are written here from those of the same names in a checkpoint from elsewhere.
_MARK = {"format": "mlx", "written_by": "mlx-lora"}


@dataclass(frozen=True)
class Extras:
    """Tensors and files that go along with a text model, tensors by the names they are written under."""

    tensors: dict[str, Tensor]
    processors: list[Path]
    stale: list[str]
    head: dict[str, mx.array]

    @property
    def bytes(self) -> int:
        return sum(tensor.length for tensor in self.tensors.values()) + sum(a.nbytes for a in self.head.values())

    def as_dict(self) -> dict[str, Any]:
        """`carried` of `--json`: how many tensors, the files they are in, and heads that were left out as stale."""
        written = [VISION_FILE] * bool(self.tensors) + [HEAD_FILE] * bool(self.head)
        names = written + [file.name for file in self.processors]
        return {"vision": len(self.tensors), "files": names, "stale": self.stale}


def extras(path: Path, weights: list[Path], model: nn.Module) -> Extras:
    """What the directory at `path` holds beside `model`, which was made of its weight files. Reads headers only."""
    own = dict(named_arrays(model))
    architecture = _architecture(model)
    prefixes = BESIDE_TEXT.get(architecture, ())
    found = [tensor for file in weights for tensor in files.tensors(file, ModelError) if tensor.name not in own]
    carried = {_renamed(tensor.name, architecture): tensor for tensor in found if tensor.name.startswith(prefixes)}
    stale = {prefix for tensor in found for prefix in STALE_HEADS if tensor.name.startswith(prefix)}
    head = _head_apart(model, architecture, own) if carried else {}
    return Extras(carried, sorted(path.glob(PROCESSOR_FILES)), sorted(stale), head)


def _head_apart(model: nn.Module, architecture: str, own: dict[str, mx.array]) -> dict[str, mx.array]:
    """The packed embedding under the name of the head that mlx_vlm looks for, where it would find none."""
    embedding, head = HEADS_APART.get(architecture, ("", ""))
    if f"{embedding}.scales" not in own or f"{head}.weight" in own:
        return {}
    return {name.replace(embedding, head): array for name, array in own.items() if name.startswith(f"{embedding}.")}


def tie_again(path: Path, model: nn.Module) -> None:
    """Undo what `HEAD_FILE` does to mlx_lm's model: the head is the embedding again, and isn't read a second time."""
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
    """Copy everything into `folder`, where the text model and its index have been written."""
    for file in carried.processors:
        shutil.copyfile(file, folder / file.name)
    if not carried.tensors:
        return
    # By size of their numbers, as safetensors itself orders them, so that each begins where its type may.
    in_order = sorted(carried.tensors.items(), key=lambda item: (-_alignment(item[1]), item[0]))
    header: dict[str, Any] = {"__metadata__": _MARK}
    end = 0
    for name, tensor in in_order:
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [end, end + tensor.length]}
        end += tensor.length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / VISION_FILE, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in in_order:
            stream.writelines(files.tensor_bytes(tensor, ModelError))
    held = dict.fromkeys(carried.tensors, VISION_FILE)
    if carried.head:
        mx.save_safetensors(str(folder / HEAD_FILE), carried.head, _MARK)
        held |= dict.fromkeys(carried.head, HEAD_FILE)
    index = json.loads((folder / INDEX).read_text())
    index["metadata"]["total_size"] += carried.bytes
    index["weight_map"] = dict(sorted({**index["weight_map"], **held}.items()))
    (folder / INDEX).write_text(json.dumps(index, indent=4))


def _alignment(tensor: Tensor) -> int:
    numbers = 1
    for size in tensor.shape:
        numbers *= size
    return tensor.length // numbers if numbers else 0


def text_files(weights: list[Path]) -> list[Path]:
    """Those of a directory's weight files that hold its text model: all but what `write` has written."""
    return [file for file in weights if file.name not in (VISION_FILE, HEAD_FILE) or not _is_ours(file)]


def _is_ours(file: Path) -> bool:
    return files.metadata(file, ModelError) == _MARK


def quantization(carried: Extras, source: dict[str, Any], written: dict[str, Any] | None, model: nn.Module) -> Any:
    """config.json's `quantization` for what is written: `written` describes the text model, or is None for a plain one.

    A source from mlx_vlm may have packed vision layers, in the format that its own config.json (`source`) names. They
    keep it by name, whatever the text model is packed in now.
    """
    modules = dict(model.named_modules())
    layers: dict[str, Any] = {}
    if carried.head:
        embedding, head = HEADS_APART[_architecture(model)]
        layers[head] = layer_settings(modules[embedding])
    packed = [name.removesuffix(".scales") for name in carried.tensors if name.endswith(".scales")]
    theirs = source.get("quantization")
    common: dict[str, Any] = {}
    if packed and isinstance(theirs, dict):
        common = {key: theirs[key] for key in ("mode", "bits", "group_size") if key in theirs}
        layers |= {path: theirs[path] if isinstance(theirs.get(path), dict) else common for path in packed}
    if written is None and layers:
        written = common | {path: False for path, module in modules.items() if hasattr(module, "to_quantized")}
    return written | layers if written else None
