"""Two answers to one prompt, made in one batch and shown side by side, or one under the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from rich.table import Table

from mlx_lora import ui
from mlx_lora.errors import TooLong
from mlx_lora.serve.chat.screen import EVERY, Region, answer_screen, faint, formatted, heading, lines_of, markdown
from mlx_lora.serve.conversation import Message
from mlx_lora.serve.prefill import OnPrompt
from mlx_lora.serve.service import Reply

if TYPE_CHECKING:
    from mlx_lora.serve.chat.chat import Chat

# Columns of a terminal in which two answers have room beside each other.
WIDE = 72


def compare(chat: Chat, messages: Sequence[Message], names: tuple[str | None, str | None]) -> None:
    """Answer the last of `messages` by both adapters, None for the base. The conversation stays as it is.

    Ctrl-C stops both; what has come is shown.
    """
    replies: list[Reply] = []
    read: dict[int, tuple[int, int]] = {}
    labels = [name or "base" for name in names]
    try:
        prompts = [chat.prompt(name, messages) for name in names]
        for index, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
            replies.append(chat.ask(name, prompt, on_prompt=_noting(read, index)))
        ending = _with_progress(replies, read)
        if chat.markdown and formatted() and ui.out.width >= WIDE:
            _beside(labels, replies, ending)
        else:
            _below(labels, replies, ending, markdown=chat.markdown)
    except TooLong as fault:
        fault.hint = chat.too_long_hint(names[0], messages)
        raise
    except KeyboardInterrupt:
        ui.note("(stopped)")
    finally:
        for reply in replies:
            reply.cancel()


def _noting(read: dict[int, tuple[int, int]], index: int) -> OnPrompt:
    def note(done: int, total: int) -> None:
        read[index] = (done, total)

    return note


def _with_progress(replies: Sequence[Reply], read: dict[int, tuple[int, int]]) -> Generator[set[int]]:
    """`together`, with the progress of reading the prompts where that is slow, until there is a first token."""
    with ui.slow_bar("reading the prompts") as progress:
        for ended in together(replies):
            begun = ended or any(reply.tokens for reply in replies)
            done, total = (sum(each) for each in zip(*read.values(), strict=True)) if read and not begun else (1, 1)
            if begun or read:
                progress(done, total)
            yield ended


def together(replies: Sequence[Reply]) -> Generator[set[int]]:
    """Read replies as they come, each into its own `text`.

    Yields the numbers of those that have ended, at least every EVERY seconds and when one ends. Raises what one raises.
    """
    events: queue.SimpleQueue[tuple[int, BaseException | None]] = queue.SimpleQueue()

    def read(number: int, reply: Reply) -> None:
        try:
            reply.whole()
            events.put((number, None))
        except BaseException as fault:
            events.put((number, fault))

    for number, reply in enumerate(replies):
        threading.Thread(target=read, args=(number, reply), name="read-answer", daemon=True).start()
    ended: set[int] = set()
    while len(ended) < len(replies):
        with suppress(queue.Empty):
            number, fault = events.get(timeout=EVERY)
            if fault is not None:
                raise fault
            ended.add(number)
        yield ended


def _beside(labels: Sequence[str], replies: Sequence[Reply], ending: Generator[set[int]]) -> None:
    region, ended = Region(), set[int]()

    def lines(ended: set[int]) -> list[str]:
        table = Table.grid(expand=True, padding=(0, 3, 0, 0))
        for _ in replies:
            table.add_column(ratio=1, overflow="fold")
        table.add_row(*map(heading, labels))
        table.add_row(*(markdown(reply.text) for reply in replies))
        if len(ended) == len(replies):
            table.add_row(*(faint(_figures(reply)) for reply in replies))
        return lines_of(table)

    try:
        for ended in ending:
            region.paint(lines(ended)[-region.room :])
    finally:
        ending.close()
        region.end(lines(ended))


def _below(labels: Sequence[str], replies: Sequence[Reply], ending: Generator[set[int]], *, markdown: bool) -> None:
    """The first answer as it comes, then the second, which is made meanwhile."""
    ended: set[int] = set()
    try:
        for number, (label, reply) in enumerate(zip(labels, replies, strict=True)):
            ui.result(f"{label}:")
            with answer_screen(markdown=markdown) as write:
                shown = 0
                while True:
                    last = number in ended
                    text = reply.text
                    if text[shown:]:
                        write(text[shown:])
                        shown = len(text)
                    if last:
                        break
                    ended = next(ending)
            ui.note(f"({_figures(reply)})")
    finally:
        ending.close()


def speed(reply: Reply) -> float:
    """Tokens a second after the first one, which the prompt is read for."""
    took = reply.seconds - (reply.first or 0.0)
    return (reply.tokens - 1) / took if took else 0.0


def _figures(reply: Reply) -> str:
    return f"{reply.tokens} tokens, {speed(reply):.0f} a second"
