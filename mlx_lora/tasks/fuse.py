"""Fuse a stored adapter into its base by name, measured on the user's rows or on text the base generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora import paths
from mlx_lora.adapters.attach import put
from mlx_lora.config import Data
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.data.rows import Row
from mlx_lora.data.splits import VALID_FIRST
from mlx_lora.interop.fuse import Fused, fuse
from mlx_lora.measure import Agreement, Predictions, compare, predictions, rows_of_tokens
from mlx_lora.models import chat_templates
from mlx_lora.models.load import LoadedModel, load
from mlx_lora.serve.conversation import trained
from mlx_lora.serve.engine import Engine, Sampling
from mlx_lora.store import registry
from mlx_lora.store.adapter import StoredAdapter, read, wrappers_for
from mlx_lora.store.base import base_for
from mlx_lora.study.evaluate import questions

GENERATED_ROWS, GENERATED_TOKENS = 8, 64
MOST_ROWS = 32


@dataclass(frozen=True)
class Measured:
    """A fused model, and how its outputs agree with base and adapter on the measured rows."""

    fused: Fused
    agreement: Agreement

    def as_dict(self) -> dict[str, Any]:
        """The keys of `fuse --json`."""
        return self.fused.as_dict(self.agreement)


def fuse_adapter(
    model: str | None,
    adapter: str,
    out: Path,
    *,
    bits: str | None = None,
    zero_points: str | None = None,
    data: str | None = None,
    force: bool = False,
    progress: OnFile = silent,
) -> Measured:
    """Merge into `model`, by default the adapter's own base, and measure.

    The base with its adapter runs after the result was written, and the result after the base was freed. Raises before
    loading when `out` exists, and CannotFuse when the update doesn't survive.
    """
    paths.check_target(out, force=force)
    stored_adapter = read(registry.find(adapter))
    opened = base_for(model, [stored_adapter])
    paths.check_apart(out, model=opened.path, adapter=stored_adapter.path)
    rows = None if data is None else rows_of(data, stored_adapter, opened.tokenizer, progress)

    def open_stored() -> LoadedModel:
        return registry.open_stored(opened, [stored_adapter], lazily=True)

    fused = fuse(open_stored, stored_adapter, out, bits=bits, zero_points=zero_points, force=force)
    if stored_adapter.chat_template is not None:
        chat_templates.give(out, stored_adapter.chat_template, stored_adapter.manifest.answer_end)
    reference = registry.open_base(opened, [stored_adapter])
    if rows is None:
        rows = generated_rows(reference, stored_adapter, progress=progress)
    put(reference.model, wrappers_for(reference.model, stored_adapter))
    before = predictions(reference.model, rows, on_row=progress("running base and adapter", len(rows)))
    before.free()
    del reference
    mx.clear_cache()
    return Measured(fused, agreement_with(before, out, rows, progress=progress))


def agreement_with(before: Predictions, out: Path, rows: Sequence[Row], *, progress: OnFile = silent) -> Agreement:
    """How the fused model in `out` agrees with what base and adapter predict on these rows."""
    after = predictions(load(out).model, rows, on_row=progress("running the fused model", len(rows)))
    after.free()
    return compare(before, after, rows)


def rows_of(data: str, adapter: StoredAdapter, tokenizer: Any, progress: OnFile) -> Sequence[Row]:
    """At most MOST_ROWS rows of the user's data, as the adapter was trained to be asked."""
    settings = Data.model_validate((adapter.manifest.recipe or {}).get("data", {}))
    chats = trained(adapter).format(tokenizer) if adapter.chat_template is not None else None
    asked = questions(data, settings, tokenizer, exact=False, format=chats, prefer=VALID_FIRST, progress=progress)
    return asked.rows[:MOST_ROWS]


def generated_rows(loaded: LoadedModel, adapter: StoredAdapter, *, progress: OnFile = silent) -> list[Row]:
    """Text that the base and the adapter write by themselves at temperature 1, from an end token on: always there,
    never private. Half the rows come from each."""
    engine = Engine(loaded)
    engine.add(adapter.name, wrappers_for(loaded.model, adapter))
    start = loaded.tokenizer.bos_token_id
    start = min(engine.ends) if start is None else start
    advance = progress("generating text to compare on", GENERATED_ROWS)
    sequences = []
    for seed in range(GENERATED_ROWS):
        engine.use(adapter.name if seed % 2 else None)
        tokens = engine.stream([start], max_tokens=GENERATED_TOKENS, sampling=Sampling(temperature=1.0, seed=seed))
        sequences.append([start, *tokens])
        advance()
    engine.use(None)
    return rows_of_tokens(sequences)
