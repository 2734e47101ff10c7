"""What an exported model says beside the live base and adapter, and whether the adapter is still in it.

Other programs tell only the most likely tokens, so that is what is compared: the live model's `COUNT` most likely
tokens at stated positions, and all others together as one. Whether an artefact has kept the adapter is not seen in how
far it is from the live model, since quantizing the base moves it as well. It is seen in how far it moved along the way
that the adapter moves the base: with the adapter's effect d = log p(live) − log p(base) and the artefact's
e = log p(artefact) − log p(artefact without an adapter), `kept` is the slope Σ p·d·e / Σ p·d·d, each centred at its
position. Noise that has nothing to do with the adapter leaves it near 1; an artefact that is the base again has 0.
Where nobody wrote the artefact without an adapter, the base stands for it.

Knows no file and no program: what an artefact says comes from its caller.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.rows import Row
from mlx_lora.errors import CannotFuse, NotFinite

log = logging.getLogger(__name__)

COUNT = 100
MOST_POSITIONS = 64
LEAST_KEPT, MOST_KEPT = 0.5, 1.5
# An artefact that is farther than this from the live model, in nats, and than the adapter moves the base, is damaged.
MOST_KL = 1.0
# Below this much of a change, in nats at a position, the noise of a number format hides whether it is there.
LEAST_EFFECT = 1e-4
# Probability of nothing, after rounding.
TINY = 1e-9

# Log-probabilities of the next token's most likely values by token id, at each position.
TopTokens = list[dict[int, float]]


@dataclass(frozen=True)
class Asked:
    """A row of tokens, and the positions whose next token is asked for: after `tokens[:position]`."""

    tokens: list[int]
    positions: list[int]


@dataclass(frozen=True)
class Checked:
    """What a program says of an artefact, at `positions` places. KL is in nats, live model first.

    `adapter_kl` is how far the adapter moves the base, `quantization_kl` how far the artefact's number format does
    without an adapter (None where it has none). `kept` is the share of the adapter's effect that is in the artefact.
    """

    program: str
    positions: int
    kl: float
    top1_agreement: float
    adapter_kl: float
    kept: float
    kept_error: float
    quantization_kl: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def finite(self) -> bool:
        """Whether the artefact says numbers."""
        return math.isfinite(self.kl) and math.isfinite(self.kept)

    @property
    def lost(self) -> bool:
        """Whether the adapter surely isn't in the artefact, or is there too strongly, or the whole model is damaged."""
        if self.finite and self.kl > max(MOST_KL, 2 * self.adapter_kl):
            return True
        low, high = self.kept - self.kept_error, self.kept + self.kept_error
        return not self.finite or (self.adapter_kl > LEAST_EFFECT and (high < LEAST_KEPT or low > MOST_KEPT))


def questions(rows: Sequence[Row], *, most: int = MOST_POSITIONS) -> list[Asked]:
    """Positions spread evenly over the tokens with loss of some rows, at most `most` in all."""
    places = [(number, at) for number, row in enumerate(rows) for at in np.flatnonzero(row.weights) if at > 0]
    chosen = [places[round(index)] for index in np.linspace(0, len(places) - 1, min(most, len(places)))]
    return [
        Asked([int(token) for token in row.tokens], positions)
        for number, row in enumerate(rows)
        if (positions := sorted({int(at) for own, at in chosen if own == number}))
    ]


def prompts(asked: Sequence[Asked]) -> list[list[int]]:
    """The tokens before each position, in order, for programs that take prompts."""
    return [each.tokens[:position] for each in asked for position in each.positions]


def top_tokens(model: nn.Module, asked: Sequence[Asked], *, count: int = COUNT) -> TopTokens:
    """What an MLX model says there: its `count` most likely next tokens."""
    found: TopTokens = []
    for each in asked:
        length = max(each.positions)
        logits = model(mx.array([each.tokens[:length]]))[0][mx.array([at - 1 for at in each.positions])]
        found += most_likely(np.array(logits.astype(mx.float32)), count=count)
    return found


def most_likely(logits: np.ndarray, *, count: int = COUNT) -> TopTokens:
    """The `count` most likely tokens of logits (positions, vocabulary), with their log-probabilities."""
    found: TopTokens = []
    for row in logits.astype(np.float64):
        highest = row.max()
        row = row - highest - np.log(np.exp(row - highest).sum())
        tokens = np.argpartition(-row, min(count, len(row)) - 1)[:count]
        found.append({int(token): float(row[token]) for token in tokens})
    return found


def check(
    program: str,
    live: TopTokens,
    base: TopTokens,
    artefact: TopTokens,
    *,
    plain: TopTokens | None = None,
) -> Checked:
    """Compare an artefact with the live model and its base; `plain` is the same artefact made without an adapter.

    All four speak of the same positions. `base`, `plain` and `artefact` should list more tokens than `live`. Raises
    CannotFuse where there are no positions.
    """
    if not live:
        raise CannotFuse("there is no text to compare the export on", hint="--data with rows that have answers")
    pairs = list(zip(live, artefact, strict=True))
    sides = zip(live, base, base if plain is None else plain, artefact, strict=True)
    kept, error = _slope(np.array([_effects(*four) for four in sides]))
    return Checked(
        program=program,
        positions=len(pairs),
        kl=mean_divergence(live, artefact),
        top1_agreement=float(np.mean([_first(ours) == _first(theirs) for ours, theirs in pairs])),
        adapter_kl=mean_divergence(live, base),
        kept=kept,
        kept_error=error,
        quantization_kl=None if plain is None else mean_divergence(base, plain),
    )


def _slope(effects: np.ndarray) -> tuple[float, float]:
    """Σ d·e / Σ d·d over positions (N, 2), and twice its standard error, positions taken as independent."""
    found, meant = effects.sum(axis=0)
    if meant == 0:
        return 1.0, 0.0  # an adapter without any effect is whole in anything
    slope = found / meant
    return float(slope), float(2 * np.sqrt(np.square(effects[:, 0] - slope * effects[:, 1]).sum()) / meant)


def refuse_lost(checked: Checked, *, force: bool = False) -> None:
    """Raise CannotFuse where the adapter isn't in the artefact as trained, or warn if forced; NotFinite always."""
    if not checked.finite:
        raise NotFinite(
            f"what {checked.program} says of the exported model isn't finite", hint="export in another number format"
        )
    if not checked.lost:
        return
    said = (
        f"{checked.program} says that {max(checked.kept, 0):.0%} of the adapter's effect is in the exported model "
        f"(KL to base and adapter {checked.kl:.4f} nats, the adapter's own {checked.adapter_kl:.4f})"
    )
    if not force:
        raise CannotFuse(said, hint="export with more bits, or --force to write it anyway")
    log.warning("%s; it is written, as --force asks", said)


def mean_divergence(one: TopTokens, other: TopTokens) -> float:
    """The mean over positions of `divergence`."""
    return float(np.mean([divergence(*pair) for pair in zip(one, other, strict=True)]))


def divergence(one: dict[int, float], other: dict[int, float], *, most: int = COUNT) -> float:
    """KL(one ‖ other) in nats over the `most` most likely tokens of `one`, and all the rest taken as one token.

    A token that `other` doesn't list is at most as likely as the least that it lists. It counts as just that where
    `one` finds it likelier, and as part of the rest where not: taking tokens together never makes KL larger.
    """
    least = min(other.values())
    ordered = sorted(one, key=lambda token: -one[token])[:most]
    tokens = [token for token in ordered if token in other or one[token] > least]
    p = np.exp([one[token] for token in tokens])
    q = np.exp([other.get(token, least) for token in tokens])
    rest_p, rest_q = (max(1 - share.sum(), TINY) for share in (p, q))
    return max(float((p * np.log(p / q)).sum() + rest_p * np.log(rest_p / rest_q)), 0.0)


def _effects(
    live: dict[int, float], base: dict[int, float], without: dict[int, float], artefact: dict[int, float]
) -> tuple[float, float]:
    """Σ p·d·e and Σ p·d·d over the live model's tokens, d = live − base and e = artefact − without, centred under p."""
    tokens = list(live)
    p = np.exp([live[token] for token in tokens])
    p /= p.sum()
    moved, found = (
        np.array(_at(after, tokens)) - np.array(_at(before, tokens))
        for before, after in ((base, live), (without, artefact))
    )
    moved, found = moved - (p * moved).sum(), found - (p * found).sum()
    return float((p * moved * found).sum()), float((p * moved * moved).sum())


def _at(listed: dict[int, float], tokens: list[int]) -> list[float]:
    least = min(listed.values())
    return [listed.get(token, least) for token in tokens]


def _first(listed: dict[int, float]) -> int:
    return max(listed, key=lambda token: listed[token])
