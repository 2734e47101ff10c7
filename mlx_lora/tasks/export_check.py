"""The gate that every export passes: what the live base and adapter say, beside what the exported model says.

The positions are those of the user's rows, or of text that base and adapter write themselves. The live model runs
first and is freed; then the artefact runs in its own program. What came out is kept beside the artefact.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora import __version__, paths
from mlx_lora.adapters.attach import put
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.interop.gate import Asked, Checked, TopTokens, prompts, questions, top_tokens
from mlx_lora.models.open import OpenModel
from mlx_lora.store import registry
from mlx_lora.store.adapter import StoredAdapter, read, wrappers_for
from mlx_lora.store.base import base_for
from mlx_lora.tasks.fuse import generated_rows, rows_of

RECORD = "export.json"
# Tokens that the base lists at a position, which must hold those that the adapter made likely.
BASE_COUNT = 2000


@dataclass(frozen=True)
class Reference:
    """What base and adapter say at the asked positions (`live`), and the base alone."""

    asked: list[Asked]
    live: TopTokens
    base: TopTokens

    @property
    def prompts(self) -> list[list[int]]:
        return prompts(self.asked)


def sources(model: str | None, adapter: str, out: Path, force: bool) -> tuple[OpenModel, StoredAdapter]:
    """Base and adapter, once it is sure that the directory `out` may be written."""
    paths.check_target(out, force=force)
    stored = read(registry.find(adapter))
    opened = base_for(model, [stored])
    paths.check_apart(out, model=opened.path, adapter=stored.path)
    return opened, stored


def reference(
    opened: OpenModel, adapter: StoredAdapter, data: str | None = None, *, progress: OnFile = silent
) -> Reference:
    """Run base and adapter over the rows of `data`, or over text that they write, and free them."""
    rows = None if data is None else list(rows_of(data, adapter, opened.tokenizer, progress))
    loaded = registry.open_base(opened, [adapter])
    if rows is None:
        rows = generated_rows(loaded, adapter, progress=progress)
    asked = questions(rows)
    base = top_tokens(loaded.model, asked, count=BASE_COUNT)
    put(loaded.model, wrappers_for(loaded.model, adapter))
    live = top_tokens(loaded.model, asked)
    del loaded
    mx.clear_cache()
    return Reference(asked, live, base)


def record(
    file: Path, kind: str, opened: OpenModel, adapter: StoredAdapter, checked: Checked | None, **more: Any
) -> dict[str, Any]:
    """Write what was exported and how it was checked to `file`, and return it: the keys of `export … --json`."""
    base = adapter.manifest.base
    values = {
        "format": kind,
        "base": registry.base_name(opened.path),
        "base_fingerprint": None if base is None else base.fingerprint,
        "adapter": adapter.name,
        "adapter_sha256": adapter.manifest.weights_sha256,
        "mlx_lora": __version__,
        "check": None if checked is None else checked.as_dict(),
        **more,
    }
    with paths.created(file) as stream:
        stream.write((json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
    return values
