"""The only place that prints. Results go to stdout, everything else to stderr; readable without colour.

Progress is a bar where stderr is a terminal and a plain line now and then where it isn't.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from mlx_lora.errors import MlxLoraError

PLAIN_EVERY = 5.0
# Seconds after which work that is usually quick shows its progress.
SLOW = 2.0
# Control characters but tab and newline, and those that turn the direction of text.
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

out = Console(highlight=False, soft_wrap=True, markup=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def silence() -> None:
    """From now on show nothing but errors: of several processes that share a terminal, one speaks."""
    out.quiet = err.quiet = True


def result(text: str = "") -> None:
    """A line of result, to stdout."""
    out.print(harmless(text))


def piece(text: str) -> None:
    """A piece of streamed text, to stdout, without a line's end."""
    sys.stdout.write(harmless(text))
    sys.stdout.flush()


def as_json(value: Any) -> None:
    """One JSON value as the last line of stdout."""
    if out.quiet:
        return
    sys.stdout.write(json_text(value) + "\n")
    sys.stdout.flush()


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
    err.print(text, style="dim")


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
            note(f"note: {harmless(text)}")


def warning(text: str) -> None:
    err.print(f"warning: {text}", style="yellow")


def error(fault: MlxLoraError) -> None:
    """An error and its hint, to stderr."""
    err.quiet = False
    err.print(f"error: {harmless(fault.message)}", style="red")
    if fault.hint:
        err.print(f"hint: {harmless(fault.hint)}")


def harmless(text: str) -> str:
    """`text` without what a terminal would obey: a name in somebody's file may hold escapes."""
    return OBEYED.sub("\ufffd", text)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table to stdout; numbers are set to the right. Lines are never folded where no terminal shows them."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        shown.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(_cell(value) for value in row))
    width = None if out.is_terminal else 10_000
    Console(highlight=False, markup=False, width=width).print(shown)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def runs_of_text(runs: Sequence[tuple[str, bool]]) -> None:
    """A sample whose parts with loss are marked: underlined on a terminal, between ⟦ and ⟧ elsewhere."""
    for text, learned in runs:
        if learned and not out.is_terminal:
            text = f"⟦{text}⟧"
        out.print(text, style="underline bold" if learned else None, end="")
    out.print("\n")


def size(count: float) -> str:
    """Bytes for people: 134 kB, 2.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


@contextmanager
def working(label: str) -> Iterator[None]:
    """Say what is going on while the block runs: a spinner on a terminal, a line elsewhere."""
    if not err.is_terminal:
        note(label)
        yield
        return
    with err.status(label):
        yield


@contextmanager
def bar(label: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on stderr; yields `advance(count, text)`. Plain lines when stderr is no terminal."""
    if not err.is_terminal:
        yield _plain(label, total)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}" if total else ""),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(label, total=total, text="")

        def advance(count: int, text: str) -> None:
            progress.update(task, advance=count, text=text)

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
                stack.close()
                return
            if advance is None and time.monotonic() - start >= SLOW:
                if not err.is_terminal:
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


def confirm(question: str) -> bool:
    """Ask on the terminal; no terminal means no."""
    if not sys.stdin.isatty():
        return False
    err.print(f"{question} [y/N] ", end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")
