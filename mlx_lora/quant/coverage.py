"""How much of a model quantizing reached: which layers stay plain, why, and which group sizes would fit them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from mlx_lora.errors import ModelError
from mlx_lora.methods import MODES
from mlx_lora.quant import nf4

# Of the weights in layers that can be packed, at least this share has to be: with less, the result is nearer to the
# source's size than to the one that was asked for.
LEAST_PACKED = 0.5


@dataclass(frozen=True)
class Unpacked:
    """Layers that stay plain for one reason."""

    reason: str
    layers: list[str]

    def __str__(self) -> str:
        """One line: how many of each name, without the numbers of the layers."""
        names = [path.rpartition(".")[2] for path in self.layers]
        counted = [f"{names.count(name)} {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)]
        return f"{', '.join(counted)}: {self.reason}"

    def as_dict(self) -> dict[str, Any]:
        return {"reason": self.reason, "layers": self.layers}


def unpacked(model: nn.Module, left_alone: list[str], settings: dict[str, Any]) -> list[Unpacked]:
    """The layers at the paths of `left_alone`, by the reason why these settings left them plain."""
    modules, found = dict(model.named_modules()), dict[str, list[str]]()
    for path in left_alone:
        columns = modules[path]["weight"].shape[-1]
        if columns % settings["group_size"]:
            reason = f"{columns} columns can't be divided into groups of {settings['group_size']}"
        elif settings["mode"] == nf4.MODE and nf4.class_for(modules[path]) is None:
            reason = f"nf4 doesn't serve a {type(modules[path]).__name__}"
        else:
            reason = "the architecture asks for full precision here"
        found.setdefault(reason, []).append(path)
    return [Unpacked(reason, layers) for reason, layers in found.items()]


def check_coverage(sizes: dict[str, tuple[int, int]], left_alone: list[str], settings: dict[str, Any]) -> None:
    """Raise ModelError, with group sizes that fit better, where most weights stay plain.

    `sizes` are (weights, columns) of every layer that could be packed, or is, by path.
    """
    total = sum(weights for weights, _ in sizes.values())
    packed = total - sum(sizes[path][0] for path in left_alone)
    if packed >= LEAST_PACKED * total:
        return
    group = settings["group_size"]
    fits = {
        size: sum(weights for weights, columns in sizes.values() if columns % size == 0)
        for size in sorted(MODES[settings["mode"]][1])
    }
    best = [str(size) for size, weights in fits.items() if weights == max(fits.values()) and weights > packed]
    raise ModelError(
        f"groups of {group} fit only {packed / total:.0%} of the weights, the others would stay as they are",
        hint=f"--group-size {' or '.join(best)} fits {max(fits.values()) / total:.0%}" if best else None,
    )


def layer_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(weights, columns) of every layer that is packed or could be, by path."""
    sizes = {}
    for path, layer in model.named_modules():
        if "scales" in layer:
            columns = layer["weight"].shape[-1] * 32 // layer.bits
            sizes[path] = (layer["weight"].size * 32 // layer.bits, columns)
        elif hasattr(layer, "to_quantized") and "weight" in layer:
            sizes[path] = (layer["weight"].size, layer["weight"].shape[-1])
    return sizes
