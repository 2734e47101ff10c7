"""Figures of a report as inline SVG, drawn by hand: nothing is loaded, no script runs, and every figure has words.

Sizes are in the units of a viewBox and scale with the page. Colours are the page's variables (`page.css`), so a figure
follows light, dark and print; curves also differ in dashes and marks, for readers without colour. Each figure has a
title and a description, for readers who don't see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from mlx_lora.report.page import text
from mlx_lora.report.text import WIDE, Points

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 84, 16, 16, 40
ROW, NAMES = 44, 150
# Characters of a name that fit into NAMES; the description and the table have the whole.
MOST_NAME = 20
# More points than this can't be told apart at this width.
MOST_POINTS = 600


@dataclass(frozen=True)
class Curve:
    """(x, y) points with a name; `marks` shows them as circles beside a dashed line."""

    name: str
    points: Points
    marks: bool = False


@dataclass(frozen=True)
class Bar:
    """A length with a name and its value in words; `limit` bars are outlines."""

    name: str
    value: float
    shown: str
    limit: bool = False


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval, and a name."""

    name: str
    low: float
    value: float
    high: float


class Figures:
    """Makes figures for one page; their ids are numbered."""

    def __init__(self) -> None:
        self.numbers = count(1)

    def _svg(self, inner: str, title: str, description: str, height: float) -> str:
        number = next(self.numbers)
        return (
            f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="t{number} d{number}">'
            f'<title id="t{number}">{text(title)}</title><desc id="d{number}">{text(description)}</desc>'
            f"{inner}</svg>"
        )

    def chart(self, curves: Sequence[Curve], *, title: str, across: str, up: str, linear: bool = False) -> str:
        """Curves over one horizontal axis that begins at 0, several named by a legend; "" where nothing is finite.

        A wide range of values has a logarithmic axis, unless `linear`.
        """
        curves = [Curve(c.name, thinned([p for p in c.points if math.isfinite(p[1])]), c.marks) for c in curves]
        curves = [curve for curve in curves if curve.points]
        if not curves:
            return ""
        axes = _Axes.of(curves, linear)
        parts = [axes.drawn(across, up), *(_drawn(curve, index, axes) for index, curve in enumerate(curves, 1))]
        parts.append(_legend(curves) if len(curves) > 1 else "")
        told = "; ".join(f"{c.name}: {c.points[0][1]:.4g} at first, {c.points[-1][1]:.4g} at the end" for c in curves)
        return self._svg("".join(parts), title, f"{up} over {across}. {told}.", HEIGHT + (24 if len(curves) > 1 else 0))

    def bars(self, bars: Sequence[Bar], *, title: str) -> str:
        """Horizontal bars of one scale, with what they are and how much beside them."""
        most = max((bar.value for bar in bars), default=0.0) or 1.0
        room, parts = WIDTH - NAMES - 110, []
        for index, bar in enumerate(bars):
            top, length = index * ROW + 8, max(bar.value / most * room, 2)
            kind = "outline" if bar.limit else "c1"
            parts.append(
                f'<text x="{NAMES - 12}" y="{top + 19}" class="name">{text(_fitted(bar.name))}</text>'
                f'<rect x="{NAMES}" y="{top}" width="{length:.1f}" height="28" rx="3" class="bar {kind}"/>'
                f'<text x="{NAMES + length + 10:.1f}" y="{top + 19}">{text(bar.shown)}</text>'
            )
        told = "; ".join(f"{bar.name}: {bar.shown}" for bar in bars)
        return self._svg("".join(parts), title, f"{told}.", len(bars) * ROW + 4)

    def intervals(self, intervals: Sequence[Interval], *, title: str, across: str) -> str:
        """Values with their intervals on one axis, in which zero is a line."""
        low = min(0.0, *(each.low for each in intervals))
        high = max(0.0, *(each.high for each in intervals))
        room, span = WIDTH - NAMES - 30, (high - low) or 1.0
        bottom = len(intervals) * ROW + 8

        def place(value: float) -> float:
            return NAMES + (value - low) / span * room

        ticks = "".join(
            f'<line x1="{place(tick):.1f}" x2="{place(tick):.1f}" y1="4" y2="{bottom}" '
            f'class="{"grid" if tick else "zero"}"/>'
            f'<text x="{place(tick):.1f}" y="{bottom + 18}" class="tick middle">{_number(tick)}</text>'
            for tick in ticks_of(low, high)
        )
        parts = [
            ticks,
            f'<text x="{NAMES + room / 2:.1f}" y="{bottom + 36}" class="axis middle">{text(across)}</text>',
        ]
        for index, each in enumerate(intervals):
            y = index * ROW + ROW / 2
            parts.append(
                f'<text x="{NAMES - 12}" y="{y + 5}" class="name">{text(_fitted(each.name))}</text>'
                f'<line x1="{place(each.low):.1f}" x2="{place(each.high):.1f}" y1="{y}" y2="{y}" class="interval"/>'
                f'<circle cx="{place(each.value):.1f}" cy="{y}" r="6" class="c1 mark"/>'
            )
        told = "; ".join(f"{e.name}: {e.value:.4g}, interval {e.low:.4g} to {e.high:.4g}" for e in intervals)
        return self._svg("".join(parts), title, f"{across}. {told}.", bottom + 44)


@dataclass(frozen=True)
class _Axes:
    """Where values lie in the picture."""

    end: float
    low: float
    high: float
    log: bool

    @staticmethod
    def of(curves: Sequence[Curve], linear: bool) -> _Axes:
        values = [y for curve in curves for _, y in curve.points]
        low, high = min(values), max(values)
        log = low > 0 and high / low > WIDE and not linear
        if not log:
            margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
            low, high = (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin
        return _Axes(max(x for curve in curves for x, _ in curve.points) or 1.0, low, high, log)

    def x(self, value: float) -> float:
        return LEFT + value / self.end * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        scale = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)

    def drawn(self, across: str, up: str) -> str:
        """Grid, ticks and what the axes are."""
        floor, parts = HEIGHT - BOTTOM, []
        for tick in log_ticks(self.low, self.high) if self.log else ticks_of(self.low, self.high):
            y = self.y(tick)
            parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
                f'<text x="{LEFT - 8}" y="{y + 4:.1f}" class="tick end">{_number(tick)}</text>'
            )
        for tick in ticks_of(0, self.end):
            parts.append(f'<text x="{self.x(tick):.1f}" y="{floor + 18}" class="tick middle">{_number(tick)}</text>')
        middle = (TOP + floor) / 2
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}" class="zero"/>'
            f'<text x="{WIDTH - RIGHT}" y="{floor + 34}" class="axis end">{text(across)}</text>'
            f'<text transform="translate(14 {middle}) rotate(-90)" class="axis middle">'
            f"{text(up)}{', logarithmic' if self.log else ''}</text>"
        )
        return "".join(parts)


def _drawn(curve: Curve, index: int, axes: _Axes) -> str:
    places = [(axes.x(x), axes.y(y)) for x, y in curve.points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dashed = " dashed" if curve.marks else ""
    drawn = f'<polyline points="{line}" class="curve c{index}{dashed}"/>'
    if curve.marks or len(places) == 1:
        drawn += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="mark c{index}"/>' for x, y in places)
    return drawn


def _legend(curves: Sequence[Curve]) -> str:
    parts, x, y = [], float(LEFT), HEIGHT + 14
    for index, curve in enumerate(curves, 1):
        dashed = " dashed" if curve.marks else ""
        parts.append(f'<line x1="{x}" x2="{x + 28}" y1="{y - 4}" y2="{y - 4}" class="curve c{index}{dashed}"/>')
        if curve.marks:
            parts.append(f'<circle cx="{x + 14}" cy="{y - 4}" r="4" class="mark c{index}"/>')
        parts.append(f'<text x="{x + 36}" y="{y}">{text(curve.name)}</text>')
        x += 60 + 11 * len(curve.name)
    return "".join(parts)


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means of neighbours that are equally many, in order."""
    each = -(-len(points) // most) if points else 1
    groups = [points[start : start + each] for start in range(0, len(points), each)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def ticks_of(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], about so many."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= about + 0.5)
    first = math.ceil(low / step - 1e-9)
    return [tick * step for tick in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high]; over many powers, the powers alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def _fitted(name: str) -> str:
    """A name for the left of a figure: its beginning and its end, which tell long names apart."""
    return name if len(name) <= MOST_NAME else f"{name[: MOST_NAME // 2]}…{name[1 - MOST_NAME // 2 :]}"


def _number(value: float) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
