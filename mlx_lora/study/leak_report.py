"""What an audit of leaks found, as numbers and as one sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_lora.study.leaks import Membership, Share, more_often

# What `Extraction.asked` is called.
ANSWERS, RESTS = "answers", "rests"
# Fewer tokens are no text that could be given away; that they come back more often still tells which rows were learned.
LEAST_TOKENS = 8


@dataclass(frozen=True)
class Extraction:
    """Rows that came back verbatim, asked for their `answers` by their prompts, or for their `rests` by their
    beginnings.

    `rows` are the numbers, from 0 as read, of training rows that the adapter gives back and the base doesn't. `tokens`
    is the median of what was wanted: a label comes back because it was guessed right, not because it was remembered.
    """

    asked: str
    base: Share
    adapter: Share
    held_out_base: Share | None = None
    held_out: Share | None = None
    rows: list[int] = field(default_factory=list)
    tokens: int = LEAST_TOKENS

    @property
    def difference(self) -> tuple[float, tuple[float, float]] | None:
        """How much more often training rows come back than held-out rows, with its 95 % interval."""
        return more_often(self.adapter, self.held_out) if self.held_out and self.held_out.rows else None

    def as_dict(self) -> dict[str, Any]:
        shares = ("base", "adapter", "held_out_base", "held_out")
        values = {name: share.as_dict() if (share := getattr(self, name)) else None for name in shares}
        found = self.difference
        more = None if found is None else {"difference": found[0], "interval": found[1]}
        return {"asked": self.asked, "tokens": self.tokens, **values, "more_often": more, "rows": self.rows}


@dataclass(frozen=True)
class Losses:
    """Mean losses a row of training rows and of others, and what tells them apart: the adapter's loss, and the same
    less the base's; `of_base` is what the base's loss tells, which has seen neither."""

    members_base: float
    members: float
    others_base: float
    others: float
    of_base: Membership
    of_adapter: Membership
    of_both: Membership

    @property
    def test(self) -> Membership:
        """The one that counts: by the adapter's loss, or less the base's where the base alone tells the rows apart,
        since then the held-out rows are of another kind than the training rows."""
        low, high = self.of_base.interval
        return self.of_adapter if low <= 0.5 <= high else self.of_both

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Planted:
    """The canaries that were planted `repeats` times, 0 for the controls.

    `first` of their secrets are more likely than all others that they are ranked among, `extracted` come back verbatim;
    `exposure` is their mean in bits.
    """

    repeats: int
    secrets: int
    first_base: int
    first: int
    extracted_base: int
    extracted: int
    exposure_base: float
    exposure: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Leaks:
    """The audit of one adapter. `rows` training rows were looked at, of those in `file`, and `others` held-out rows.

    `candidates` are the secrets that each canary's own is ranked among, itself included.
    """

    adapter: str
    file: str
    sha256: str
    rows: int
    held_out_file: str | None
    others: int
    given: int
    extraction: list[Extraction]
    losses: Losses | None
    canaries: list[Planted]
    candidates: int
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        values = {
            name: getattr(self, name) for name in ("adapter", "file", "sha256", "rows", "held_out_file", "others")
        }
        return values | {
            "given": self.given,
            "extraction": [one.as_dict() for one in self.extraction],
            "membership": self.losses.as_dict() if self.losses else None,
            "canaries": [one.as_dict() for one in self.canaries],
            "candidates": self.candidates,
            "notes": self.notes,
            "verdict": self.verdict,
            "sentence": self.sentence,
        }

    @property
    def verdict(self) -> str:
        """verbatim, by_loss, none_seen, or cant_tell without held-out rows and canaries.

        Verbatim: training rows come back more often than held-out rows, or a planted secret that the base doesn't give.
        By loss: the adapter's loss tells training rows from others, or ranks planted secrets first; or short answers
        come back more often. Each beyond what chance does in 95 % of cases.
        """
        more = [(one.tokens, found[1][0]) for one in self.extraction if (found := one.difference)]
        if any(one.extracted > one.extracted_base for one in self._planted):
            return "verbatim"
        if any(low > 0 and tokens >= LEAST_TOKENS for tokens, low in more):
            return "verbatim"
        secrets = sum(one.secrets for one in self._planted)
        known = sum(one.first for one in self._planted) > by_chance(secrets, 1 / self.candidates)
        told = self.losses and self.losses.test.interval[0] > 0.5
        if known or told or any(low > 0 for _, low in more):
            return "by_loss"
        return "none_seen" if more or self._planted else "cant_tell"

    @property
    def sentence(self) -> str:
        """The verdict, then what it rests on, in one sentence."""
        return f"{SAID[self.verdict].format(self.adapter)}: {'; '.join(self._reasons())}"

    @property
    def _planted(self) -> list[Planted]:
        return [one for one in self.canaries if one.repeats]

    def _reasons(self) -> Iterator[str]:
        for one in self.extraction:
            if one.asked == RESTS and not one.adapter.count and len(self.extraction) > 1:
                continue
            what = "answers" if one.asked == ANSWERS else "rows"
            held = f", held-out {one.held_out.count} of {one.held_out.rows}" if one.held_out else ""
            yield f"{one.adapter.count} of {one.adapter.rows} {what} come back verbatim (base {one.base.count}{held})"
        if self.losses:
            test = self.losses.test
            low, high = test.interval
            less = " less the base's" if test is self.losses.of_both else ""
            yield f"its loss{less} tells training rows from others with AUC {test.auc:.2f} [{low:.2f}, {high:.2f}]"
        if self._planted:
            known = ", ".join(f"{one.first} of {one.secrets} {times(one.repeats)}" for one in self._planted)
            yield f"of its secrets it knows {known}"


SAID = {
    "verbatim": "{} gives training rows away word for word",
    "by_loss": "{} gives away which rows it has seen, and no row word for word beyond what can be guessed",
    "none_seen": "{} shows no sign of giving training rows away",
    "cant_tell": "without held-out rows (--held-out) what {} remembers can't be told from what it guesses",
}


def times(repeats: int) -> str:
    """`repeats` in words."""
    return {0: "never planted", 1: "planted once"}.get(repeats, f"planted {repeats} times")


def by_chance(count: int, chance: float) -> int:
    """The fewest successes of `count`, each with this chance, that are exceeded in at most one case of twenty."""
    below, successes = 0.0, 0
    while True:
        below += math.comb(count, successes) * chance**successes * (1 - chance) ** (count - successes)
        if 1 - below <= 0.05:
            return successes
        successes += 1
