"""On a CPU, packed weights are unpacked once before a model generates, where memory allows.

For inference alone: training's memory doesn't grow. The packed arrays stay, so adapters, fingerprints and merging see
the layer as before. On a GPU multiplying by packed weights is the fast way, and nothing here runs.
"""

from __future__ import annotations

import logging

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import ui
from mlx_lora.machine import device, limits
from mlx_lora.models.load import LoadedModel
from mlx_lora.quant import nf4
from mlx_lora.quant.dense import keep_dense
from mlx_lora.quant.matmul import DequantizingEmbedding, DequantizingLinear
from mlx_lora.quant.quantize import dequantize_layer

# The float32 copies may take this share of the memory that is free: keys and values, and other programs, need some.
SHARE = 0.5
LINEAR = (DequantizingLinear, nf4.NF4Linear)
EMBEDDING = (DequantizingEmbedding, nf4.NF4Embedding)

log = logging.getLogger(__name__)


def unpack_once(loaded: LoadedModel) -> bool:
    """Keep a float32 weight beside every packed one of a model that is ready; whether there were any and they fit.

    What is done is logged with its size. Stacks of experts stay packed: a token needs few of them.
    """
    layers = [] if device.on_gpu() else layers_to_unpack(loaded.model)
    if not layers:
        return False
    needed = dense_bytes(layers)
    free = limits.limit_bytes() - mx.get_active_memory()
    if not unpacked_bytes(layers, free):
        log.info(
            "packed weights are unpacked for every token, which is slower: unpacked once they would take %s, "
            "more than half of the %s of free memory", ui.size(needed), ui.size(free),
        )  # fmt: skip
        return False
    log.info("packed weights are unpacked once, for speed: %s of the %s of free memory", ui.size(needed), ui.size(free))
    for layer in layers:
        weight = dequantize_layer(layer, mx.float32)
        mx.eval(weight)  # one by one: what unpacking needs on the way is freed before the next
        keep_dense(layer, weight)
    return True


def layers_to_unpack(model: nn.Module) -> list[nn.Module]:
    """The packed linear layers, and the packed embedding where it is the output head too: reading rows is cheap."""
    modules = list(model.modules())
    linear = [module for module in modules if isinstance(module, LINEAR)]
    outputs = {output_dims(module) for module in modules if isinstance(module, nn.Linear | nn.QuantizedLinear)}
    tied = [
        module for module in modules if isinstance(module, EMBEDDING) and output_dims(module) not in outputs
    ]  # fmt: skip
    return [*linear, *tied]


def dense_bytes(layers: list[nn.Module]) -> int:
    """Bytes of float32 copies of packed layers."""
    return sum(4 * output_dims(layer) * input_dims(layer) for layer in layers)


def unpacked_bytes(layers: list[nn.Module], free: int) -> int:
    """Bytes of the copies where they fit into `free` bytes, else 0: then none are made."""
    needed = dense_bytes(layers)
    return needed if needed <= SHARE * free else 0


def output_dims(layer: nn.Module) -> int:
    """Rows of a layer's weight: outputs, or tokens of an embedding."""
    return int(layer["weight"].shape[0])


def input_dims(layer: nn.Module) -> int:
    """Columns of a packed layer's weight, unpacked."""
    return int(layer["weight"].shape[-1] * 32 // layer.bits)
