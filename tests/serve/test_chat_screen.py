"""Answers on a terminal: what is on it and above it after the last piece, and that no line is painted for nothing."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from rich.console import Console

from mlx_lora import ui
from mlx_lora.errors import Busy
from mlx_lora.serve.chat.compare import _below, _beside, together
from mlx_lora.serve.chat.screen import MarkdownStream, answer_screen

CODES = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")


class Terminal(io.StringIO):
    """Understands the codes that `ui.paint` uses; `lines` are all lines, those that have scrolled away too."""

    def __init__(self, height: int) -> None:
        super().__init__()
        self.height, self.lines, self.row, self.column, self.written = height, [""], 0, 0, 0

    def write(self, text: str) -> int:
        self.written += len(text)
        at = 0
        for found in CODES.finditer(text):
            self._print(text[at : found.start()])
            self._obey(found[1], found[2])
            at = found.end()
        self._print(text[at:])
        return len(text)

    def _obey(self, count: str, code: str) -> None:
        if code == "A":
            self.row -= int(count)
            assert self.row >= max(len(self.lines) - self.height, 0), "above the screen nothing can be painted"
        elif code == "K":
            self.lines[self.row] = self.lines[self.row][: self.column]
        elif code == "J":
            self.lines[self.row :] = [self.lines[self.row][: self.column]]

    def _print(self, text: str) -> None:
        for character in text:
            if character == "\r":
                self.column = 0
            elif character == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            else:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
                self.column += 1

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines).rstrip()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal of 40 columns and 12 lines in place of stdout, and a stream that paints with every piece."""
    terminal = Terminal(12)
    out = Console(
        file=terminal, force_terminal=True, width=40, height=12, highlight=False, soft_wrap=True, markup=False,
        emoji=False, color_system=None, legacy_windows=False, _environ={"TERM": "xterm"},
    )  # fmt: skip
    monkeypatch.setattr(ui, "out", out)
    monkeypatch.setattr("mlx_lora.serve.chat.screen.EVERY", 0)
    yield terminal


def shown(terminal: Terminal, text: str, step: int) -> str:
    with answer_screen(markdown=True) as write:
        assert isinstance(write, MarkdownStream)
        for start in range(0, len(text), step):
            write(text[start : start + step])
    return terminal.text


CODE = "\n".join(f"line_{number} = {number}" for number in range(30))
ANSWER = f"""# A title

A *word*, snake_case_name and <b>tags</b>.
A new line, and one that is longer than the terminal is wide.

1. first
2. second
   - nested

| a | b |
|---|---|
| 1 | two |

```python
{CODE}
```

the end"""


@pytest.mark.parametrize("step", [7, 1000])
def test_a_long_answer_is_there_once_and_in_order_however_it_comes(terminal: Terminal, step: int) -> None:
    text = shown(terminal, ANSWER, step)
    lines = [line.strip() for line in text.splitlines()]
    assert lines[:5] == [
        "A title", "", "A word, snake_case_name and", "<b>tags</b>.", "A new line, and one that is longer than",
    ]  # fmt: skip
    assert "1 first" in lines and "• nested" in lines and "1  two" in lines
    assert [line for line in lines if line.startswith("line_")] == CODE.splitlines()
    assert lines[-2:] == ["", "the end"]


def test_a_table_longer_than_the_screen_is_there_once(terminal: Terminal) -> None:
    rows = [f"| {number} | {'x' * number} |" for number in range(20)]
    text = shown(terminal, "\n".join(["| n | x |", "|---|---|", *rows]), 20)
    assert [line.split()[0] for line in text.splitlines()[2:]] == [str(number) for number in range(20)]


def test_only_lines_that_changed_are_painted(terminal: Terminal) -> None:
    text = "\n".join(f"- item {number}" for number in range(8))
    shown(terminal, text, 1)
    assert terminal.written < 60 * len(text)  # all eight lines with every piece would be 150 times


def test_what_the_terminal_shows_of_ctrl_c_goes(terminal: Terminal) -> None:
    with answer_screen(markdown=True) as write:
        write("one\n\ntwo")
        terminal.write("^C")
    assert terminal.text == "one\n\ntwo"


def test_what_a_terminal_would_obey_is_written_out(terminal: Terminal) -> None:
    assert shown(terminal, "a \x1b[31mred [link](http://x.y)", 1) == r"a \x1b[31mred link (http://x.y)"


@dataclass(eq=False)
class Told:
    """A reply that comes in pieces, or fails after them."""

    pieces: list[str]
    fault: BaseException | None = None
    text: str = ""
    tokens: int = 0
    seconds: float = 1.2
    first: float = 1.0

    def whole(self) -> str:
        for piece in self.pieces:
            self.text, self.tokens = self.text + piece, self.tokens + 1
        if self.fault is not None:
            raise self.fault
        return self.text


def test_two_answers_stand_beside_each_other_whole(terminal: Terminal) -> None:
    long = "x" * 300
    replies: Any = [Told(["one ", "two"]), Told(["a\n", long])]
    _beside(["left", "right"], replies, together(replies))
    first, *rest = [line for line in terminal.text.splitlines() if line]
    assert first.split() == ["left", "right"] and rest[0].split() == ["one", "two", "a"]
    assert sum(line.count("x") for line in rest) == len(long) and "2 tokens, 5 a" in terminal.text


@pytest.mark.parametrize("show", [_beside, _below])
def test_an_answer_that_fails_shows_what_came_and_raises(terminal: Terminal, show: Any) -> None:
    replies: Any = [Told(["one"]), Told(["other"], fault=Busy("too many"))]
    options = {"markdown": True} if show is _below else {}
    with pytest.raises(Busy):
        show(["left", "right"], replies, together(replies), **options)
    assert "left" in terminal.text


def test_without_a_terminal_or_without_markdown_the_text_stays_as_it_is(
    capsys: pytest.CaptureFixture[str], terminal: Terminal
) -> None:
    with answer_screen(markdown=False) as write:
        write("a **b**")
    assert capsys.readouterr().out == "a **b**"
