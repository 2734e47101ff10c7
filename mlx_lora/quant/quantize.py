"""Quantize a loaded model in place: one walk with a predicate, and an account of what it cost.

Serves MLX's own modes (affine, mxfp4, nvfp4, mxfp8) and nf4. Embeddings and the output head are quantized too: in small
models they are most of the weights. Knows nothing about files; `models.load` reads and writes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.errors import ModelError
from mlx_lora.methods import MODES
from mlx_lora.quant import grid, nf4
from mlx_lora.quant.matmul import dequantize

# Modes whose packed layers compute in the activations' own dtype.
FLOAT_SCALES = ("affine", nf4.MODE)
# Elements of a weight whose error is computed at a time.
BLOCK = 1 << 22


@dataclass
class Quantized:
    """What quantizing did. Sizes in bytes; `relative_error` is ‖W − Q(W)‖ / ‖W‖ over all weights that were packed.

    Layers that were packed before, and keep that packing, are in `kept`; `left_alone` has the layers that stay plain.
    """

    settings: dict[str, Any]
    bits_per_weight: float
    bytes: int
    relative_error: float
    config: dict[str, Any]
    left_alone: list[str] = field(default_factory=list)
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Packing:
    """A model whose layers have been replaced by packed ones that nobody has computed yet.

    `errors` has an array (2,) for each of those by path, ‖W − Q(W)‖² and ‖W‖², to be evaluated together with its
    layer's arrays, because the plain weight is freed behind them. `quantized` becomes whole with `finish`.
    """

    quantized: Quantized
    errors: dict[str, mx.array]

    def finish(self) -> Quantized:
        """The account, once every layer has been computed."""
        error, norm = (sum(float(np.array(pair)[part]) for pair in self.errors.values()) for part in (0, 1))
        self.quantized.relative_error = math.sqrt(error / norm) if norm else 0.0
        return self.quantized


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of `model` is stored in packed form."""
    return any("scales" in module for _, module in model.named_modules())


def quantize(
    model: nn.Module, settings: dict[str, Any], *, on_layer: Callable[[str], None] = lambda path: None
) -> Quantized:
    """Replace every layer that can be quantized by its packed form; `settings` is `{mode, bits, group_size}`.

    For nf4 there is `double_quant` too. Layers whose input dimension the group size doesn't divide are left as they
    are and named in `left_alone`. Raises ModelError when nothing can be quantized.
    """
    if is_quantized(model):
        raise ModelError("the model is quantized already", hint="dequantize it first, or use it as it is")
    packing = pack_lazily(model, settings)
    modules = _leaves(model)
    for path, error in packing.errors.items():
        mx.eval(modules[path].parameters(), error)
        on_layer(path)
    mx.eval(model.parameters())
    return packing.finish()


def pack_lazily(
    model: nn.Module,
    settings: dict[str, Any],
    *,
    kept: dict[str, dict[str, Any]] | None = None,
    on_own_grid: dict[str, dict[str, Any]] | None = None,
) -> Packing:
    """`quantize` without computing anything: each layer is read and packed when its arrays are evaluated.

    `kept` are the settings of layers that are packed already, `on_own_grid` those of plain layers whose weights lie on
    a grid of their own (`grid.py`), both by path. Raises ModelError when nothing can be quantized.
    """
    kept, on_own_grid = kept or {}, on_own_grid or {}
    chosen, left_alone = choices(model, settings, on_own_grid)
    if not chosen and not kept:
        raise ModelError(f"no layer can be quantized with group size {settings['group_size']}")
    leaves, errors = _leaves(model), {}
    for path, its in chosen.items():
        layer = leaves.pop(path)
        packed = packed_layer(layer, its, on_own_grid=path in on_own_grid)
        errors[path] = _squared_error(layer, packed)
        model.update_modules(tree_unflatten([(path, packed)]))
    if settings["mode"] not in FLOAT_SCALES:  # these unpack to bfloat16: beside float16 activations would be float32
        model.apply(lambda array: array.astype(mx.bfloat16) if array.dtype == mx.float16 else array)
    size = model_bytes(model)
    own = {path: its for path, its in {**chosen, **kept}.items() if its != settings}
    config = {**settings, **own}
    account = Quantized(
        settings=dict(settings),
        bits_per_weight=8 * size / parameter_count(model),
        bytes=size,
        relative_error=math.nan,
        config=config,
        left_alone=left_alone,
        kept={**kept, **{path: its for path, its in chosen.items() if path in on_own_grid}},
    )
    return Packing(account, errors)


def choices(
    model: nn.Module, settings: dict[str, Any], of_layers: dict[str, Any] | None = None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """How each layer of `model` is to be packed, by path, and the paths of those that could be but aren't.

    A layer's setting in `of_layers` comes first (`{bits, group_size, …}`, or False), then the model's own
    `quant_predicate` (mlx-lm), which keeps routers at higher precision for example, then `settings`. What the group
    size doesn't divide, or the mode doesn't serve, is left alone.
    """
    own = getattr(model, "quant_predicate", None)
    chosen, left_alone = {}, []
    for path, layer in _leaves(model).items():
        if not hasattr(layer, "to_quantized"):
            continue
        choice = (of_layers or {}).get(path, own(path, layer) if own is not None else True)
        # A model's own choice names bits and group size only; the mode it means is affine.
        its = {"mode": "affine", **choice} if isinstance(choice, dict) else settings
        served = its["mode"] != nf4.MODE or nf4.class_for(layer) is not None
        if choice and served and not layer.weight.shape[-1] % its["group_size"]:
            chosen[path] = its
        else:
            left_alone.append(path)
    return chosen, left_alone


def pack(model: nn.Module, stored: dict[str, Any]) -> None:
    """Give `model` the packed layers that `stored`, config.json's `quantization`, describes; nothing is evaluated.

    Raises KeyError, TypeError or ValueError for a description that can't be followed.
    """
    settings = {"mode": stored.get("mode", "affine"), "bits": stored["bits"], "group_size": stored["group_size"]}
    if settings["mode"] == nf4.MODE:
        settings["double_quant"] = stored.get("double_quant", False)
    of_layers = {path: value for path, value in stored.items() if isinstance(value, dict | bool)}
    chosen, _ = choices(model, settings, of_layers)
    leaves = _leaves(model)
    packed = {path: packed_layer(leaves[path], its) for path, its in chosen.items()}
    model.update_modules(tree_unflatten(list(packed.items())))


def packed_layer(layer: nn.Module, settings: dict[str, Any], *, on_own_grid: bool = False) -> nn.Module:
    """The packed form of a Linear, Embedding or SwitchLinear, by `{mode, bits, group_size}`; not evaluated.

    With `on_own_grid` the weights are packed on the grid that they lie on, not on one of MLX's choice. Raises
    ValueError for settings that the mode doesn't have, or a layer that nf4 doesn't serve.
    """
    if settings["mode"] != nf4.MODE:
        packed: nn.Module = layer.to_quantized(**settings)
        if on_own_grid:
            packed.weight, packed.scales, packed.biases = grid.pack_on_grid(layer["weight"], settings["bits"])
        elif settings["mode"] != "affine":  # MLX packs these on a CPU with thirty copies of the weight
            packed.weight, packed.scales = _quantized_by_rows(layer["weight"], settings)
        return packed
    make, (bits, groups) = nf4.class_for(layer), MODES[nf4.MODE]
    if make is None or settings["bits"] not in bits or settings["group_size"] not in groups:
        raise ValueError(f"nf4 doesn't serve a {type(layer).__name__} with {settings}")
    return make(layer, settings["group_size"], settings.get("double_quant", False))


def _quantized_by_rows(weight: mx.array, settings: dict[str, Any]) -> list[mx.array]:
    """[packed, scales] of `mx.quantize` in a mode without biases, a block of rows after the other."""
    step = max(BLOCK // math.prod(weight.shape[1:]), 1)
    parts: list[list[mx.array]] = []
    for start in range(0, weight.shape[0], step):
        block = weight[start : start + step]
        (block,) = mx.depends([block], parts[-1]) if parts else (block,)
        parts.append(list(mx.quantize(block, **settings)))
    return [mx.concatenate(list(blocks)) for blocks in zip(*parts, strict=True)]


def _leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The modules without children, by path."""
    return dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))


def _squared_error(layer: nn.Module, packed: nn.Module) -> mx.array:
    """(2,) ‖W − Q(W)‖² and ‖W‖², lazily and a block of rows after the other: no whole float32 copy is made."""
    weight = layer["weight"]
    step = max(BLOCK // math.prod(weight.shape[1:]), 1)
    total = mx.zeros((2,))
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        (block,) = mx.depends([weight[part]], [total])
        block = block.astype(mx.float32)
        away = block - dequantize_layer(packed, mx.float32, rows=part)
        total = total + mx.stack([mx.square(away).sum(), mx.square(block).sum()])
    return total


def dequantize_layer(layer: nn.Module, dtype: mx.Dtype, *, rows: slice = slice(None)) -> mx.array:
    """A layer's weight as a float array of shape (out, in), or (experts, out, in), in `dtype`; packed or not.

    `rows` are those of its first dimension. Scales are cast before they are used: with half-precision scales MLX
    computes in half whatever dtype is asked for.
    """
    weight = layer["weight"]
    if "scales" not in layer:
        return weight[rows].astype(dtype)
    if layer.get("global_scale") is not None:
        raise ModelError("a layer has nvfp4 weights with a scale per expert, which can't be unpacked here")
    start, stop, _ = rows.indices(weight.shape[0])
    step = max(BLOCK * layer.bits // 32 // math.prod(weight.shape[1:]), 1)
    blocks: list[mx.array] = []
    for first in range(start, stop, step):  # one after the other: float32 copies of a whole layer are never alive
        block = _unpacked_rows(layer, slice(first, min(first + step, stop)), blocks[-1:])
        blocks.append(block.astype(dtype))
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks)


def _unpacked_rows(layer: nn.Module, rows: slice, after: list[mx.array]) -> mx.array:
    """Float32 rows of a packed layer, computed once `after` is."""
    if layer.mode == nf4.MODE:
        (weight,) = mx.depends([layer["weight"]], after) if after else (layer["weight"],)
        return nf4.unpack([weight, *layer.arrays()[1:]], rows)
    arrays = [layer["weight"][rows], layer["scales"][rows]]
    arrays += [layer["biases"][rows]] if layer.get("biases") is not None else []
    weight, scales, *biases = mx.depends(arrays, after) if after else arrays
    if biases:
        scales, biases = scales.astype(mx.float32), [biases[0].astype(mx.float32)]
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return dequantize(weight, scales, biases[0] if biases else None, **settings)


def layer_settings(layer: nn.Module) -> dict[str, Any] | None:
    """`{mode, bits, group_size}` of a packed layer, for nf4 with `double_quant`, or None."""
    if "scales" not in layer:
        return None
    settings = {"mode": layer.mode, "bits": layer.bits, "group_size": layer.group_size}
    return settings | ({"double_quant": layer.double_quant} if layer.mode == nf4.MODE else {})


def named_arrays(model: nn.Module) -> list[tuple[str, mx.array]]:
    """All parameters of a model by their full names."""
    return cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, packed ones as packed."""
    return sum(array.nbytes for _, array in named_arrays(model))


def parameter_count(model: nn.Module) -> int:
    """Number of weights, a packed weight counted as what it stands for; scales and zero-points don't count."""
    packed = {path: module for path, module in model.named_modules() if "scales" in module}
    count = 0
    for name, array in named_arrays(model):
        path, _, key = name.rpartition(".")
        if path not in packed:
            count += array.size
        elif key == "weight":
            # packed · 32 // bits: the order matters for 3, 5 and 6 bits.
            count += array.size * 32 // packed[path].bits
        elif key not in (*nf4.SCALES, "biases"):
            count += array.size
    return count
