"""The only place that prints. Results go to stdout, everything else to stderr; readable without colour.

All text is shown literally, whoever wrote it: rich's markup and emoji codes are off, and what a terminal would obey
(escape sequences, other control characters, characters that turn the direction of text) is written out, ESC as `\\x1b`.
Callers pass text as it is. Progress is a bar where stderr is a terminal and a plain line now and then where it isn't.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
import traceback as tracebacks
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mlx_lora.errors import MlxLoraError

PLAIN_EVERY = 5.0
# Seconds after which work that is usually quick shows its progress.
SLOW = 2.0
# What a terminal would obey, but for tab and newline: control characters (C0, DEL, C1), separators of lines and
# paragraphs, characters that turn the direction of text. Half a character (a lone surrogate) can't be printed at all.
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# A message of several lines indents all but the first; any other end of a line came with a name or a path.
NOT_OURS = re.compile(r"\t|\n(?!  )")

out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def visible(text: str) -> str:
    """`text` with everything that a terminal would obey written out; newlines and tabs stay."""
    return OBEYED.sub(_written_out, text)


def one_line(text: str) -> str:
    """`visible` for what must not break a line or a column: a name, a cell, a label."""
    return visible(text).replace("\n", r"\n").replace("\t", r"\t")


def _message(text: str) -> str:
    """`visible` for an error or a note: only its indented lines are lines, so no name can pass for another message."""
    return NOT_OURS.sub(_written_out, visible(text))


def _written_out(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode()


def silence() -> None:
    """From now on show nothing but errors: of several processes that share a terminal, one speaks."""
    out.quiet = err.quiet = True


def result(text: str = "") -> None:
    """A line of result, to stdout."""
    out.print(one_line(text))


def piece(text: str) -> None:
    """A piece of streamed text, to stdout, without a line's end; its own newlines and tabs stay."""
    print(visible(text), end="", flush=True)


def paint(codes: str) -> None:
    """Lines that are `visible` already, with the codes that move a terminal's cursor between them, in one write."""
    out.file.write(f"\x1b[?2026h{codes}\x1b[?2026l")  # a terminal that knows these shows nothing half painted
    out.file.flush()


def as_json(value: Any) -> None:
    """One JSON value as the last line of stdout; what a terminal would obey is escaped as JSON does it."""
    if not out.quiet:
        print(escaped_json(value), flush=True)


def escaped_json(value: Any) -> str:
    """`json_text` with what a terminal would obey, or reads as the end of a line, escaped as JSON does it."""
    return OBEYED.sub(lambda found: f"\\u{ord(found.group()):04x}", json_text(value))


def json_text(value: Any) -> str:
    """One line of JSON; numbers that JSON doesn't have (NaN, infinity) are null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), ensure_ascii=False, default=str, allow_nan=False)


def note(text: str) -> None:
    """Something worth knowing, to stderr."""
    err.print(_message(text), style="dim")


@contextmanager
def notes_shown() -> Iterator[None]:
    """Show what the package logs while the block runs, each text once however often a file is read."""
    logger, shown = logging.getLogger("mlx_lora"), _Shown()
    level = logger.level
    logger.addHandler(shown)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(shown)
        logger.setLevel(level)


class _Shown(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.before: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()) not in self.before:
            self.before.add(text)
            note(f"note: {text}")


def warning(text: str) -> None:
    """Something that may be wrong, to stderr."""
    err.print(f"warning: {_message(text)}", style="yellow")


def error(fault: MlxLoraError) -> None:
    """An error and its hint, to stderr."""
    err.quiet = False
    err.print(f"error: {_message(fault.message)}", style="red")
    if fault.hint:
        err.print(f"hint: {_message(fault.hint)}")


def traceback() -> None:
    """The traceback of the exception that is being handled, to stderr."""
    err.quiet = False
    err.print(visible(tracebacks.format_exc()), end="")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table to stdout; numbers are set to the right. Lines are never folded where no terminal shows them."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        shown.add_column(_cell(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(_cell(value) for value in row))
    width = None if out.is_terminal else 10_000
    Console(highlight=False, markup=False, emoji=False, width=width).print(shown)


def _cell(value: object) -> Text:
    shown = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return Text(one_line(shown))


def runs_of_text(runs: Sequence[tuple[str, bool]]) -> None:
    """A sample whose parts with loss are marked: green and underlined on a terminal, between ⟦ and ⟧ elsewhere."""
    for text, learned in runs:
        shown = visible(text) if out.is_terminal or not learned else f"⟦{visible(text)}⟧"
        out.print(shown, style="underline bold green" if learned else None, end="")
    out.print("\n")


def size(count: float) -> str:
    """Bytes for people: 134 kB, 2.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds, or minutes where they are many."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def moves() -> bool:
    """Whether stderr is a terminal whose cursor moves, so that a line can be painted again."""
    return err.is_terminal and not err.is_dumb_terminal


@contextmanager
def working(label: str) -> Iterator[None]:
    """Say what is going on while the block runs: a spinner on a terminal whose cursor moves, a line elsewhere."""
    if not moves():
        note(label)
        yield
        return
    with err.status(Text(one_line(label))):
        yield


@contextmanager
def bar(label: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on stderr; yields `advance(count, text)`. Plain lines where no terminal shows it."""
    if not moves():
        yield _plain(label, total)
        return
    count = TextColumn("{task.completed:.0f}/{task.total:.0f}" if total else "", markup=False)
    columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), count]
    columns += [TimeRemainingColumn(compact=True), TextColumn("{task.fields[text]}", markup=False)]
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(one_line(label), total=total, text="")

        def advance(count: int, text: str) -> None:
            progress.update(task, advance=count, text=one_line(text))

        yield advance


@contextmanager
def slow_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Progress that shows once work has taken SLOW seconds; yields `update(done, total)`, which ends it at `total`."""
    start, shown = time.monotonic(), 0
    advance: Callable[[int, str], None] | None = None
    with ExitStack() as stack:

        def update(done: int, total: int) -> None:
            nonlocal advance, shown
            if done >= total:
                return stack.close()
            if advance is None and time.monotonic() - start >= SLOW:
                if not moves():
                    note(f"{label} {done}/{total}")
                advance = stack.enter_context(bar(label, total))
            if advance is not None:
                advance(done - shown, "")
                shown = done

        yield update


def _plain(label: str, total: int | None) -> Callable[[int, str], None]:
    start = shown = time.monotonic()
    done = 0

    def advance(count: int, text: str) -> None:
        nonlocal shown, done
        done += count
        now = time.monotonic()
        if now - shown < PLAIN_EVERY:
            return
        shown = now
        left = f", {(now - start) * (total - done) / done:.0f} s left" if total and done else ""
        note(f"{label} {done}{f'/{total}' if total else ''}{f'  {text}' if text else ''}{left}")

    return advance


def asks() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty()


def ask(question: str, default: str | None, *, yes: bool, known: Sequence[str] = (), option: str = "") -> str:
    """The answer typed on the terminal, or `default` for an empty one, for `yes`, and where nobody can be asked.

    Raises MlxLoraError naming the `option` that answers the question where there is no default then.
    """
    while not yes and asks():
        choice = f" ({', '.join(map(one_line, known))})" if known else ""
        offered = f" [{one_line(default)}]" if default else ""
        err.print(f"{one_line(question)}{choice}?{offered} ", end="", markup=False, highlight=False)
        line = sys.stdin.readline()
        if not line:
            raise KeyboardInterrupt
        if line.strip() or default is not None:
            return line.strip() or str(default)
    if default is None:
        raise MlxLoraError(f"{question}: not answered", hint=f"{option} answers it")
    return default


def confirm(question: str) -> bool:
    """Ask on the terminal; no terminal means no."""
    if not sys.stdin.isatty():
        return False
    err.print(f"{one_line(question)} [y/N] ", end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")
