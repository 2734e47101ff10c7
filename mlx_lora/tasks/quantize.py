"""Quantize a model directory into another, and measure the result against its source when asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_lora import paths
from mlx_lora.config import Data, Quantize
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.errors import NameTaken
from mlx_lora.measure import as_dict, compare
from mlx_lora.models.layers import dequantize_model, half
from mlx_lora.models.load import load, load_stored
from mlx_lora.models.open import open_model
from mlx_lora.models.save import save
from mlx_lora.quant.quantize import is_quantized, quantize
from mlx_lora.study.evaluate import VALID_FIRST, questions


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
    """Write `out` and return the keys of `quantize --json`. A quantized source goes through half precision first.

    Raises before loading when `out` exists, and DataError when the rows to verify on can't be used.
    """
    paths.check_target(out, force=force)
    opened = open_model(model)
    if out.resolve() == opened.path.resolve():
        raise NameTaken(f"{out} is the model itself", hint="choose another directory")
    loaded = load_stored(opened)
    rows = []
    if verify:
        whole = Data(too_long="truncate-end")
        rows = questions(verify, whole, loaded.tokenizer, exact=False, prefer=VALID_FIRST, progress=progress).rows
    if is_quantized(loaded.model):
        warn(f"{model} is quantized already; going through half precision adds to its error")
        dequantize_model(loaded, half(loaded.stored))
    advance = progress("quantizing", sum("weight" in module for _, module in loaded.model.named_modules()))
    done = quantize(loaded.model, settings.complete(), on_layer=lambda path: advance())
    loaded.config["quantization"] = done.config
    saved = save(loaded, out, force=force)
    report: dict[str, Any] = {
        "out": str(out),
        **done.settings,
        "bits_per_weight": done.bits_per_weight,
        "bytes": saved.bytes,
        "relative_error": done.relative_error,
        "left_alone": done.left_alone,
        "carried": saved.beside.as_dict(),
    }
    if rows:
        advance = progress("comparing with the source", len(rows))
        report |= as_dict(compare(load(model).model, load(out).model, rows, on_row=advance))
    return report
