"""An opened model directory becomes a model on this device: weights as stored, or ready to compute."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora import files
from mlx_lora.config import Quantize
from mlx_lora.errors import ModelError
from mlx_lora.machine import allocation, device
from mlx_lora.models import index, multimodal, token_ids
from mlx_lora.models.config_faults import naming_settings
from mlx_lora.models.open import Model, open_model
from mlx_lora.quant import nf4
from mlx_lora.quant.matmul import use_fast_multiply
from mlx_lora.quant.quantize import Quantized, named_arrays, pack, pack_lazily, quantize

with allocation.file_limits_kept():
    import mlx_lm.utils as mlx_lm_utils

# The parts of a config.json that describe a model inside a larger one.
PARTS = ("text_config", "vision_config", "audio_config")
log = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """A base on this device. `dtype` is what activations are computed in, `stored` what the files hold."""

    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    path: Path
    stored: mx.Dtype
    quantized: Quantized | None = None
    dtype: mx.Dtype = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = device.activation_dtype(self.stored)


def load(model: Model, *, quantization: Quantize | None = None) -> LoadedModel:
    """Load a model, quantized on the way when asked, ready to compute on this device.

    On a CPU every float parameter becomes float32 and packed layers get a fast multiply; on a GPU nothing is cast.
    Raises ModelError for anything missing, unsupported or unsafe.
    """
    return ready(load_stored(model, quantization=quantization))


def load_stored(
    model: Model,
    *,
    quantization: Quantize | None = None,
    lazily: bool = False,
    on_layer: Callable[[str], None] = lambda path: None,
) -> LoadedModel:
    """Load with every tensor as the files hold it, lazily, then quantize when asked; for hashing and saving.

    With `lazily` quantizing waits too, until somebody computes with a layer, and `relative_error` isn't known.
    """
    opened = open_model(model)
    path, config = opened.path, dict(opened.config)
    if found := index.disagreement(path, opened.weights):
        log.info("%s: ignored, what counts is what the files hold", found)
    named = naming_settings(config, where=str(path / "config.json"))
    with files.refusing(ModelError, f"{path}: can't be loaded"), named, index.naming_tensors(path):
        network, config = _load_network(path, config)
        multimodal.tie_again(path, network)
        # mlx_lm writes settings of its own into these (as tie_word_embeddings), which other readers would believe.
        config |= {part: copy.deepcopy(opened.config[part]) for part in PARTS if part in opened.config}
        # never computed: a setting that doesn't fit shows while this is built
        logits = network(mx.zeros((1, 2), mx.int32))
    token_ids.remember_rows(opened.tokenizer, logits.shape[-1])  # the embedding and the head have as many rows
    loaded = LoadedModel(network, opened.tokenizer, config, path, _stored_dtype(network))
    if quantization is not None:
        settings = quantization.complete()
        if lazily:
            loaded.quantized = pack_lazily(loaded.model, settings).quantized
        else:
            loaded.quantized = quantize(loaded.model, settings, on_layer=on_layer)
        loaded.config["quantization"] = loaded.config["quantization_config"] = loaded.quantized.config
    return loaded


def _load_network(path: Path, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a directory, its weights unread. mlx_lm knows no nf4: such layers are in place before it begins."""
    settings = config.get("quantization")
    if not isinstance(settings, dict) or settings.get("mode") != nf4.MODE:
        return mlx_lm_utils.load_model(path, lazy=True)  # type: ignore[no-any-return]

    def classes(config: dict[str, Any]) -> tuple[Callable[[Any], nn.Module], Any]:
        model_class, arguments = mlx_lm_utils._get_classes(config)

        def packed(args: Any) -> nn.Module:
            model: nn.Module = model_class(args)
            pack(model, settings)
            return model

        return packed, arguments

    unpacked = {"quantization": None, "quantization_config": None}
    network, read = mlx_lm_utils.load_model(path, lazy=True, model_config=unpacked, get_model_classes=classes)
    return network, read | {"quantization": settings, "quantization_config": settings}


def ready(loaded: LoadedModel, *, read: bool = True) -> LoadedModel:
    """Cast to the dtype this device computes in, choose its multiply, and freeze: a base never trains.

    Without `read` all of this waits until somebody computes with an array: its weights are then read one by one.
    """
    if not device.on_gpu():
        use_fast_multiply(loaded.model)
    nf4.compute_in(loaded.model, _stored_dtype(loaded.model) if device.on_gpu() else mx.float32)
    loaded.model.freeze()
    loaded.model.eval()
    for _, array in tree_flatten(loaded.model.parameters()) if read else ():
        mx.eval(array)  # one by one: the stored array behind each is freed before the next is read
    return loaded


def _stored_dtype(model: nn.Module) -> mx.Dtype:
    """The float dtype that most bytes of the files have: half precision models keep a few float32 tensors."""
    sizes: dict[mx.Dtype, int] = {}
    scales = {id(array) for module in model.modules() if nf4.is_nf4(module) for array in module.arrays()}
    for _, array in named_arrays(model):
        if mx.issubdtype(array.dtype, mx.floating) and id(array) not in scales:  # those of nf4 are always float32
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else mx.float32
