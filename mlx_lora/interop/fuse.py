"""Merge an adapter into its base, and measure whether it survived.

Requantizing a merged weight to 4 bits can erase the update in silence: it is often smaller than a quantization step.
So over a quantized base the touched layers become 8-bit by default, or stay plain where even 8 bits would lose most of
the update; survival is measured on the weights before anything is written, and losing more than half is refused.

Neither the base nor the result is ever whole in memory: layers are read, merged, written and freed one by one. What a
fused model says beside base and adapter is measured by its caller, who runs the two after each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.attach import Wrappers
from mlx_lora.adapters.base import AdapterLayer, layer_shape
from mlx_lora.adapters.qalora import QALoRA
from mlx_lora.errors import CannotFuse
from mlx_lora.measure import Agreement, as_dict, survival
from mlx_lora.models.layers import dequantize_model, half, release, set_modules
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.multimodal import Extras
from mlx_lora.models.save import save
from mlx_lora.models.shards import Named
from mlx_lora.quant.quantize import dequantize_layer, layer_settings, pack_lazily, packed_layer
from mlx_lora.store.adapter import StoredAdapter, wrappers_for

BITS = ("mixed", "keep", "8", "16")
LEAST_SURVIVAL = 0.5
EIGHT = {"mode": "affine", "bits": 8, "group_size": 64}


@dataclass(frozen=True)
class Fused:
    """What fusing wrote; `delta_survival` is of the weights.

    `zero_points_bytes` is what zero-points and scales in float32 take beyond those of the base, 0 where they stayed.
    """

    out: Path
    bits: str
    delta_survival: float
    bytes: int
    extras: Extras
    zero_points_bytes: int = 0

    def as_dict(self, agreement: Agreement) -> dict[str, Any]:
        """The keys of `fuse --json`, with how the outputs agree on the measured rows."""
        measured = {key: value for key, value in as_dict(agreement).items() if not key.startswith("perplexity")}
        return {
            "out": str(self.out),
            "bits": self.bits,
            **measured,
            "delta_survival": self.delta_survival,
            "bytes": self.bytes,
            "zero_points_bytes": self.zero_points_bytes,
            "carried": self.extras.as_dict(),
        }


def fuse(
    open_stored: Callable[[], LoadedModel],
    adapter: StoredAdapter,
    out: Path,
    *,
    bits: str | None = None,
    zero_points: str | None = None,
    force: bool = False,
    renamed: Callable[[nn.Module, Named], Named] = lambda model, arrays: arrays,
    on_module: Callable[[], None] = lambda: None,
) -> Fused:
    """Merge `adapter` into its base and write the result to `out`.

    `open_stored` opens the base with its tensors as on disk and unread; it is called twice, because every layer is
    freed once it was measured, and again once it was written. `bits` is `keep` (each layer its base's own format),
    `mixed` (touched layers at 8 bits, or plain where 8 bits lose most of their update), or `8` or `16` (the whole
    model, `16` in half precision); the default is mixed over a quantized base and keep over a plain one. With
    `zero_points` = `float32` the layers of a QA-LoRA adapter get zero-points and scales in float32, at bits=keep: for
    adapters that were trained without rounding them. `renamed` gives the model's arrays another program's names. Raises
    CannotFuse under 0.5 survival without `force`, and for `zero_points` where they would change nothing; then nothing
    is written.
    """
    stored = open_stored()
    bits = bits or ("mixed" if "quantization" in stored.config and zero_points is None else "keep")
    wrappers, wider = _wrappers(stored, adapter, bits, zero_points)
    formats, survived = _measured(stored, wrappers, bits)
    if survived < LEAST_SURVIVAL and not force:
        raise _lost(survived, bits, adapter)
    stored = open_stored()
    wrappers, _ = _wrappers(stored, adapter, bits, zero_points)
    merged = {path: _merged(wrappers[path], bits, stored.stored, formats[path]) for path in wrappers}
    set_modules(stored.model, merged)
    _convert(stored, list(merged), bits)
    del wrappers, merged
    saved = save(stored, out, force=force, free=True, renamed=partial(renamed, stored.model), on_module=on_module)
    return Fused(out, bits, survived, saved.bytes, saved.extras, wider)


def _lost(survived: float, bits: str, adapter: StoredAdapter) -> CannotFuse:
    hint = "--bits mixed keeps touched layers at 8 bits, --bits 16 keeps all of it; --force fuses anyway"
    if adapter.manifest.method == "qalora" and bits in ("keep", "mixed"):
        hint = f"--zero-points float32 keeps all of it in packed layers; {hint}"
    return CannotFuse(
        f"only {max(survived, 0):.0%} of the adapter's update survives at bits={bits}; the fused model would not "
        "have learned what the adapter did",
        hint=hint,
    )


def _wrappers(stored: LoadedModel, adapter: StoredAdapter, bits: str, zero_points: str | None) -> tuple[Wrappers, int]:
    """The adapter's wrappers, and the bytes by which `zero_points` widens the packed layers that they wrap.

    Scales are widened too: in mlx_lm either one in float32 makes a layer's outputs float32, and both must be alike on a
    GPU.
    """
    wrappers = wrappers_for(stored.model, adapter)
    if zero_points is None:
        return wrappers, 0
    layers = [wrapper.base for wrapper in wrappers.values() if isinstance(wrapper, QALoRA) and "scales" in wrapper.base]
    hint = "leave out --zero-points"
    if not layers:
        raise CannotFuse("only a QA-LoRA adapter over packed layers is merged into zero-points", hint=hint)
    if bits != "keep":
        raise CannotFuse(f"zero-points in float32 are for bits=keep, and bits is {bits}", hint="--bits keep")
    if all(layer["biases"].dtype == mx.float32 for layer in layers):
        raise CannotFuse("the base's zero-points are in float32 already", hint=hint)
    if any(wrapper.rounds for wrapper in wrappers.values() if isinstance(wrapper, QALoRA)):
        raise CannotFuse(
            f"{adapter.name} was trained with the base's zero-points in their own precision, which holds all of it",
            hint=hint,
        )
    wider = 0
    for layer in layers:
        for name in ("scales", "biases"):
            before = layer[name]
            layer[name] = before.astype(mx.float32)
            wider += layer[name].nbytes - before.nbytes
    return wrappers, wider


Format = dict[str, Any] | str | None
# A layer that the method merges into the packed base, without packing anything anew.
EXACT = "exact"


def _measured(stored: LoadedModel, wrappers: Wrappers, bits: str) -> tuple[dict[str, Format], float]:
    """The format of every touched layer by path, and how much of all updates survives; each layer is freed behind."""
    formats: dict[str, Format] = {}

    def pairs() -> Iterator[tuple[mx.array, mx.array]]:
        for path in list(wrappers):
            wrapper = wrappers.pop(path)
            formats[path] = _format(wrapper, bits, stored.stored)
            written = _as_written(_merged(wrapper, bits, stored.stored, formats[path]), bits, stored)
            yield _update(wrapper, written)
            if all(other.base is not wrapper.base for other in wrappers.values()):  # a tied head's is the embedding
                release(wrapper.base)
            del wrapper, written
            mx.clear_cache()

    survived = survival(pairs())
    return formats, survived


def _format(wrapper: AdapterLayer, bits: str, dtype: mx.Dtype) -> Format:
    """How the wrapped layer is written: EXACT, settings to pack it by, or None for a plain layer.

    Under `mixed` that is 8 bits, unless 8 bits would lose most of this layer's update: then it stays plain. A short
    training moves weights by less than an 8-bit step. A method that merges exactly into the packed layer does so.
    """
    if bits in ("mixed", "keep") and wrapper.fuse_packed() is not None:
        if bits == "keep" or survival([_update(wrapper, _merged(wrapper, bits, dtype, EXACT))]) >= LEAST_SURVIVAL:
            return EXACT
    base = wrapper.base
    if not (hasattr(base, "to_quantized") or "scales" in base) or bits in ("8", "16"):  # a norm; the whole model
        return None
    if bits == "keep":
        return layer_settings(base)
    settings = eight_bits(base)
    kept = survival([_update(wrapper, _merged(wrapper, bits, dtype, settings))]) >= LEAST_SURVIVAL
    return settings if kept else None


def merge(wrapper: AdapterLayer, bits: str, dtype: mx.Dtype) -> nn.Module:
    """The wrapped layer with its update merged, in the format that `bits` asks for."""
    return _merged(wrapper, bits, dtype, _format(wrapper, bits, dtype))


def _merged(wrapper: AdapterLayer, bits: str, dtype: mx.Dtype, chosen: Format) -> nn.Module:
    """The wrapped layer with its update merged, in the format that was chosen for it; lazily."""
    if chosen == EXACT and (packed := wrapper.fuse_packed()) is not None:
        for name, array in packed.parameters().items():  # float32 beside halves would make every output float32
            packed[name] = array.astype(wrapper.base[name].dtype if name in wrapper.base else dtype)
        return packed
    plain = wrapper.fuse()
    plain.set_dtype(half(dtype) if bits == "16" else dtype)
    return packed_layer(plain, chosen) if isinstance(chosen, dict) else plain


def _as_written(layer: nn.Module, bits: str, stored: LoadedModel) -> nn.Module:
    """The layer as `_convert` leaves it, where that is about the whole model."""
    if bits == "8" and hasattr(layer, "to_quantized") and layer["weight"].shape[-1] % EIGHT["group_size"] == 0:
        return packed_layer(layer, EIGHT)
    return layer


def eight_bits(layer: nn.Module) -> dict[str, Any]:
    """Affine 8-bit settings that divide the input dimension of a layer, packed or not.

    Raises CannotFuse when none does.
    """
    columns = layer_shape(layer)[-1]
    for group_size in (32, 64, 128):
        if columns % group_size == 0:
            return {"mode": "affine", "bits": 8, "group_size": group_size}
    raise CannotFuse(f"no 8-bit group size divides {columns} columns", hint="--bits 16")


def _update(wrapper: AdapterLayer, merged: nn.Module) -> tuple[mx.array, mx.array]:
    """(intended, realised) updates of a touched weight."""
    base = dequantize_layer(wrapper.base, mx.float32)
    return wrapper.delta(), dequantize_layer(merged, mx.float32) - base


def _convert(stored: LoadedModel, touched: list[str], bits: str) -> None:
    """Bring the untouched layers along where `bits` is about all of them, and make config.json say what is stored."""
    if bits == "16":
        dequantize_model(stored, half(stored.stored))
        stored.model.set_dtype(half(stored.stored))
    if bits == "8":
        dequantize_model(stored, stored.stored)
        stored.config["quantization"] = pack_lazily(stored.model, EIGHT).quantized.config
    if bits == "mixed" or (bits == "keep" and "quantization" in stored.config):
        modules = dict(stored.model.named_modules())
        layers = {
            path: layer_settings(modules[path]) or False
            for path in touched
            if hasattr(modules[path], "bits") or hasattr(modules[path], "to_quantized")
        }
        stored.config["quantization"] = {**stored.config.get("quantization", EIGHT), **layers}
