"""What the Tab key completes: commands, names of adapters and settings, files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from mlx_lora.serve.chat.commands import ADAPTERS, BASE, FILE, LEAVE
from mlx_lora.serve.chat.files import MENTION_BEGUN

if TYPE_CHECKING:
    from mlx_lora.serve.chat.chat import Chat


class ChatCompleter(Completer):
    """Completes the line of a chat before the cursor."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        line = document.text_before_cursor
        word, space, rest = line.partition(" ")
        if not line.startswith("/"):
            if begun := re.search(MENTION_BEGUN, line):
                yield from self._paths.get_completions(Document(begun[1] or ""), complete_event)
        elif not space:
            yield from _beginning(word, (*self.chat.commands.table, *LEAVE))
        elif (command := self.chat.commands.table.get(word)) is not None:
            if command.takes == (FILE,):
                yield from self._paths.get_completions(Document(rest), complete_event)
            elif command.takes == ADAPTERS:
                yield from _beginning(rest.rpartition(" ")[2], (*self.chat.service.names(), BASE))
            else:
                yield from _beginning(rest, command.takes)


def _beginning(text: str, words: Iterable[str]) -> Iterator[Completion]:
    for word in words:
        if word.startswith(text):
            yield Completion(word, start_position=-len(text))
