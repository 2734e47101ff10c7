'''Lines as they are typed: on a terminal by prompt_toolkit, with completion and a history in memory only; else stdin.

A block goes from `"""` to the next `"""` at the end of a line, over as many lines as it has, and is sent as it stands.
On a terminal Esc-Enter begins a new line too.
'''

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_lora import ui

if TYPE_CHECKING:
    from mlx_lora.serve.chat.chat import Chat

QUOTES = '"""'


@dataclass(frozen=True)
class Line:
    """What was typed; a `block` is a message whatever it begins with, and has no files in it."""

    text: str
    block: bool = False


def is_open(text: str) -> bool:
    """Whether a block has begun and not ended."""
    text = text.strip()
    return text.startswith(QUOTES) and not (len(text) >= 2 * len(QUOTES) and text.endswith(QUOTES))


def line_of(text: str) -> Line:
    """A line, or the text of a whole block; the end of the input may have cut its end off."""
    stripped = text.strip()
    if not stripped.startswith(QUOTES):
        return Line(text)
    return Line(stripped.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n"), block=True)


def typed_lines(chat: Chat) -> Iterator[Line]:
    """Lines up to the end of the input."""
    return _prompted(chat) if sys.stdin.isatty() else _piped()


def _piped() -> Iterator[Line]:
    block = ""
    for line in sys.stdin:
        block += line
        if not is_open(block):
            yield line_of(block)
            block = ""
    if block:
        yield line_of(block)


def _prompted(chat: Chat) -> Iterator[Line]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory

    from mlx_lora.serve.chat.completion import ChatCompleter

    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory(), completer=ChatCompleter(chat), multiline=True, key_bindings=_keys(),
        prompt_continuation=lambda width, line, folded: "" if folded else "... ", reserve_space_for_menu=4,
    )  # fmt: skip
    while True:
        draft = chat.take_draft()
        if draft and ui.out.is_dumb_terminal:  # which shows what is typed, and not what is there already
            ui.note(f"(the message was: {draft})")
            draft = ""
        try:
            yield line_of(session.prompt(ui.one_line(chat.label()), default=draft))
        except KeyboardInterrupt:
            ui.note("(/bye leaves)")
        except EOFError:
            return


def _keys() -> Any:
    """Enter sends, but for a block that is open; Esc-Enter begins a new line."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: Any) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys
