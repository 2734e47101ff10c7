"""Fuse a stored adapter into its base by name, measured on the user's rows or on text the base generates."""

from __future__ import annotations

from pathlib import Path

from mlx_lora import paths
from mlx_lora.config import Data
from mlx_lora.data.encode import Row
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.errors import NameTaken
from mlx_lora.interop.fuse import Fused, fuse
from mlx_lora.measure import rows_of_tokens
from mlx_lora.models.load import LoadedModel
from mlx_lora.serve.engine import Engine, Sampling
from mlx_lora.store import registry
from mlx_lora.store.adapter import StoredAdapter, read, wrappers_for
from mlx_lora.store.base import base_for
from mlx_lora.study.evaluate import VALID_FIRST, questions

GENERATED_ROWS, GENERATED_TOKENS = 8, 64
MOST_ROWS = 32


def fuse_adapter(
    model: str | None,
    adapter: str,
    out: Path,
    *,
    bits: str | None = None,
    data: str | None = None,
    force: bool = False,
    progress: OnFile = silent,
) -> Fused:
    """Merge into `model`, by default the adapter's own base, and measure.

    Raises before loading when `out` exists, and CannotFuse when the update doesn't survive.
    """
    paths.check_target(out, force=force)
    stored_adapter = read(registry.find(adapter))
    opened = base_for(model, [stored_adapter])
    if out.resolve() == opened.path.resolve():
        raise NameTaken(f"{out} is the model itself", hint="choose another directory")
    reference = registry.open_base(opened, [stored_adapter])
    if data is not None:
        settings = Data.model_validate((stored_adapter.manifest.recipe or {}).get("data", {}))
        asked = questions(data, settings, reference.tokenizer, exact=False, prefer=VALID_FIRST, progress=progress)
        rows = asked.rows[:MOST_ROWS]
    else:
        rows = generated_rows(reference, stored_adapter, progress=progress)
    stored = registry.open_stored(opened, [stored_adapter])
    advance = progress("comparing with base and adapter", len(rows))
    return fuse(stored, reference, stored_adapter, out, rows, bits=bits, force=force, on_row=advance)


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
