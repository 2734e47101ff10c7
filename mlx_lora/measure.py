"""How much a changed model differs from the one it came from: KL, top-1 agreement, perplexity, delta survival.

What `quantize --verify`, `fuse` and every export report. Both models see the same rows; nothing is sampled here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.batch import collate
from mlx_lora.data.encode import Row
from mlx_lora.models import finite
from mlx_lora.models.trunk.trunk import logits_at
from mlx_lora.models.trunk.verify import take_apart


@dataclass(frozen=True)
class Agreement:
    """Means over the positions with loss: KL(before ‖ after) in nats, share of equal top tokens, both perplexities."""

    kl: float
    top1_agreement: float
    perplexity_before: float
    perplexity_after: float
    tokens: int


def compare(
    before: nn.Module, after: nn.Module, rows: Sequence[Row], *, on_row: Callable[[], None] = lambda: None
) -> Agreement:
    """Run both models over every row and compare their next-token distributions where the rows carry loss.

    Raises NotFinite for a model whose logits aren't finite.
    """
    models = [logits_at(take_apart(model)) for model in (before, after)]
    totals, tokens = np.zeros(4), 0
    for row in rows:
        batch = collate([row])
        on_row()
        if not batch.trained:
            continue
        positions, targets, weights = (mx.array(array) for array in batch.with_loss())
        first, second = (_log_probabilities(logits(mx.array(batch.inputs), positions)) for logits in models)
        sums = np.array(_sums(first, second, targets, weights).tolist())
        if not np.isfinite(sums).all():
            model = after if np.isfinite(sums[2]) else before
            raise finite.error(model, mx.array(batch.inputs))
        totals += sums
        tokens += batch.trained
    kl, same, nll_before, nll_after = totals / max(tokens, 1)
    return Agreement(
        kl=max(float(kl), 0.0),
        top1_agreement=float(same),
        perplexity_before=math.exp(nll_before),
        perplexity_after=math.exp(nll_after),
        tokens=tokens,
    )


def _log_probabilities(logits: mx.array) -> mx.array:
    rows = logits.astype(mx.float32)
    return rows - mx.logsumexp(rows, axis=-1, keepdims=True)


def _sums(before: mx.array, after: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    counted = (weights != 0).astype(mx.float32)
    kl = (mx.exp(before) * (before - after)).sum(axis=-1)
    same = before.argmax(axis=-1) == after.argmax(axis=-1)
    nll = [-mx.take_along_axis(p, targets[:, None], axis=-1).squeeze(-1) for p in (before, after)]
    return mx.stack([(value * counted).sum() for value in (kl, same, *nll)])


def survival(pairs: Iterable[tuple[mx.array, mx.array]]) -> float:
    """1 − ‖realised − intended‖ / ‖intended‖, Frobenius norms over all (intended, realised) updates together.

    1 when the update is all there, 0 when as much noise as update came out, negative when more. 1 for no update.
    """
    lost, meant = 0.0, 0.0
    for intended, realised in pairs:
        lost += float(np.array(mx.square(realised - intended).sum()))
        meant += float(np.array(mx.square(intended).sum()))
    return 1.0 - math.sqrt(lost / meant) if meant else 1.0


def rows_of_tokens(sequences: Iterable[Sequence[int]]) -> list[Row]:
    """Rows with loss on every token but the first, from token ids."""
    rows = [np.array(list(sequence), np.int32) for sequence in sequences]
    return [Row(tokens, np.array([0.0] + [1.0] * (len(tokens) - 1), np.float32)) for tokens in rows if len(tokens) > 1]


def as_dict(agreement: Agreement) -> dict[str, Any]:
    """The keys that commands print."""
    return {
        "kl": agreement.kl,
        "top1_agreement": agreement.top1_agreement,
        "perplexity_before": agreement.perplexity_before,
        "perplexity_after": agreement.perplexity_after,
    }
