"""Quantize a model directory into another, and measure the result against its source.

The source is read, packed, written and freed a layer at a time. Then the result runs over some text, and the source
after it, again a layer at a time: neither the source nor two models are ever whole in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora import paths
from mlx_lora.config import Data, Quantize
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.data.rows import Row
from mlx_lora.data.splits import VALID_FIRST
from mlx_lora.measure import Agreement, as_dict, compare, predictions, predictions_by_layer
from mlx_lora.models.layers import dequantize_model, half
from mlx_lora.models.load import LoadedModel, load, load_stored, ready
from mlx_lora.models.open import OpenModel, open_model
from mlx_lora.models.sample import half_precision_rows
from mlx_lora.models.save import Saved, save
from mlx_lora.models.trunk.by_layer import not_by_layer
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.trunk import Trunk
from mlx_lora.quant.coverage import Unpacked, check_coverage, layer_sizes, unpacked
from mlx_lora.quant.grid import grid_of
from mlx_lora.quant.quantize import Packing, Quantized, layer_settings, pack_lazily
from mlx_lora.study.evaluate import questions

# Measured on this text unless rows are named, and not at all with `--verify none`.
TEXT, NO_ROWS = ("data", "measure", "text.jsonl"), "none"

# Beyond either, a result is said to be damaged. SmolLM2-135M, small and therefore easily hurt, has on our text KL 0.002
# and 98 % of top tokens at 8 bits, 0.024 and 92 % at 6, 0.10 and 80 % at 5. Packed a second time onto another 4-bit
# grid it has 0.38 to 0.43 and 66 %, and its answers are no longer usable. Larger models lose less.
MOST_KL, LEAST_SAME = 0.25, 0.7

log = logging.getLogger(__name__)


def quantize_model(
    model: str,
    out: Path,
    settings: Quantize,
    *,
    verify: str | None = None,
    force: bool = False,
    warn: Callable[[str], None] = lambda text: None,
    progress: OnFile = silent,
) -> dict[str, Any]:
    """Write `out` and return the keys of `quantize --json`.

    `verify` is a path with the rows to measure on, `none` for no measurement, or None for a text of our own. Layers
    that are packed already, or lie on the grid of an earlier packing, keep it where it is no wider than what is asked
    for; other packed layers go through half precision. Raises before loading when `out` exists, DataError when the
    rows can't be used, and ModelError when most weights would stay as they are.
    """
    paths.check_target(out, force=force)
    opened = open_model(model)
    paths.check_apart(out, model=opened.path)
    loaded = load_stored(opened)
    rows = _rows(verify, loaded.tokenizer, progress)
    packing = _pack(loaded, settings.complete(), warn)
    left = unpacked(loaded.model, packing.quantized.left_alone, packing.quantized.settings)
    loaded.config["quantization"] = packing.quantized.config
    advance = progress("quantizing and writing", sum("weight" in module for module in loaded.model.modules()))
    saved = save(loaded, out, force=force, free=True, computed_with=packing.errors, on_module=advance)
    report = _report(out, packing.finish(), saved, left)
    for group in left:
        warn(f"not quantized: {group}")
    if rows:
        agreement = _agreement(opened, out, rows, progress)
        if fault := damage(agreement):
            warn(fault)
        report |= as_dict(agreement)
    return report


def _report(out: Path, done: Quantized, saved: Saved, left: Sequence[Unpacked]) -> dict[str, Any]:
    return {
        "out": str(out),
        **done.settings,
        "bits_per_weight": done.bits_per_weight,
        "bytes": saved.bytes,
        "relative_error": done.relative_error,
        "left_alone": done.left_alone,
        "unpacked": [group.as_dict() for group in left],
        "kept": done.kept,
        "carried": saved.extras.as_dict(),
    }


def _rows(verify: str | None, tokenizer: Any, progress: OnFile) -> Sequence[Row]:
    if verify == NO_ROWS:
        return []
    whole = Data(too_long="truncate-end")
    path = verify or str(paths.bundled(*TEXT))
    return questions(path, whole, tokenizer, exact=False, prefer=VALID_FIRST, progress=progress).rows


def _pack(loaded: LoadedModel, settings: dict[str, Any], warn: Callable[[str], None]) -> Packing:
    """Pack the model lazily, with what is packed already, or was, on its own grid where that is no wider."""
    sizes = layer_sizes(loaded.model)
    packed = {path: its for path, layer in loaded.model.named_modules() if (its := layer_settings(layer))}
    kept = {
        path: its for path, its in packed.items()
        if its["mode"] == settings["mode"] and its["bits"] <= settings["bits"]
    }  # fmt: skip
    if len(kept) < len(packed):
        warn(
            f"{len(packed) - len(kept)} layers of {loaded.path.name} are quantized already, in another format or at "
            "more bits; they go through half precision, which adds to their error"
        )
    dequantize_model(loaded, half(loaded.stored), keep=kept)
    on_grid = {} if settings["mode"] != "affine" else {
        name.removesuffix(".weight"): its
        for name, rows in half_precision_rows(loaded.path).items()
        if (its := grid_of(rows, settings["bits"]))
    }  # fmt: skip
    packing = pack_lazily(loaded.model, settings, kept=kept, on_own_grid=on_grid)
    check_coverage(sizes, packing.quantized.left_alone, settings)
    return packing


def _agreement(opened: OpenModel, out: Path, rows: Sequence[Row], progress: OnFile) -> Agreement:
    """Run the result and free it, then run the source a layer at a time; at the end the heads compare."""
    advance = progress("running the result", len(rows))
    result = load(out).model
    after = predictions(result, rows, on_row=advance)
    reason = not_by_layer(after.trunk)
    after.free()
    del result
    mx.clear_cache()
    source = ready(load_stored(opened), read=reason is not None).model
    if reason is not None:
        log.info("%s is whole in memory while it is compared: %s", opened.path, reason)
        before = predictions(source, rows, on_row=progress("running the source", len(rows)))
        before.free()
    else:
        trunk = Trunk(source, after.trunk.name, after.trunk.language, after.trunk.vocabulary)
        advance = progress("running the source", len(layers_of(source)) + 1)
        before = predictions_by_layer(trunk, rows, on_layer=advance)
    return compare(before, after, rows)


def damage(agreement: Agreement) -> str | None:
    """What to say of a result that no longer says what its source says, or None."""
    if agreement.kl <= MOST_KL and agreement.top1_agreement >= LEAST_SAME:
        return None
    return (
        f"the result is damaged: on the measured text it names the source's most likely token only "
        f"{agreement.top1_agreement:.0%} of the time, KL {agreement.kl:.2f} nats, perplexity "
        f"{agreement.perplexity_before:.1f} -> {agreement.perplexity_after:.1f}; take more bits or smaller groups, or "
        "quantize the model that this one was made of"
    )
