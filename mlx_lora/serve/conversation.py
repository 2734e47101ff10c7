"""The turns of a chat: what is sent to the model, and what is saved. It knows neither the engine nor the screen.

An adapter that was trained on single questions has never seen an earlier turn, and tends to repeat it: for such a one
each question is sent by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_lora import paths
from mlx_lora.data.example import as_written, checked_message
from mlx_lora.errors import MlxLoraError
from mlx_lora.models.chat_format import ChatFormat
from mlx_lora.store.adapter import StoredAdapter

Message = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """What an adapter's training rows looked like, which is how it is asked.

    `template` is chat or none, `single_questions` whether each row was one question with its answer. `thinking` is on,
    off, or None for the model's own habit; `system` was in front of every row. `chat_template` is the adapter's own
    template, `answer_end` the token that ends its answers, `template_args` what the template is given. By default, as
    for the base or where a manifest doesn't say: the model's own template, and conversations.
    """

    template: str = "chat"
    single_questions: bool = False
    thinking: bool | None = None
    system: str | None = None
    chat_template: str | None = None
    answer_end: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with the system line that was in front of every training row, as those rows had it."""
        if not self.system:
            return list(messages)
        if self.template != "none":
            return [{"role": "system", "content": self.system}, *messages]
        last = messages[-1]
        return [*messages[:-1], {**last, "content": f"{self.system}\n\n{last['content']}"}]

    def format(self, tokenizer: Any) -> ChatFormat:
        """How conversations with it become text."""
        end = None if self.answer_end is None else tokenizer.get_vocab().get(self.answer_end)
        return ChatFormat(tokenizer, self.chat_template, self.template_args, end)


def trained(adapter: StoredAdapter) -> Trained:
    """What a stored adapter says about the rows that it was trained on."""
    manifest = adapter.manifest
    single = bool(manifest.data) and all(file.get("answers") == 1 for file in manifest.data)
    data = (manifest.recipe or {}).get("data") or {}
    return Trained(
        manifest.template or "chat",
        single,
        manifest.thinking,
        data.get("system"),
        adapter.chat_template,
        manifest.answer_end,
        data.get("template_args") or {},
    )


class Conversation:
    """`messages` are a system message, if there is one, then user and assistant turns in alternation.

    While an answer is generated, the last user turn has none yet: `answered` or `taken_back` ends that.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.system_chosen = False

    @property
    def system(self) -> list[Message]:
        return [message for message in self.messages[:1] if message["role"] == "system"]

    @property
    def turns(self) -> list[Message]:
        return self.messages[len(self.system) :]

    def set_system(self, text: str) -> None:
        """Set the system message, or remove it with an empty text; an adapter's own doesn't return then."""
        self.system_chosen = True
        self.messages = [*([{"role": "system", "content": text}] if text else []), *self.turns]

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def answered(self, text: str) -> bool:
        """Add the answer to the last user turn; take that turn back, and return False, where the text is blank."""
        if not text.strip():  # many templates refuse two user turns in a row, and training refuses an empty answer
            self.messages.pop()
            return False
        message = {"role": "assistant", "content": text}
        try:
            self.messages.append(checked_message(message, "the answer"))
        except ValueError:  # reasoning without an answer
            self.messages.append(message)
        return True

    def forget(self) -> None:
        """Keep the system message alone."""
        self.messages = self.system

    def sent(self, *, history: bool) -> list[Message]:
        """The messages that the next prompt is made of: without history the system message and the last turn."""
        return self.messages if history else [*self.system, *self.turns[-1:]]

    def rows(self, *, history: bool) -> list[list[Message]]:
        """The conversation as rows of training data: one, or without history one for each question."""
        turns = self.turns
        if history:
            return [self.messages]
        return [[*self.system, *turns[start : start + 2]] for start in range(0, len(turns), 2)]

    def save(self, file: str, *, history: bool) -> None:
        """Append `rows` to a file of JSON lines, readable by the user alone. Raises MlxLoraError where it can't."""
        if not file or not self.turns:
            raise MlxLoraError("/save FILE needs a file name and a conversation")
        rows = ([as_written(message) for message in row] for row in self.rows(history=history))
        lines = (json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)
        try:
            with paths.created(Path(file).expanduser(), "ab") as stream:
                stream.write("".join(lines).encode())
        except OSError as error:
            raise MlxLoraError(f"can't write {file}: {error.strerror}") from None
