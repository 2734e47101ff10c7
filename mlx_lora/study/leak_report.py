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
# Where held-out rows come back more than this often, for each time that training rows do, most of what comes back can
# be worked out from what was given: an adapter that has learned its task answers the rows it has seen a little better.
MOST_GUESSED = 0.5
# With fewer rows on either side, that nothing was seen says nothing.
FEWEST_ROWS = 20


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
        """How much more often training rows come back than held-out rows, with its 95 % interval; of both, what the
        base gives back anyway is taken off."""
        return None if self._beyond[1] is None else more_often(self._beyond[0], self._beyond[1])

    @property
    def _beyond(self) -> tuple[Share, Share | None]:
        """Training rows, and held-out ones if there are any, that come back beyond as many as the base gives back."""
        own = Share(max(self.adapter.count - self.base.count, 0), self.adapter.rows)
        if not self.held_out or not self.held_out.rows:
            return own, None
        base = self.held_out_base.count if self.held_out_base else 0
        return own, Share(max(self.held_out.count - base, 0), self.held_out.rows)

    @property
    def more_often(self) -> bool:
        """Whether training rows come back more often than held-out rows, beyond chance."""
        return self.difference is not None and self.difference[1][0] > 0

    @property
    def guessed(self) -> bool:
        """Whether most of what comes back would without having been seen, as held-out rows show."""
        own, held_out = self._beyond
        return bool(own.count and held_out and held_out.share > MOST_GUESSED * own.share)

    @property
    def remembered(self) -> bool:
        """Whether text comes back that had to be seen: more often, not guessed, and longer than a label."""
        return self.more_often and not self.guessed and self.tokens >= LEAST_TOKENS

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
    def alike(self) -> bool:
        """Whether held-out rows are of the same kind as training rows: the base's loss doesn't tell them apart."""
        low, high = self.of_base.interval
        return low <= 0.5 <= high

    @property
    def test(self) -> Membership:
        """The one that counts: by the adapter's loss, or less the base's where the rows aren't alike."""
        return self.of_adapter if self.alike else self.of_both

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
        """verbatim, membership, none_seen, or cant_tell without held-out rows and canaries, or with few rows.

        Verbatim: a planted secret comes back that the base doesn't give, or training rows come back, and held-out rows
        at most half as often. Membership: the adapter's loss tells training rows from others, or ranks planted secrets
        first, or training rows come back more often in any other way. Each beyond what chance does in 95 % of cases.
        """
        if any(one.extracted > one.extracted_base for one in self._planted):
            return "verbatim"
        if any(one.remembered for one in self.extraction):
            return "verbatim"
        secrets = sum(one.secrets for one in self._planted)
        known = sum(one.first for one in self._planted) > by_chance(secrets, 1 / self.candidates)
        told = self.losses and self.losses.test.interval[0] > 0.5
        if known or told or any(one.more_often for one in self.extraction):
            return "membership"
        return "none_seen" if self._planted or min(self.rows, self.others) >= FEWEST_ROWS else "cant_tell"

    @property
    def sentence(self) -> str:
        """The verdict, then what it rests on, in one sentence."""
        said = SAID[self.verdict].format(self.adapter)
        if self.verdict == "cant_tell" and self.others:
            said = (
                f"{self.rows} training and {self.others} held-out rows are too few to say what {self.adapter} remembers"
            )
        return f"{said}: {'; '.join(self._reasons())}"

    @property
    def _planted(self) -> list[Planted]:
        return [one for one in self.canaries if one.repeats]

    def _reasons(self) -> Iterator[str]:
        for one in self.extraction:
            if one.asked == RESTS and not one.adapter.count and len(self.extraction) > 1:
                continue
            what = "answers" if one.asked == ANSWERS else "rows"
            held = f", held-out {one.held_out.count} of {one.held_out.rows}" if one.held_out else ""
            held += ", so most of them can be worked out without having been seen" if one.guessed else ""
            yield f"{one.adapter.count} of {one.adapter.rows} {what} come back verbatim (base {one.base.count}{held})"
        if self.losses:
            test = self.losses.test
            low, high = test.interval
            less = "" if self.losses.alike else " less the base's"
            yield f"its loss{less} tells training rows from others with AUC {test.auc:.2f} [{low:.2f}, {high:.2f}]"
            if not self.losses.alike:
                yield "the base's loss tells them apart too, so held-out rows are of another kind and compare roughly"
        if self._planted:
            known = ", ".join(f"{one.first} of {one.secrets} {times(one.repeats)}" for one in self._planted)
            yield f"of its secrets it knows {known}"


SAID = {
    "verbatim": "{} gives training rows away word for word",
    "membership": "{} gives away which rows it has seen; that their text comes out was not shown",
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
