"""Curves as text, and the lines that a terminal shows while a run trains."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
import time

import pytest

from mlx_lora.report.live import LiveView
from mlx_lora.report.text import BRAILLE, MARK, Thinned, plot
from mlx_lora.train.events import Evaluated, Step


def step(number: int, steps: int = 50, loss: float | None = None) -> Step:
    return Step(number, steps, 4 / number if loss is None else loss, 1e-3, 1.0, 30, 100.0, 5_000_000)


def view(steps: int = 20) -> LiveView:
    seconds = iter(range(1000))
    found = LiveView(memory=lambda: 1_000_000, clock=lambda: float(next(seconds)))
    found.hear(Evaluated(0, 4.0, False))
    for number in range(1, steps + 1):
        found.hear(step(number))
    found.hear(Evaluated(steps, 0.5, True))
    return found


def test_a_long_curve_stays_small_and_keeps_its_means() -> None:
    thin = Thinned(most=16)
    for x in range(1000):
        thin.add(x, float(x))
    points = thin.points()
    assert 8 <= len(points) <= 17 and all(y == x for x, y in points)
    weights = [thin.each] * (1000 // thin.each) + [1000 % thin.each]
    assert sum(w * y for w, (_, y) in zip(weights, points, strict=False)) / 1000 == pytest.approx(499.5)


def test_a_falling_line_is_drawn_from_the_upper_left_to_the_lower_right() -> None:
    lines = plot([(x, 10 - x) for x in range(1, 10)], [], width=30, height=6, end=9)
    assert lines[0].startswith("       9 ┤") and lines[-1].startswith("       1 ┤")
    places = [
        min(i for i, c in enumerate(line) if ord(c) >= BRAILLE)
        for line in lines
        if any(ord(c) >= BRAILLE for c in line)
    ]
    assert len(places) == 6 and places == sorted(places) and max(map(len, lines)) <= 30


def test_marks_lie_at_their_value_and_wide_ranges_are_logarithmic() -> None:
    lines = plot([], [(0, 1000.0), (5, 31.6227766), (10, 1.0)], width=32, height=7, end=10)
    assert [line.index(MARK) - 10 for line in (lines[0], lines[3], lines[6])] == [0, 11, 21]
    assert "31.6 ┤" in lines[3]


@pytest.mark.parametrize("curve", [[], [(1, float("nan"))], [(1, 3.0)], [(1, 3.0), (2, 3.0)]])
def test_any_curve_is_a_plot(curve: list[tuple[float, float]]) -> None:
    lines = plot(curve, [], width=40, height=5, end=2)
    assert len(lines) == 5 and all("┤" in line and len(line) <= 40 for line in lines)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_view_fits_the_terminal(width: int) -> None:
    shown = view()
    shown.sampled("SELECT 1", "SELECT 2")
    lines = shown.lines(width, 24)
    assert max(map(len, lines)) < width and len(lines) < 22
    text = "\n".join(lines)
    for words in (
        "step 20/50", "left", "loss 0.2000", "rate 1.00e-03", "100 tokens/s", "validation loss 0.5000",
        "lowest 0.5000 at step 20", "memory now 1 MB, peak 5 MB", "wanted  SELECT 1", "likely  SELECT 2",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize(("width", "height"), [(40, 24), (20, 24), (80, 10)])
def test_without_room_the_view_is_one_line(width: int, height: int) -> None:
    (line,) = view().lines(width, height)
    assert line.startswith("20/50  loss 0.2000") and (width == 20 or len(line) < width)


def test_before_the_first_step_there_is_nothing_to_show() -> None:
    assert LiveView(memory=lambda: 0).lines(80, 24) == []


def test_time_left_of_a_resumed_run_counts_its_own_steps_alone() -> None:
    now = [0.0]
    shown = LiveView(memory=lambda: 0, clock=lambda: now[0])
    for number in (41, 42, 43):
        now[0] += 10
        shown.hear(step(number))
    assert "30 s, about 70 s left" in shown.lines(80, 24)[0]


PAINT = """
import time
from mlx_lora import panel, ui
panel.SOONEST = 0
count = 0
def lines(width, height): return [f"line {count} of {width}", "名前 " * 50]
try:
    with panel.panel(lines) as ask:
        for count in range(20):
            if count % 5 == 0: ui.note(f"note {count}")
            ask()
        raise KeyboardInterrupt
except KeyboardInterrupt:
    ui.note("interrupted")
"""


def test_a_panel_keeps_what_is_printed_and_never_clears_the_screen() -> None:
    """As a terminal gets it, also when it is interrupted: every note is there, above the last state of the panel.

    The terminal's own size counts, not an exported COLUMNS, which no window changes.
    """
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (20, 60))
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "90", "LINES": "20", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen([sys.executable, "-c", PAINT], stdin=end, stdout=end, stderr=end, env=environment)
    os.close(end)
    received = bytearray()
    deadline = time.monotonic() + 30
    try:
        while (piece := os.read(terminal, 1 << 16)) and time.monotonic() < deadline:
            received += piece
    except OSError:  # the other end was closed
        pass
    os.close(terminal)
    assert process.wait() == 0
    text = received.decode()
    assert "\x1b[2J" not in text and "\x1b[?25l" not in text, "nothing is cleared, and the cursor stays"
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert [plain.count(f"note {number}\r") for number in (0, 5, 10, 15)] == [1, 1, 1, 1]
    assert plain.rstrip().endswith("interrupted") and "line 19 of 60" in plain.rpartition("note 15")[2]
    ups = re.findall(r"\x1b\[(\d+)A", text)
    assert set(ups) == {"2"}, "each painting goes over the two rows of the one before"
