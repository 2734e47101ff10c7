"""A loaded model becomes a directory that mlx_lm loads, with what its own directory holds beside the text model."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_lora import paths
from mlx_lora.machine import allocation
from mlx_lora.models import multimodal
from mlx_lora.models.layers import release
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.open import read_config, weight_files
from mlx_lora.models.shards import Named, write_shards
from mlx_lora.quant.quantize import named_arrays

with allocation.file_limits_kept():
    import mlx_lm.utils as mlx_lm_utils

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """What `save` wrote: bytes of the directory, and what went along with the text model."""

    bytes: int
    extras: multimodal.Extras


def save(
    loaded: LoadedModel,
    out: Path,
    *,
    force: bool = False,
    free: bool = False,
    computed_with: Mapping[str, mx.array] | None = None,
    renamed: Callable[[Named], Named] = lambda arrays: arrays,
    on_module: Callable[[], None] = lambda: None,
) -> Saved:
    """Write a model directory that mlx_lm loads as it is, unless in nf4. Appears whole, or not.

    What the model's own directory holds beside the text model (vision, audio, processors) goes along unchanged. With
    `free` the model's arrays are computed, written and freed a module at a time, and the model can't run afterwards;
    `computed_with` has arrays by module path that are evaluated together with that module's own. `renamed` gives the
    model's arrays the names that another program has for them.
    """
    extras = multimodal.extras(loaded.path, weight_files(loaded.path), loaded.model)
    config = dict(loaded.config)
    if packed := multimodal.quantization(extras, read_config(loaded.path), config.get("quantization"), loaded.model):
        config["quantization"] = packed
    if config.get("vision_config") and not extras.tensors:
        log.info("%s: its vision part is not known here, what is written is the text model alone", loaded.path)
    arrays = renamed(named_arrays(loaded.model))
    needs = sum(array.nbytes for _, array in arrays) + extras.bytes
    parameters = mlx_lm_utils.get_total_parameters(loaded.model)
    with paths.written_whole(out, force=force, needs=needs) as folder:
        if free:
            release(loaded.model)
        write_shards(folder, arrays, parameters=parameters, computed_with=computed_with, on_module=on_module)
        multimodal.write(extras, folder)
        mlx_lm_utils.save_config(config, folder / "config.json", keep_vision_config=bool(extras.tensors))
        for file in tokenizer_files(loaded.path):
            shutil.copyfile(file, folder / file.name)
    return Saved(paths.directory_bytes(out), extras)


def tokenizer_files(path: Path) -> Iterator[Path]:
    """The files of a model directory that belong to its tokenizer."""
    return (path / name for name in TOKENIZER_FILES if (path / name).is_file())
