"""How many tokens a model was made for, from its config.json."""

from __future__ import annotations

from typing import Any

# The same setting in different families of models; a vision model has it in its text part.
KEYS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length",
)  # fmt: skip
TEXT_PARTS = ("text_config", "llm_config", "language_config")
# Rotary scalings that lengthen the context by their factor and may leave the setting at what it was before.
LENGTHENING = ("yarn", "linear", "dynamic")


def context_length(config: dict[str, Any]) -> int | None:
    """Positions that the model of a config.json knows; None where it doesn't say, as recurrent models don't.

    A sliding window bounds what one layer looks back at, not the positions: it plays no part here.
    """
    for part in (config, *(config[key] for key in TEXT_PARTS if isinstance(config.get(key), dict))):
        for key in KEYS:
            if (length := _count(part.get(key))) is not None:
                return max(length, _lengthened(part, length))
    return None


def _lengthened(config: dict[str, Any], length: int) -> int:
    """The context after rotary scaling."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type")) not in LENGTHENING:
        return length
    factor = scaling.get("factor")
    before = _count(scaling.get("original_max_position_embeddings")) or length
    return int(before * factor) if isinstance(factor, int | float) and 1 <= factor < 1e6 else length


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
