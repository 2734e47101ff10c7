"""How much of its training rows an adapter gives away, by three measures that an attacker could take.

    extraction   greedy continuation of a row's beginning gives the rest back verbatim
    membership   the loss is lower on training rows than on others, so it tells them apart
    exposure     a planted secret is more likely than other secrets that were never seen

What can be guessed is no leak. So the base is asked the same, and so are held-out rows. Extraction is Carlini et al.,
arXiv 2012.07805 and 2202.07646; membership by loss Yeom et al., arXiv 1709.01604, and with the base's loss as reference
Watson et al., arXiv 2111.08440; exposure Carlini et al., The Secret Sharer, arXiv 1802.08232. No files, no screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_lora.data.rows import Row, common, trained
from mlx_lora.serve.engine import Engine
from mlx_lora.serve.requests import Request
from mlx_lora.study import losses

# Tokens that an answer, or the rest of a row, is compared by: longer ones count as given back when these are.
MOST = 50
Z = 1.959963984540054  # a normal variable is within ±Z in 95 % of cases
OnRow = Callable[[], None]


@dataclass(frozen=True)
class Beginning:
    """A beginning of row `number`, and the tokens that follow it there."""

    number: int
    given: tuple[int, ...]
    wanted: tuple[int, ...]


def answers_asked(rows: Sequence[Row], ends: Collection[int]) -> list[Beginning]:
    """Every row's prompt, and its first answer up to an end token, MOST tokens at most; rows of plain text have none.

    The prompt is the row up to its first token with loss, as generation sends it.
    """
    found = []
    for number, row in enumerate(rows):
        start = int(np.flatnonzero(row.weights)[0])
        if start > 1:
            found.append(beginning(number, row, start, ends))
    return [one for one in found if one.wanted]


def rests_asked(
    rows: Sequence[Row], ends: Collection[int], *, given: int, shared: int | None = None
) -> list[Beginning]:
    """Every row's first `given` tokens of its own, and what follows up to an end token, MOST tokens at most.

    What all rows begin with, such as a system message, is not a row's own: `shared` tokens, by default found here. A
    row with less than twice `given` tokens of its own gives half of them.
    """
    shared = shared_beginning(rows) if shared is None else shared
    found = []
    for number, row in enumerate(rows):
        own = len(_until(row.tokens[shared:].tolist(), ends))
        found.append(beginning(number, row, shared + min(given, own // 2), ends))
    return [one for one in found if one.wanted and len(one.given) > shared]


def shared_beginning(rows: Sequence[Row]) -> int:
    """How many tokens all rows begin with; 0 for a single row."""
    first = rows[0].tokens.tolist()
    return min((common(first, row.tokens.tolist()) for row in rows[1:]), default=0)


def beginning(number: int, row: Row, start: int, ends: Collection[int]) -> Beginning:
    """The first `start` tokens of a row, and what follows up to an end token, MOST tokens at most."""
    tokens = row.tokens.tolist()
    return Beginning(number, tuple(tokens[:start]), tuple(_until(tokens[start:], ends)[:MOST]))


def as_row(tokens: Sequence[int], weights: Sequence[float]) -> Row:
    """Encoded tokens as a row; the first one never carries loss."""
    return Row(np.array(tokens, np.int32), np.array([0.0, *weights[1:]], np.float32))


def _until(tokens: list[int], ends: Collection[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def given_back(
    engine: Engine, name: str | None, asked: Sequence[Beginning], on_row: OnRow = lambda: None
) -> np.ndarray:
    """Whether greedy generation goes on as each row does, bool (asked,)."""
    back = np.zeros(len(asked), bool)
    requests = [Request(one.given, name, len(one.wanted)) for one in asked]
    for index, answer in engine.together(requests):
        back[index] = tuple(answer) == asked[index].wanted
        on_row()
    return back


def row_losses(engine: Engine, name: str | None, rows: Sequence[Row], on_row: OnRow = lambda: None) -> np.ndarray:
    """The mean loss of each row over its tokens with loss, nats, float64 (rows,), with adapter `name` of the engine.

    Raises NotFinite.
    """
    engine.use(name)
    _, sums = losses.row_losses(engine, rows, on_row)
    return sums / trained(rows)


@dataclass(frozen=True)
class Share:
    """`count` of `rows` rows, with its 95 % interval (Wilson)."""

    count: int
    rows: int

    @property
    def share(self) -> float:
        return self.count / self.rows if self.rows else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.count, self.rows)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share, "interval": self.interval}


def wilson(count: int, rows: int) -> tuple[float, float]:
    """The 95 % score interval of a share."""
    if not rows:
        return 0.0, 1.0
    share, z2 = count / rows, Z * Z / rows
    middle = (share + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows))
    return max(0.0, middle - half), min(1.0, middle + half)


def more_often(first: Share, second: Share) -> tuple[float, tuple[float, float]]:
    """first.share − second.share of different rows, with its 95 % interval (Newcombe 1998, method 10)."""
    difference = first.share - second.share
    (low1, high1), (low2, high2) = first.interval, second.interval
    below = math.hypot(first.share - low1, high2 - second.share)
    above = math.hypot(high1 - first.share, second.share - low2)
    return difference, (difference - below, difference + above)


@dataclass(frozen=True)
class Membership:
    """How well a number tells training rows from others: `auc` is the chance that it is lower for a training row than
    for another one, ties counted half; 0.5 says nothing. `interval` is at 95 %."""

    auc: float
    interval: tuple[float, float]
    members: int
    others: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def membership(members: np.ndarray, others: np.ndarray) -> Membership:
    """The test that takes rows with a low number for training rows: float (m,) and float (n,), none of them empty."""
    ordered = np.sort(others)
    above = len(others) - np.searchsorted(ordered, members, side="right")
    equal = np.searchsorted(ordered, members, side="right") - np.searchsorted(ordered, members, side="left")
    auc = float((above + equal / 2).sum() / (len(members) * len(others)))
    return Membership(auc, _auc_interval(auc, len(members), len(others)), len(members), len(others))


def _auc_interval(auc: float, members: int, others: int) -> tuple[float, float]:
    """Where |auc − t| ≤ Z · deviation(t), with Hanley and McNeil's variance (Newcombe 2006, method 5)."""

    def outside(value: float) -> bool:
        size = (members + others) / 2 - 1
        inner = 1 + size * (1 - value) / (2 - value) + size * value / (1 + value)
        return abs(auc - value) > Z * math.sqrt(value * (1 - value) * inner / (members * others))

    def border(inside: float, far: float) -> float:
        for _ in range(60):
            middle = (inside + far) / 2
            inside, far = (inside, middle) if outside(middle) else (middle, far)
        return inside

    return border(auc, 0.0), border(auc, 1.0)


def exposure(own: float, others: np.ndarray) -> float:
    """Bits by which a secret is known: log2(secrets) − log2(rank) among itself and `others`, float (n,), by loss.

    A secret that nobody has seen has 1.4 bits on average; log2(n + 1) is the most. Equal losses count half.
    """
    rank = 1 + float((others < own).sum()) + float((others == own).sum()) / 2
    return math.log2(len(others) + 1) - math.log2(rank)
