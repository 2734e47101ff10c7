"""How much a changed model differs from the one it came from: KL, top-1 agreement, perplexity, delta survival.

What `quantize`, `fuse` and every export report. Both models see the same rows; nothing is sampled here. They run one
after the other: of the first one only its head and the states that enter it are kept, so two whole models are never in
memory, nor are the logits of a whole row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.batch import collate
from mlx_lora.data.rows import Row
from mlx_lora.errors import NotFinite
from mlx_lora.models.layers import release
from mlx_lora.models.trunk.by_layer import release_embeddings, run_by_layer
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.states_file import StatesFile
from mlx_lora.models.trunk.trunk import Trunk
from mlx_lora.models.trunk.verify import take_apart

# Bytes of one model's float32 logits at a time, unless these positions have more.
TILE_BYTES, LEAST_POSITIONS = 16 << 20, 16


@dataclass(frozen=True)
class Agreement:
    """Means over the positions with loss: KL(before ‖ after) in nats, share of equal top tokens, both perplexities."""

    kl: float
    top1_agreement: float
    perplexity_before: float
    perplexity_after: float
    tokens: int


@dataclass(frozen=True)
class RowAgreement:
    """Sums over one row's positions with loss, of which there are `tokens`; nats, and positions with one top token."""

    kl: float
    same: float
    nll_before: float
    nll_after: float
    tokens: int


@dataclass
class Predictions:
    """What a model says of some rows: the states that enter its head at the positions with loss, and the head.

    The states, (N, d) for each row by its number, lie in a file. Of a model that can't be taken apart they are the
    logits of these positions themselves, and the head hands them on. `attach` is called before the head is: it makes
    the model again what it was when the states were computed, where one model is both sides of a comparison.
    """

    trunk: Trunk
    states: StatesFile
    attach: Callable[[], object] = lambda: None

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (N, V) of some of the states (N, d)."""
        self.attach()
        return self.trunk.head(hidden)

    def free(self) -> None:
        """Let go of all of the model but its head: it can't run afterwards, and these predictions still compare."""
        self.trunk.trial = None  # which holds every array of the model
        if self.trunk.apart and 0 in self.states:
            for layer in layers_of(self.trunk.model):
                release(layer)
            release_embeddings(self.trunk, self.states[0][None])


def predictions(model: nn.Module, rows: Sequence[Row], *, on_row: Callable[[], None] = lambda: None) -> Predictions:
    """Run a model over every row; it stays as it is."""
    trunk, states = take_apart(model), StatesFile()
    for number, row in enumerate(rows):
        batch = collate([row])
        hidden = trunk.run(mx.array(batch.inputs))
        states[number] = hidden.reshape(-1, hidden.shape[-1])[mx.array(batch.with_loss()[0])]
        on_row()
    return Predictions(trunk, states)


def predictions_by_layer(
    trunk: Trunk, rows: Sequence[Row], *, on_layer: Callable[[], None] = lambda: None
) -> Predictions:
    """The same of a model whose arrays are lazy, with only one of its layers in memory; it can't run afterwards."""
    states, batches = StatesFile(), [collate([row]) for row in rows]
    run_by_layer(trunk, [mx.array(batch.inputs) for batch in batches], states, on_layer=on_layer)
    for number, batch in enumerate(batches):
        states[number] = states[number][0, mx.array(batch.with_loss()[0])]
    return Predictions(trunk, states)


def compare(before: Predictions, after: Predictions, rows: Sequence[Row]) -> Agreement:
    """Compare two models' next-token distributions where the rows carry loss, some positions at a time.

    Raises NotFinite for a model whose logits aren't finite.
    """
    each = list(compare_each(before, after, rows))
    tokens = sum(row.tokens for row in each)
    totals = [sum(sums) for sums in zip(*((r.kl, r.same, r.nll_before, r.nll_after) for r in each), strict=True)]
    kl, same, nll_before, nll_after = (total / max(tokens, 1) for total in totals or [0.0] * 4)
    return Agreement(
        kl=max(kl, 0.0),
        top1_agreement=same,
        perplexity_before=math.exp(nll_before),
        perplexity_after=math.exp(nll_after),
        tokens=tokens,
    )


def compare_each(before: Predictions, after: Predictions, rows: Sequence[Row]) -> Iterator[RowAgreement]:
    """The sums of `compare` row by row, in their order; a row without loss has zeros. Raises as `compare` does."""
    vocabulary = max(before.trunk.vocabulary, after.trunk.vocabulary)
    step = max(TILE_BYTES // (4 * vocabulary), LEAST_POSITIONS)
    for number, batch in enumerate(collate([row]) for row in rows):
        totals = np.zeros(4)
        positions, targets, weights = batch.with_loss() if batch.trained else (np.zeros(0),) * 3
        states = [side.states[number] for side in (before, after)] if batch.trained else []
        for start in range(0, len(positions), step):
            tile = slice(start, start + step)
            first, second = (
                _log_probabilities(side.head(hidden[tile]))
                for side, hidden in zip((before, after), states, strict=True)
            )
            sums = np.array(_sums(first, second, mx.array(targets[tile]), mx.array(weights[tile])).tolist())
            if not np.isfinite(sums).all():
                wrong = "after" if np.isfinite(sums[2]) else "before"
                raise NotFinite(
                    f"the logits of the model {wrong} the change aren't finite",
                    hint="mlx-lora generate with that model names the part at fault",
                )
            totals += sums
        kl, same, nll_before, nll_after = totals.tolist()
        yield RowAgreement(kl, same, nll_before, nll_after, batch.trained)


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
