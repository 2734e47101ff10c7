"""How far an adapter has moved a model: KL from the base, and what other text costs it now.

    KL(base ‖ tuned) = Σₜ Σᵥ p_base(v | <t) · (log p_base(v | <t) − log p_tuned(v | <t)) / tokens

over the positions with loss, in nats per token, exact over the whole vocabulary. On the task's own rows it goes with
how much is forgotten elsewhere (arXiv 2509.04259, which takes the forward KL, in this direction, and draws the answers
from the base; here they are those of the rows). On general text the losses themselves are compared.

Both sides are the same model, with the adapter and without; of each only the states that enter its head are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mlx_lora.data.rows import Row
from mlx_lora.measure import Predictions, RowAgreement, compare_each, predictions
from mlx_lora.serve.engine import Engine
from mlx_lora.study.statistics import Difference, of_losses

T = TypeVar("T")

# Rows of the task that are looked at, evenly spaced: enough for a mean, and few enough to wait for.
MOST_ROWS = 200


@dataclass(frozen=True)
class Moved:
    """Over some rows: `kl` per token in nats, both mean losses per token, and their `difference`, tuned − base."""

    kl: float
    loss_base: float
    loss_tuned: float
    difference: Difference


def spaced(items: Sequence[T], most: int = MOST_ROWS) -> list[T]:
    """At most `most` of the items, evenly spaced and in order."""
    if len(items) <= most:
        return list(items)
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, most).round()]


class Drift:
    """Compares adapters of an engine with its base on some rows. What the base says is computed once.

    `on_row` is called for each row that a side reads. Raises NotFinite where logits aren't finite.
    """

    def __init__(self, engine: Engine, rows: Sequence[Row], on_row: Callable[[], None] = lambda: None):
        self.engine, self.rows, self.on_row = engine, rows, on_row
        self.base = self._said(None)

    def of(self, name: str, *, seed: int = 0) -> Moved:
        """How the adapter called `name` differs from the base; it is left attached."""
        tuned = self._said(name)
        each = [row for row in compare_each(self.base, tuned, self.rows) if row.tokens]
        return moved(each, seed=seed)

    def _said(self, name: str | None) -> Predictions:
        self.engine.use(name)
        virtual = self.engine.virtual
        rows = [virtual.row(row) for row in self.rows] if virtual else self.rows
        found = predictions(self.engine.loaded.model, rows, on_row=self.on_row)
        found.attach = lambda: self.engine.current == name or self.engine.use(name)
        return found


def moved(each: Sequence[RowAgreement], *, seed: int = 0) -> Moved:
    """The means over rows that have tokens with loss. Raises ValueError where there are none."""
    before, after, tokens = (
        np.array([getattr(row, name) for row in each], float) for name in ("nll_before", "nll_after", "tokens")
    )
    difference = of_losses(before, after, tokens, seed=seed)
    total = tokens.sum()
    return Moved(
        kl=max(sum(row.kl for row in each) / total, 0.0),
        loss_base=before.sum() / total,
        loss_tuned=after.sum() / total,
        difference=difference,
    )
