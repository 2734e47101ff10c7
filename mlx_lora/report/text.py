"""A curve as lines of text, and the memory of a curve that may become long.

A cell of a terminal holds eight dots of a Braille pattern, two beside each other and four above each other, so a small
plot shows a curve well. Measured points are full circles over it. Nothing depends on colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

BRAILLE = 0x2800
# The bit of each dot, by (column, row) inside a cell.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
MARK = "●"
LABEL = 8
# From this ratio of the highest to the lowest value on, a vertical axis is logarithmic, here and in `svg`.
WIDE = 20.0

Points = Sequence[tuple[float, float]]


class Thinned:
    """A curve in bounded memory: beyond `most` points, every two neighbours become their mean."""

    def __init__(self, most: int = 512):
        self.most, self.each = most, 1
        self._points: list[tuple[float, float]] = []
        self._waiting: list[tuple[float, float]] = []

    def add(self, x: float, y: float) -> None:
        self._waiting.append((x, y))
        if len(self._waiting) < self.each:
            return
        self._points = [*self._points, _mean(self._waiting)]
        self._waiting = []
        if len(self._points) >= self.most:
            pairs = zip(self._points[::2], self._points[1::2], strict=False)
            self._points, self.each = [_mean(pair) for pair in pairs], 2 * self.each

    def points(self) -> list[tuple[float, float]]:
        """(x, y) in order, each a mean of `each` that were added, and the rest's."""
        waiting = list(self._waiting)
        return [*self._points, _mean(waiting)] if waiting else list(self._points)


def _mean(points: Points) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def plot(curve: Points, marks: Points, *, width: int, height: int, end: float, low: float | None = None,
         high: float | None = None) -> list[str]:  # fmt: skip
    """`height` lines of at most `width` characters: the values at the left, then the curve over x from 0 to `end`.

    `marks` are shown as circles. `low` and `high` widen the axis, so that two plots share one. Values that aren't
    finite are left out; without any there is an empty plot.
    """
    curve, marks = _finite(curve), _finite(marks)
    values = [y for _, y in (*curve, *marks)] + [value for value in (low, high) if value is not None]
    bottom, top = (min(values), max(values)) if values else (0.0, 1.0)
    log = bottom > 0 and top / bottom > WIDE
    scale = math.log if log else float
    span = scale(top) - scale(bottom)

    def share(value: float) -> float:
        """How far up a value is, from 0 to 1."""
        return (scale(value) - scale(bottom)) / span if span else 0.5

    columns = max(width - LABEL - 2, 1)
    cells = [[" "] * columns for _ in range(height)]
    for (column, row), bits in _dots(curve, columns, height, end, share).items():
        cells[row][column] = chr(BRAILLE + bits)
    for x, y in marks:
        cells[round((1 - share(y)) * (height - 1))][_column(x, end, columns)] = MARK
    shown = {0: top, height - 1: bottom} | (
        {(height - 1) // 2: _middle(bottom, top, log)} if height > 4 and span else {}
    )
    labels = [f"{shown[row]:.3g}" if row in shown else "" for row in range(height)]
    return [f"{label:>{LABEL}} ┤{''.join(line)}".rstrip() for label, line in zip(labels, cells, strict=True)]


def _middle(bottom: float, top: float, log: bool) -> float:
    return math.sqrt(bottom * top) if log else (bottom + top) / 2


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _column(x: float, end: float, columns: int) -> int:
    return min(int(x / end * columns), columns - 1) if end else 0


def _dots(curve: Points, columns: int, height: int, end: float, share: object) -> dict[tuple[int, int], int]:
    """The bits of each cell (column, row): the mean at each column of dots, joined to the one before."""
    assert callable(share)
    sums: dict[int, list[float]] = {}
    for x, y in curve:
        sums.setdefault(_column(x, end, 2 * columns), []).append(y)
    cells: dict[tuple[int, int], int] = {}
    before: int | None = None
    for column, values in sorted(sums.items()):
        level = round((1 - share(sum(values) / len(values))) * (4 * height - 1))
        first, last = sorted((level, level if before is None else before))
        for row in range(first, last + 1):
            place = column // 2, row // 4
            cells[place] = cells.get(place, 0) | DOTS[column % 2][row % 4]
        before = level
    return cells
