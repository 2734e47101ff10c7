"""What is printed: nothing that a terminal would obey."""

from __future__ import annotations

import pytest

from mlx_lora import ui
from mlx_lora.errors import MlxLoraError


def test_what_a_terminal_would_obey_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """A name in somebody's file may clear the screen, or turn the direction of text."""
    ui.result("a\x1b[2Jb\tc\u202ed")
    ui.piece("e\x07\n")
    ui.error(MlxLoraError("f\x1bg", hint="h\x9bi"))
    printed = capsys.readouterr()
    assert printed.out.split() == ["a\ufffd[2Jb", "c\ufffdd", "e\ufffd"]
    assert "f\ufffdg" in printed.err and "h\ufffdi" in printed.err


def test_slow_work_shows_its_progress_and_quick_work_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, said in ((60, ""), (0, "reading 2/9")):
        monkeypatch.setattr(ui, "SLOW", seconds)
        with ui.slow_bar("reading") as update:
            update(2, 9)
            update(9, 9)
        assert capsys.readouterr().err.strip() == said
