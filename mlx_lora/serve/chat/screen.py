"""Answers on the screen while they come: as Markdown on a terminal, as plain text elsewhere.

Blocks of Markdown (paragraphs, lists, code) that are complete are printed once and scroll away as any output does. The
last one may still change, so it stands in a region at the bottom that is painted again: only its lines that differ,
in one write, so nothing flickers. The region is never higher than the terminal; of a long block the upper lines are
printed as soon as the region has no room for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import Heading, Markdown, MarkdownElement
from rich.text import Text

from mlx_lora import ui

# Seconds between two paintings.
EVERY = 0.05
# A block whose lines may all change with the next one: columns become wider.
TABLE = "table_open"


class _Heading(Heading):
    """A heading at the left, whatever its level."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Answer(Markdown):
    """Markdown as chats show it: a new line is a new line, and tags of HTML are text."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {**Markdown.elements, "heading_open": _Heading}

    def __init__(self, text: str):
        super().__init__("", hyperlinks=False, code_theme="ansi_dark")  # the terminal's own colours
        self.parsed = parse(ui.visible(text))
        for token in self.parsed:
            for child in token.children or []:
                if child.type == "softbreak":
                    child.type = "hardbreak"


def parse(text: str) -> list[Any]:
    """The tokens of a text in Markdown."""
    return MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).parse(text)


def markdown(text: str) -> RenderableType:
    """A text in Markdown for the terminal."""
    return _Answer(text)


def lines_of(shown: RenderableType, width: int | None = None) -> list[str]:
    """What the terminal shows of something, line by line, without empty ones before and behind.

    The last column stays free: a line that fills it wraps.
    """
    with ui.out.capture() as captured:
        ui.out.print(shown, width=width or max(ui.out.width - 1, 1), soft_wrap=False)
    lines = captured.get().split("\n")
    filled = [number for number, line in enumerate(lines) if line.strip()]
    return lines[filled[0] : filled[-1] + 1] if filled else []


class Region:
    """Lines at the bottom of the terminal that are painted again and again."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    @property
    def room(self) -> int:
        """The most lines that it may have."""
        return max(ui.out.height - 2, 1)

    def paint(self, lines: list[str], *, above: list[str] | None = None) -> None:
        """Show `lines` in place of those before; `above` is printed for good before them."""
        wanted = [*(above or []), *lines]
        same = 0
        for old, new in zip(self._lines, wanted, strict=False):
            if old != new:
                break
            same += 1
        if self._lines != wanted:
            up = len(self._lines) - same
            ui.paint(
                (f"\x1b[{up}A" if up else "") + "\r" + "".join(f"{line}\x1b[K\n" for line in wanted[same:]) + "\x1b[J"
            )
        self._lines = lines

    def end(self, lines: list[str]) -> None:
        """Print `lines` for good in place of those before, and clear what the terminal has shown of a Ctrl-C."""
        self.paint([], above=lines)
        ui.paint("\r\x1b[J")


class MarkdownStream:
    """Shows an answer that grows. Call it with each piece, and `close` at the end."""

    def __init__(self) -> None:
        self._text = ""  # of the blocks that aren't complete
        self._printed = 0  # lines of the last block that have been printed for good
        self._region, self._due = Region(), 0.0

    def __call__(self, piece: str) -> None:
        self._text += piece
        if time.monotonic() >= self._due:
            self._show()
            self._due = time.monotonic() + EVERY

    def close(self) -> None:
        """Print what is left."""
        self._show(last=True)

    def _show(self, *, last: bool = False) -> None:
        blocks = [token for token in parse(self._text) if token.level == 0 and token.map and token.nesting >= 0]
        lines = self._text.split("\n")
        starts = [0, *(token.map[0] for token in blocks[1:])]
        above: list[str] = []
        for start, end in zip(starts, starts[1:], strict=False):
            above += [*self._rest_of("\n".join(lines[start:end])), ""]
            self._printed = 0
        self._text = "\n".join(lines[starts[-1] :])
        if last:
            self._region.end(above + (self._rest_of(self._text) if self._text.strip() else []))
            return
        shown = self._rest_of(self._text) if self._text.strip() else []
        over = len(shown) - self._region.room
        if over > 0:
            if blocks and blocks[-1].type != TABLE:
                above += shown[:over]
                self._printed += over
            shown = shown[over:]
        self._region.paint(shown, above=above)

    def _rest_of(self, block: str) -> list[str]:
        """The lines of a block that haven't been printed."""
        return lines_of(markdown(block))[self._printed :]


def formatted() -> bool:
    """Whether the screen is one that can show Markdown."""
    return ui.out.is_terminal and not ui.out.is_dumb_terminal and not ui.out.quiet


@contextmanager
def answer_screen(*, markdown: bool) -> Iterator[Callable[[str], None]]:
    """Yield what shows the pieces of an answer; a line ends after it, however it ends."""
    if markdown and formatted():
        stream = MarkdownStream()
        try:
            yield stream
        finally:
            stream.close()
        return
    written = False

    def write(text: str) -> None:
        nonlocal written
        ui.piece(text)
        written = True

    try:
        yield write
    finally:
        if written:
            ui.result()


def heading(text: str) -> Text:
    """A line that says whose answer follows."""
    return Text(ui.one_line(text), style="bold")


def faint(text: str) -> Text:
    """Figures below an answer."""
    return Text(ui.one_line(text), style="dim")
