"""What is printed: all text literally, nothing that a terminal or rich would obey."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import subprocess
import sys

import pytest
from rich.console import Console
from wcwidth import wcswidth

from mlx_lora import ui
from mlx_lora.errors import DataError, MlxLoraError, Problem

# As it comes in a file, a name or an answer, and as it is to be shown.
HOSTILE = {
    "a\x1b[2Jb": r"a\x1b[2Jb",
    "\x9b31mred": r"\x9b31mred",
    "bell\x07\x7f": r"bell\x07\x7f",
    "over\rwritten": r"over\rwritten",
    "\u202eenim\u2066": r"\u202eenim\u2066",
    "one\u2028two\u2029three\x85four": r"one\u2028two\u2029three\x85four",
    "half \ud83d": r"half \ud83d",
    "3:100:2 :smile: :+1:": "3:100:2 :smile: :+1:",
    "[bold]b[/bold] [link=x]l[/] \\[a]": "[bold]b[/bold] [link=x]l[/] \\[a]",
}
NAMES = {**HOSTILE, "two\nlines\tapart": r"two\nlines\tapart"}


def in_a_terminal(code: str) -> str:
    """What a terminal gets from `code`, run in a process of its own with `ui`, NAMES and HOSTILE at hand."""
    terminal, process_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", f"from mlx_lora import ui\nfrom tests.test_ui import HOSTILE, NAMES\n{code}"],
        stdin=process_end, stdout=process_end, stderr=process_end,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "200", "NO_COLOR": "1"},
    )  # fmt: skip
    os.close(process_end)
    received = bytearray()
    try:
        while piece := os.read(terminal, 1 << 16):
            received += piece
    except OSError:  # the other end was closed
        pass
    os.close(terminal)
    assert process.wait() == 0, received.decode()
    return received.decode()


@pytest.mark.parametrize("text", NAMES, ids=ascii)
def test_terminal_output_shows_cells_and_lines_literally(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A cell `3:100:2` isn't an emoji, and no cell clears the screen or ends its row."""
    ui.table(["name", text], [(text, text)])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split("  ")[-1].strip() == NAMES[text].split("  ")[-1]
    assert row.count(NAMES[text]) == 2
    ui.result(text)
    assert capsys.readouterr().out == NAMES[text] + "\n"


@pytest.mark.parametrize("text", NAMES, ids=ascii)
def test_terminal_output_shows_messages_literally(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest would keep the record, and its worker processes can't send half a character on
    monkeypatch.setattr(logging.getLogger("mlx_lora"), "propagate", False)
    ui.note(text)
    ui.warning(text)
    ui.error(MlxLoraError(text, hint=text))
    shown = NAMES[text]
    expected = [shown, f"warning: {shown}", f"error: {shown}", f"hint: {shown}"]
    assert capsys.readouterr().err.splitlines() == expected
    with ui.notes_shown():
        logging.getLogger("mlx_lora.x").info("%s", text)
    with ui.working(text):
        pass
    advance = ui._plain(text, 2)
    ui.PLAIN_EVERY, before = 0.0, ui.PLAIN_EVERY
    try:
        advance(1, text)
    finally:
        ui.PLAIN_EVERY = before
    noted, working, progress = capsys.readouterr().err.splitlines()
    assert (noted, working) == (f"note: {shown}", shown)
    assert progress.startswith(f"{shown} 1/2  {shown}")


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_terminal_output_shows_rows_and_answers_literally(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    ui.runs_of_text([(f"{text}\n", False), (f"{text} \n{text}", True)])
    shown = HOSTILE[text]
    assert capsys.readouterr().out == f"{shown}\n⟦{shown} \n{shown}⟧\n\n"
    for character in f"{text}\n\tx":  # as streaming cuts it: an escape sequence over many pieces
        ui.piece(character)
    assert capsys.readouterr().out == f"{shown}\n\tx"


def test_only_the_lines_of_a_message_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A list of faults has indented lines; a name that holds a line's end can't pass for a message of ours."""
    ui.error(DataError([Problem("a\nhint: rm -r ~", 1, "bad"), Problem("b", 2, "worse")]))
    assert capsys.readouterr().err.splitlines() == ["error: a\\nhint: rm -r ~:1: bad", "  b:2: worse"]


@pytest.mark.parametrize("text", [*NAMES, "\x85\x9b"], ids=ascii)
def test_json_keeps_its_values_and_no_terminal_obeys_it(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    ui.as_json({"text": text, "more": "größe 名"})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"text": text, "more": "größe 名"}
    assert not ui.OBEYED.search(printed) and "größe 名" in printed


def test_a_terminal_gets_nothing_to_obey() -> None:
    """Spinner, bar, question, table and rows, as a terminal gets them; rich's own sequences are all there is."""
    printed = in_a_terminal(
        "for text in NAMES:\n"
        "    ui.table(['name'], [(text,)])\n"
        "    with ui.working(text): pass\n"
        "    with ui.bar(text, 3) as advance: advance(1, text)\n"
        "    ui.result(text); ui.note(text)\n"
        "for text in HOSTILE: ui.runs_of_text([(text, False), (text, True)])\n"
    )
    for shown in NAMES.values():
        assert printed.count(shown) >= 5, shown
    for obeyed in ("\x1b[2J", "\x9b", "\x07", "\x7f", "\u202e", "\u2066", "\u2028", "\x85", "💯", "😄", "👍"):
        assert obeyed not in printed, repr(obeyed)


def test_columns_stay_aligned_with_wide_and_combining_characters(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["plain", "名前", "gro\u0308\u00dfe", "한국어", "नमस्ते", "\x1b名"]
    ui.table(["name", "rank"], [(name, 8) for name in names])
    lines = capsys.readouterr().out.splitlines()
    assert len({wcswidth(line.rstrip()) for line in lines}) == 1, lines


def test_slow_work_shows_its_progress_and_quick_work_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, said in ((60, ""), (0, "reading 2/9")):
        monkeypatch.setattr(ui, "SLOW", seconds)
        with ui.slow_bar("reading") as update:
            update(2, 9)
            update(9, 9)
        assert capsys.readouterr().err.strip() == said


def test_a_dumb_terminal_gets_the_lines_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spinner or a bar would show nothing there until its end."""
    shown = io.StringIO()
    dumb = Console(file=shown, force_terminal=True, soft_wrap=True, _environ={"TERM": "dumb"})
    monkeypatch.setattr(ui, "err", dumb)
    monkeypatch.setattr(ui, "SLOW", 0.0)
    with ui.working("waiting"):
        pass
    with ui.slow_bar("answering") as update:
        update(1, 4)
    assert [line.strip() for line in shown.getvalue().splitlines()] == ["waiting", "answering 1/4"]
