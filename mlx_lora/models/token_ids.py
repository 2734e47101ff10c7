"""Token ids that a model's embedding has no row for: how many rows there are, and an error that names the token.

A tokenizer with tokens added to it, or of another model, gives such ids. MLX checks no index: on a CPU it reads beyond
the weights, which ends the process, and on a GPU it computes with whatever is there. So the tokenizer of a model knows
the number of rows (`remember_rows`), and wherever text becomes tokens, or tokens enter the model, the largest id is
compared with it. That costs microseconds a row, less than looking for the largest id that the tokenizer could give.
Ids below 0 are the virtual tokens of prompt tuning, which the adapter serves itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from mlx_lora.errors import ModelError
from mlx_lora.models.architectures import VOCABULARY_SIZES

HINT = "use the model's own tokenizer, or remove the tokens that were added to it"
_ROWS = "embedding_rows"
log = logging.getLogger(__name__)


def rows_of(config: dict[str, Any], arguments: type | None = None) -> int | None:
    """Rows of the embedding that mlx_lm builds from this config.json, or None where it doesn't say.

    `arguments` is mlx_lm's class of the model's settings, whose defaults stand for what config.json leaves out.
    """
    inner = config.get("text_config")
    defaults = {key: getattr(arguments, key, None) for key in VOCABULARY_SIZES}
    parts = [config, inner if isinstance(inner, dict) else {}, defaults]
    found = (part.get(key) for part in parts for key in VOCABULARY_SIZES)
    return next((rows for rows in found if isinstance(rows, int) and rows > 0), None)


def remember_rows(tokenizer: Any, rows: int | None) -> None:
    """Note on a tokenizer how many rows its model's embedding has; None for not known, then nothing is checked.

    Tokens without a row don't end an answer: the model can't say them. Raises ModelError where no other ends it.
    """
    setattr(tokenizer, _ROWS, rows)
    ends = sorted(tokenizer.eos_token_ids)
    wrong = [end for end in ends if end < 0 or beyond(tokenizer, [end]) is not None]
    if wrong and len(wrong) == len(ends):
        raise ModelError(f"no answer could end: eos_token_id is {wrong[0]}, the embedding has {rows} rows", hint=HINT)
    if wrong:
        log.info("eos_token_id names %s, the embedding has %s rows: ignored", ", ".join(map(str, wrong)), rows)
        tokenizer.eos_token_ids = set(ends) - set(wrong)


def beyond(tokenizer: Any, tokens: Sequence[int]) -> int | None:
    """The largest of `tokens` if the embedding has no row for it, else None."""
    rows = getattr(tokenizer, _ROWS, None)
    largest = max(tokens, default=-1)
    return int(largest) if rows is not None and largest >= rows else None


def fault(tokenizer: Any, tokens: Sequence[int]) -> str | None:
    """What is wrong with `tokens`, naming the token that has no row, or None."""
    if (token := beyond(tokenizer, tokens)) is None:
        return None
    rows = getattr(tokenizer, _ROWS)
    return f"token {tokenizer.decode([token])!r} has id {token}, the model's embedding has {rows} rows"


def check(tokenizer: Any, tokens: Sequence[int]) -> None:
    """Raise ModelError, saying what to do, where `tokens` has one without a row."""
    if found := fault(tokenizer, tokens):
        raise ModelError(found, hint=HINT)
