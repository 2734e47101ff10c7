"""How long rows are: counts in equal steps, as numbers and as bars for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

EIGHTHS = " ▏▎▍▌▋▊▉█"
# Widths of a bar that are easy to read.
STEPS = (1, 2, 5)


class Bin(NamedTuple):
    """`rows` rows have from `low` to `high` tokens, both included."""

    low: int
    high: int
    rows: int


class Lengths:
    """Counts of rows by their number of tokens; memory for as many numbers as there are different lengths."""

    def __init__(self, lengths: Iterable[int] = ()) -> None:
        self._rows = Counter(lengths)

    def add(self, length: int) -> None:
        self._rows[length] += 1

    def over(self, limit: int) -> int:
        """Rows of more tokens than `limit`."""
        return sum(rows for length, rows in self._rows.items() if length > limit)

    def share(self, fraction: float) -> int | None:
        """The length that this fraction of the rows doesn't exceed; 0.5 is the median. None where there are no rows."""
        seen, total = 0, self._rows.total()
        for length in sorted(self._rows):
            seen += self._rows[length]
            if seen >= fraction * total:
                return length
        return None

    def bins(self, most: int = 12) -> list[Bin]:
        """At most so many steps of one width (1, 2, 5, 10, 20, …) from the shortest to the longest, empty ones too."""
        if not self._rows:
            return []
        shortest, longest = min(self._rows), max(self._rows)
        width = next(width for width in _widths() if longest // width - shortest // width < most)
        counts: Counter[int] = Counter()
        for length, rows in self._rows.items():
            counts[length // width] += rows
        steps = range(shortest // width, longest // width + 1)
        return [Bin(step * width, (step + 1) * width - 1, counts[step]) for step in steps]


def _widths() -> Iterable[int]:
    power = 1
    while True:
        yield from (power * step for step in STEPS)
        power *= 10


def lines(bins: Sequence[Bin], width: int) -> list[str]:
    """A line for each bin, at most `width` characters: its range, its bar to an eighth of a character, its rows."""
    if not bins:
        return []
    longest = max(row.rows for row in bins)
    numbers = len(f"{bins[-1].high:,}")
    room = max(1, width - 2 * numbers - len(f"{longest:,}") - 5)
    shares = [row.rows / longest if longest else 0 for row in bins]
    return [
        " ".join(filter(None, (f"{row.low:>{numbers},} – {row.high:>{numbers},}", bar(share, room), f"{row.rows:,}")))
        for row, share in zip(bins, shares, strict=True)
    ]


def bar(share: float, width: int) -> str:
    """A bar of `share` of the width; what isn't nothing shows at least an eighth of a character."""
    eighths = min(round(share * width * 8), width * 8)
    eighths = max(eighths, 1) if share > 0 else eighths
    full, rest = divmod(eighths, 8)
    return EIGHTHS[8] * full + (EIGHTHS[rest] if rest else "")
