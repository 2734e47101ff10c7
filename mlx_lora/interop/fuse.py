"""Merge an adapter into its base, and measure whether it survived.

Requantizing a merged weight to 4 bits can erase the update in silence: it is often smaller than a quantization step.
So over a quantized base the touched layers become 8-bit by default, or stay plain where even 8 bits would lose most of
the update; survival is measured on the weights before anything is written, and losing more than half is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.attach import Wrappers, put
from mlx_lora.adapters.base import AdapterLayer
from mlx_lora.data.encode import Row
from mlx_lora.errors import CannotFuse
from mlx_lora.measure import Agreement, as_dict, compare, survival
from mlx_lora.models.carry import Beside
from mlx_lora.models.layers import dequantize_model, half, set_modules
from mlx_lora.models.load import LoadedModel, ready
from mlx_lora.models.save import save
from mlx_lora.quant.quantize import dequantize_layer, layer_settings, packed_layer, quantize
from mlx_lora.store.adapter import StoredAdapter, wrappers_for

BITS = ("mixed", "keep", "8", "16")
LEAST_SURVIVAL = 0.5


@dataclass(frozen=True)
class Fused:
    """What fusing did; `delta_survival` is of the weights, the agreement of outputs on the measured rows."""

    out: Path
    bits: str
    delta_survival: float
    bytes: int
    agreement: Agreement
    beside: Beside

    def as_dict(self) -> dict[str, Any]:
        """The keys of `fuse --json`."""
        measured = {key: value for key, value in as_dict(self.agreement).items() if not key.startswith("perplexity")}
        return {
            "out": str(self.out),
            "bits": self.bits,
            **measured,
            "delta_survival": self.delta_survival,
            "bytes": self.bytes,
            "carried": self.beside.as_dict(),
        }


def fuse(
    stored: LoadedModel,
    reference: LoadedModel,
    adapter: StoredAdapter,
    out: Path,
    rows: Sequence[Row],
    *,
    bits: str | None = None,
    force: bool = False,
    on_row: Callable[[], None] = lambda: None,
) -> Fused:
    """Merge `adapter` into `stored` (tensors as on disk), write it to `out`, and compare it with `reference`.

    `reference` is the same base ready to compute; it comes back carrying the adapter. `bits` is `keep` (each layer
    its base's own format), `mixed` (touched layers at 8 bits, or plain where 8 bits lose most of their update), or `8`
    or `16` (the whole model, `16` in half precision); the default is mixed over a quantized base and keep over a plain
    one. Raises CannotFuse under 0.5 survival without `force`.
    """
    quantized = "quantization" in stored.config
    bits = bits or ("mixed" if quantized else "keep")
    wrappers = wrappers_for(stored.model, adapter)
    set_modules(stored.model, {path: merge(wrapper, bits, stored.stored) for path, wrapper in wrappers.items()})
    _convert(stored, list(wrappers), bits)
    survived = survival(_updates(wrappers, dict(stored.model.named_modules())))
    if survived < LEAST_SURVIVAL and not force:
        raise CannotFuse(
            f"only {max(survived, 0):.0%} of the adapter's update survives at bits={bits}; the fused model would not "
            "have learned what the adapter did",
            hint="--bits mixed keeps touched layers at 8 bits, --bits 16 keeps all of it; --force fuses anyway",
        )
    saved = save(stored, out, force=force)
    put(reference.model, wrappers_for(reference.model, adapter))
    agreement = compare(reference.model, ready(stored).model, rows, on_row=on_row)
    return Fused(out, bits, survived, saved.bytes, agreement, saved.beside)


def merge(wrapper: AdapterLayer, bits: str, dtype: mx.Dtype) -> nn.Module:
    """The wrapped layer with its update merged, in the format that `bits` asks for.

    Under `mixed` that is 8 bits, unless 8 bits would lose most of this layer's update: then it stays plain. A short
    training moves weights by less than an 8-bit step. A method that merges exactly into the packed layer does so.
    """
    if bits in ("mixed", "keep") and (packed := wrapper.fuse_packed()) is not None:
        for name, array in packed.parameters().items():  # float32 beside halves would make every output float32
            packed[name] = array.astype(wrapper.base[name].dtype if name in wrapper.base else dtype)
        if bits == "keep" or survival([_update(wrapper, packed)]) >= LEAST_SURVIVAL:
            return packed
    plain = wrapper.fuse()
    plain.set_dtype(half(dtype) if bits == "16" else dtype)
    if not hasattr(plain, "to_quantized"):  # a norm
        return plain
    if bits == "mixed":
        packed = plain.to_quantized(**eight_bits(plain))
        return packed if survival([_update(wrapper, packed)]) >= LEAST_SURVIVAL else plain
    settings = layer_settings(wrapper.base)
    return plain if settings is None or bits in ("8", "16") else packed_layer(plain, settings)


def eight_bits(layer: nn.Module) -> dict[str, Any]:
    """Affine 8-bit settings that divide a layer's input dimension. Raises CannotFuse when none does."""
    columns = layer["weight"].shape[-1]
    for group_size in (32, 64, 128):
        if columns % group_size == 0:
            return {"mode": "affine", "bits": 8, "group_size": group_size}
    raise CannotFuse(f"no 8-bit group size divides {columns} columns", hint="--bits 16")


def _updates(wrappers: Wrappers, modules: dict[str, nn.Module]) -> Iterator[tuple[mx.array, mx.array]]:
    """(intended, realised) updates of every touched weight."""
    for path, wrapper in wrappers.items():
        yield _update(wrapper, modules[path])


def _update(wrapper: AdapterLayer, merged: nn.Module) -> tuple[mx.array, mx.array]:
    base = dequantize_layer(wrapper.base, mx.float32)
    return wrapper.delta(), dequantize_layer(merged, mx.float32) - base


def _convert(stored: LoadedModel, touched: list[str], bits: str) -> None:
    """Bring the untouched layers along where `bits` is about all of them, and make config.json say what is stored."""
    eight = {"mode": "affine", "bits": 8, "group_size": 64}
    if bits == "16":
        dequantize_model(stored, half(stored.stored))
        stored.model.set_dtype(half(stored.stored))
    if bits == "8":
        dequantize_model(stored, stored.stored)
        stored.config["quantization"] = quantize(stored.model, eight).config
    if bits == "mixed" or (bits == "keep" and "quantization" in stored.config):
        modules = dict(stored.model.named_modules())
        layers = {
            path: layer_settings(modules[path]) or False
            for path in touched
            if hasattr(modules[path], "bits") or hasattr(modules[path], "to_quantized")
        }
        stored.config["quantization"] = {**stored.config.get("quantization", eight), **layers}
