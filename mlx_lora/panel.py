"""A few lines at the bottom of the terminal that are painted anew in place; what is printed meanwhile goes above them.

Painting moves the cursor up, writes each line over the old one and erases the rest of that row: nothing is cleared
first, so nothing flickers. Each painting is one write, and a terminal that knows how shows none half done. When the
terminal was made narrower, its rows have wrapped: they are counted at the new width. A terminal that wraps first and
tells of its size later, as tmux does, may keep a few old rows above a painting in between. At the end, also of a
program that is interrupted, the last lines stay and the cursor is below them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import ControlType, Segment
from rich.text import Text

from mlx_lora import ui

# Seconds between two paintings at least, and at most: a step may take long, and the terminal change its size.
SOONEST, LATEST = 0.5, 1.0
# What moves a cursor passes through rich as it is only if it is called a control code.
CODE = [(ControlType.ERASE_IN_LINE, 0)]
BEGIN, END = "\x1b[?2026h", "\x1b[?2026l"
ERASE_LINE, ERASE_BELOW = "\x1b[K", "\x1b[J"

Lines = Callable[[int, int], Sequence[str]]


def possible() -> bool:
    """Whether stderr is a terminal whose cursor moves and that shows more than ASCII."""
    return ui.moves() and ui.err.encoding.lower().startswith("utf")


@contextmanager
def panel(lines: Lines) -> Iterator[Callable[[], None]]:
    """Keep `lines(width, height)` painted on stderr while the block runs; yields a function that asks for a painting.

    Asking costs nothing where the last painting was just now. `lines` is also called by a thread of its own.
    """
    shown = _Panel(ui.err, lines)
    ui.err.push_render_hook(shown)
    ticking = threading.Thread(target=shown.tick, daemon=True)
    ticking.start()
    try:
        yield shown.ask
    finally:
        shown.over.set()
        ticking.join()
        with suppress(OSError):  # the terminal may be what has gone
            shown.paint()
        ui.err.pop_render_hook()


class _Panel(RenderHook):
    """What is on the screen: the widths of the lines painted last."""

    def __init__(self, console: Console, lines: Lines):
        self.console, self.lines = console, lines
        self.widths: list[int] = []
        self.painted = 0.0
        self.over = threading.Event()

    def ask(self) -> None:
        if time.monotonic() - self.painted >= SOONEST:
            self.paint()

    def tick(self) -> None:
        while not self.over.wait(LATEST / 2):
            if time.monotonic() - self.painted >= LATEST:
                with suppress(OSError):
                    self.paint()

    def paint(self) -> None:
        self.painted = time.monotonic()
        self.console.print(_Codes(""), end="")  # the hook does the rest

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """What rich is about to print, with the panel taken away above it and painted again below it."""
        size = _size(self.console)
        rows = sum(max(1, -(-width // size.width)) for width in self.widths)
        up = f"\x1b[{rows}A" if rows else ""
        texts = [Text(ui.one_line(line)) for line in self.lines(size.width, size.height)[: max(size.height - 2, 1)]]
        for text in texts:  # a row that is full to its last column would wrap in some terminals
            text.truncate(size.width - 1, overflow="ellipsis")
        self.widths = [cell_len(text.plain) for text in texts]
        printing = any(not isinstance(each, _Codes) for each in renderables)
        erase = ERASE_BELOW if printing else ""
        return [_Codes(f"{BEGIN}\r{up}{erase}"), *renderables, _Painted(texts)]


def _size(console: Console) -> ConsoleDimensions:
    """The terminal's size now: COLUMNS and LINES of the environment, which rich prefers, stay when a window changes."""
    try:
        columns, lines = os.get_terminal_size(console.file.fileno())
    except (OSError, ValueError):  # no terminal, or a file of Python's own
        columns = lines = 0
    return ConsoleDimensions(columns, lines) if columns and lines else console.size


class _Codes(ConsoleRenderable):
    """Control codes, as they are."""

    def __init__(self, codes: str):
        self.codes = codes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Segment(self.codes, None, CODE)


class _Painted(ConsoleRenderable):
    """Lines, each over what was in its row, and nothing below them."""

    def __init__(self, texts: Sequence[Text]):
        self.texts = texts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text in self.texts:
            yield Segment(text.plain)
            yield Segment(f"{ERASE_LINE}\r\n", None, CODE)
        yield Segment(f"{ERASE_BELOW}{END}", None, CODE)
