"""The chat: lines are read and answered, the answers streamed; commands begin with a slash.

The adapter in use is a name that goes with each question, so a swap changes nothing in the model. Every user turn in
the conversation has an answer: one that gets none is taken back, because many templates refuse two user turns in a row.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mlx_lora import ui
from mlx_lora.errors import MlxLoraError, NotFinite, TooLong
from mlx_lora.serve.chat import files
from mlx_lora.serve.chat.commands import LEAVE, LEAVE_WORDS, Commands
from mlx_lora.serve.chat.compare import compare
from mlx_lora.serve.chat.lines import Line, typed_lines
from mlx_lora.serve.chat.screen import answer_screen
from mlx_lora.serve.conversation import Conversation, Message, Trained, sent_messages
from mlx_lora.serve.prefill import OnPrompt
from mlx_lora.serve.requests import Sampling
from mlx_lora.serve.service import Prompt, Reply, Service

NO_TEMPLATE = "without a chat template: each line is continued by itself, earlier ones aren't read"


class Chat:
    """A conversation over a service. `adapter` is the one in use, as the service calls it; None is the base."""

    def __init__(self, service: Service, adapter: str | None = None):
        self.service, self.adapter = service, adapter
        self.conversation = Conversation()
        self.settings: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 512, "seed": None}
        self.history_chosen: bool | None = None
        self.thinking: bool | None = None
        self.markdown = True
        self.draft = ""  # what the next line starts with, on a terminal
        self.last: Reply | None = None
        self.answered_by: str | None = None  # the adapter that gave the last answer
        self.ratings: files.Ratings | None = None
        self.compared_next: tuple[str | None, str | None] | None = None
        self._retries = 0
        self.commands = Commands(self)

    @property
    def messages(self) -> list[Message]:
        """All turns so far, the system message first if there is one."""
        return self.conversation.messages

    def described(self, adapter: str | None) -> Trained:
        """How an adapter is asked: as it was trained, with thinking as `/think` has set it."""
        trained = self.service.trained(adapter)
        if trained.template != "none" and not trained.format(self.service.tokenizer).available:
            trained = replace(trained, template="none")
        return trained if self.thinking is None else replace(trained, thinking=self.thinking)

    @property
    def template(self) -> str:
        return self.described(self.adapter).template

    def sends_history(self, adapter: str | None) -> bool:
        """Whether earlier turns are sent: as chosen, else not for an adapter that was trained on single questions."""
        return (
            not self.service.trained(adapter).single_questions if self.history_chosen is None else self.history_chosen
        )

    @property
    def history(self) -> bool:
        return self.sends_history(self.adapter)

    def run(self) -> None:
        """Answer lines until a word that leaves, or the end of input."""
        self.tell_training()
        for line in typed_lines(self):
            if not line.block and line.text.rstrip() in LEAVE_WORDS:
                ui.note(f"(left; a space before {line.text.rstrip()} sends the word as a message)")
                return
            text = line.text.strip()
            if not line.block and text in LEAVE:
                return
            if not text:
                continue
            try:
                self._obey(replace(line, text=text))
            except NotFinite:  # nothing that this model says means anything
                raise
            except MlxLoraError as fault:
                ui.error(fault)
            except KeyboardInterrupt:
                ui.note("(stopped)")

    def _obey(self, line: Line) -> None:
        if line.text.startswith("/") and not line.block:
            self.commands.run(line.text)
        else:
            self.say(line.text, literal=line.block)

    def say(self, text: str, *, literal: bool = False) -> None:
        """Add a user turn and stream the answer. An interrupted answer is kept as far as it came.

        `@path` in the text stands for that file's text, unless the text is `literal`. Without any text of an answer
        the user turn is taken back.
        """
        whole = text if literal else files.with_files(text, lambda part: len(self.service.raw(part).tokens))
        if self.compared_next is not None:
            names, self.compared_next = self.compared_next, None
            compare(self, [*self.messages, {"role": "user", "content": whole}], names)
            return
        self.conversation.ask(whole, typed=text)
        self._retries = 0
        self._answer(draft=text)

    def retry(self) -> None:
        """Answer the last message again, in place of its answer; that one stays where there is no new one."""
        if not self.conversation.turns:
            raise MlxLoraError("there is no message to answer again")
        before = self.messages[-2:]
        length = len(self.messages)
        self._retries += 1
        self.messages.pop()
        try:
            self._answer(draft=None)
        finally:
            if len(self.messages) < length:
                self.messages.extend(before)

    def _answer(self, *, draft: str | None) -> None:
        """Stream the answer to the last message, and keep it as far as it came.

        Without any text of an answer `draft` comes back on the next line; None where an earlier answer stays.
        """
        reply: Reply | None = None
        interrupted = answered = False
        try:
            with ui.slow_bar("reading the prompt") as on_prompt, answer_screen(markdown=self.markdown) as write:
                reply = self.ask(self.adapter, self.prompt(self.adapter, self.messages), on_prompt=on_prompt)
                for piece in reply:
                    on_prompt(1, 1)  # it has been read
                    write(piece.text)
        except KeyboardInterrupt:
            interrupted = True
        except TooLong as fault:
            fault.hint = self.too_long_hint(self.adapter, self.messages)
            raise
        finally:
            if reply is not None and reply.finished is None:
                reply.cancel()
            answered = self.conversation.answered(reply.text if reply is not None else "")
            if not answered and draft is not None and (reply is None or reply.finished is None):
                self.draft = draft
        if answered:
            self.last, self.answered_by = reply, self.adapter
        lost = "the answer before stays" if draft is None else "your message was taken back"
        self._tell_end(reply, interrupted=interrupted, lost=None if answered else lost)

    def _tell_end(self, reply: Reply | None, *, interrupted: bool, lost: str | None) -> None:
        finished = reply.finished if reply else None
        if lost is not None:
            ui.note(f"({'stopped before an answer' if interrupted else 'the answer is empty'}: {lost})")
        elif interrupted:
            ui.note("(stopped)")
        elif finished is not None and finished.reason == "length":
            full = finished.generated_tokens < self.settings["max_tokens"]
            way_out = "the model's context is full, /reset forgets the conversation" if full else "/set max_tokens N"
            ui.note(f"(cut at {finished.generated_tokens} tokens; {way_out})")

    def sent(self, adapter: str | None, messages: Sequence[Message]) -> list[Message]:
        """What an adapter is sent for an answer to the last of `messages`."""
        sent = sent_messages(messages, history=self.sends_history(adapter))
        return sent if self.conversation.system_chosen else self.described(adapter).with_system(sent)

    def prompt(self, adapter: str | None, messages: Sequence[Message]) -> Prompt:
        """What an adapter reads before its answer to the last of `messages`."""
        return self.service.prompt(self.sent(adapter, messages), adapter, of=self.described(adapter))

    def ask(self, adapter: str | None, prompt: Prompt, *, on_prompt: OnPrompt) -> Reply:
        """Ask an adapter, with the settings as they are."""
        return self.service.ask(
            prompt, adapter, max_tokens=self.settings["max_tokens"], sampling=self._sampling(), on_prompt=on_prompt
        )

    def _sampling(self) -> Sampling:
        seed = self.settings["seed"]
        seed = secrets.randbits(63) if seed is None else seed + self._retries
        return Sampling(self.settings["temperature"], self.settings["top_p"], seed)

    def too_long_hint(self, adapter: str | None, messages: Sequence[Message]) -> str:
        earlier = any(message["role"] == "assistant" for message in messages)
        alone = not self.sends_history(adapter) or not earlier
        return "a shorter message fits" if alone else "/reset forgets the conversation, /save FILE keeps it before"

    def tell_training(self) -> None:
        """Say how the adapter in use was trained, where that changes what is sent."""
        if self.template == "none":
            who = "this model comes" if self.adapter is None else "trained"
            ui.note(f"({who} {NO_TEMPLATE})")
        elif not self.history and self.history_chosen is None:
            ui.note(
                f"({self.adapter} was trained on single questions: each one is answered by itself; "
                "/history on sends earlier turns too)"
            )

    def label(self) -> str:
        return f"{self.adapter or 'base'}> "

    def take_draft(self) -> str:
        draft, self.draft = self.draft, ""
        return draft
