"""The turns of a chat, and how each adapter is asked. It knows neither models nor files nor the screen.

An adapter that was trained on single questions has never seen an earlier turn, and tends to repeat it: for such a one
each question is sent by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lora.data.example import checked_message
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


def system_of(messages: Sequence[Message]) -> list[Message]:
    """The system message at the beginning, where there is one."""
    return [message for message in messages[:1] if message["role"] == "system"]


def sent_messages(messages: Sequence[Message], *, history: bool) -> list[Message]:
    """The messages that the next prompt is made of: without history the system message and the last turn."""
    return list(messages) if history else [*system_of(messages), *messages[-1:]]


class Conversation:
    """`messages` are a system message, if there is one, then user and assistant turns in alternation.

    While an answer is generated, the last user turn has none yet: `answered` ends that. `typed` is the last user turn
    as it was typed, where its text differs from that.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.system_chosen = False
        self.typed: str | None = None

    @property
    def system(self) -> list[Message]:
        return system_of(self.messages)

    @property
    def turns(self) -> list[Message]:
        return self.messages[len(self.system) :]

    def set_system(self, text: str) -> None:
        """Set the system message, or remove it with an empty text; an adapter's own doesn't return then."""
        self.system_chosen = True
        self.messages = [*([{"role": "system", "content": text}] if text else []), *self.turns]

    def ask(self, text: str, *, typed: str | None = None) -> None:
        self.messages.append({"role": "user", "content": text})
        self.typed = typed

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

    def take_back(self) -> str:
        """Take back the last user turn with its answer; return it as it was typed. There must be one."""
        *self.messages, question, _ = self.messages
        typed, self.typed = self.typed, None
        return str(question["content"]) if typed is None else typed

    def forget(self) -> None:
        """Keep the system message alone."""
        self.messages = self.system

    def begin_with(self, messages: Sequence[Message]) -> None:
        """Go on with a conversation that was saved; its system message, or that it has none, is chosen."""
        self.messages, self.typed, self.system_chosen = list(messages), None, True

    def rows(self, *, history: bool) -> list[list[Message]]:
        """The conversation as rows of training data: one, or without history one for each question."""
        turns = self.turns
        if history:
            return [self.messages]
        return [[*self.system, *turns[start : start + 2]] for start in range(0, len(turns), 2)]
