"""The chat: a read-answer loop with streaming, and commands that begin with a slash.

A swap exchanges adapters inside the loaded base and drops the key-value cache; the conversation stays. Every user turn
in it has an answer: one that gets none is taken back, because many templates refuse two user turns in a row. Lines come
from prompt_toolkit on a terminal and from plain stdin elsewhere, so a script can hold a conversation too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from mlx_lora import ui
from mlx_lora.errors import AdapterError, MlxLoraError, NotFinite, nearest
from mlx_lora.serve.answer import NO_SYSTEM, Answer, first_answer, prompt_tokens, room_for_answer, stream_text
from mlx_lora.serve.conversation import Conversation, Message, Trained, trained
from mlx_lora.serve.engine import Engine, Sampling
from mlx_lora.store import adapter as store
from mlx_lora.store import registry

SETTINGS: dict[str, Callable[[str], Any]] = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}
LEAVE, LEAVE_WORDS = ("/bye", "/exit", "/quit"), ("exit", "quit")


class Chat:
    """A conversation with an engine. `of_current` describes the adapter that the engine has in use, if it has one."""

    def __init__(self, engine: Engine, of_current: Trained | None = None):
        self.engine = engine
        self.conversation = Conversation()
        self.settings: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 512, "seed": None}
        self.trained: dict[str | None, Trained] = {None: Trained(), engine.current: of_current or Trained()}
        self.history_chosen: bool | None = None
        self.thinking: bool | None = None
        self.draft = ""  # what the next line starts with, on a terminal
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/adapters": (self.list_adapters, "the adapters in the home that fit this base"),
            "/use": (self.use, "NAME  swap to an adapter"),
            "/base": (self.base, "swap to the bare base"),
            "/system": (self.system, "TEXT  set the system message; without text, remove it"),
            "/history": (self.set_history, "on|off  send earlier turns with each question, or each one by itself"),
            "/think": (self.set_thinking, "on|off  ask a model that can think to think before it answers, or not to"),
            "/set": (self.set, f"NAME VALUE  change {', '.join(SETTINGS)}"),
            "/reset": (self.reset, "forget the conversation"),
            "/save": (self.save, "FILE  append the conversation as training data"),
            "/help": (self.help, "this list"),
            "/?": (self.help, "this list"),
            "/clear": (self.reset, "forget the conversation"),
        }

    @property
    def messages(self) -> list[Message]:
        """All turns so far, the system message first if there is one."""
        return self.conversation.messages

    @property
    def of_current(self) -> Trained:
        """How the adapter in use was trained, with thinking as `/think` has set it."""
        of_current = self.trained[self.engine.current]
        return of_current if self.thinking is None else replace(of_current, thinking=self.thinking)

    @property
    def template(self) -> str:
        return self.of_current.template

    @property
    def history(self) -> bool:
        """Whether earlier turns are sent: as chosen, else not for an adapter that was trained on single questions."""
        if self.history_chosen is not None:
            return self.history_chosen
        return not self.trained[self.engine.current].single_questions

    def run(self) -> None:
        """Answer lines until a word that leaves, or the end of input."""
        self._tell_training()
        for line in _lines(self._label, self._take_draft):
            if line.rstrip() in LEAVE_WORDS:
                ui.note(f"(left; a space before {line.rstrip()} sends the word as a message)")
                return
            line = line.strip()
            if line in LEAVE:
                return
            if not line:
                continue
            try:
                self.command(line) if line.startswith("/") else self.say(line)
            except NotFinite:  # nothing that this model says means anything
                raise
            except MlxLoraError as fault:
                ui.error(fault)
            except KeyboardInterrupt:
                ui.note("(stopped)")

    def command(self, line: str) -> None:
        """Run one slash command. Raises MlxLoraError naming the nearest one for an unknown."""
        word, _, rest = line.partition(" ")
        if word not in self.commands:
            raise MlxLoraError(f"no command {word}{nearest(word, (*self.commands, *LEAVE))}")
        self.commands[word][0](rest.strip())

    def say(self, text: str) -> None:
        """Add a user turn and stream the answer. An interrupted answer is kept as far as it came.

        Without any text of an answer the user turn is taken back.
        """
        answer, pieces = Answer(), []
        interrupted = answered = False
        self.conversation.ask(text)
        try:
            for piece in self._stream(answer):
                pieces.append(piece)
                ui.piece(piece)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            answered = self.conversation.answered("".join(pieces))
        if pieces:
            ui.result()
        if interrupted and not answered:
            self.draft = text
        if not answered:
            why = "stopped before an answer" if interrupted else "the answer is empty"
            ui.note(f"({why}: your message was taken back)")
        elif interrupted:
            ui.note("(stopped)")
        elif answer.finish_reason == "length":
            full = answer.generated_tokens < self.settings["max_tokens"]
            way_out = "the model's context is full, /reset forgets the conversation" if full else "/set max_tokens N"
            ui.note(f"(cut at {answer.generated_tokens} tokens; {way_out})")

    def _stream(self, answer: Answer) -> Iterator[str]:
        """Pieces of the answer to the last message."""
        tokens, place = self._prompt()
        room = room_for_answer(self.engine, tokens, hint=self._too_long_hint())
        most = self.settings["max_tokens"] if room is None else min(self.settings["max_tokens"], room)
        sampling = Sampling(**{key: self.settings[key] for key in ("temperature", "top_p", "seed")})
        with ui.slow_bar("reading the prompt") as on_prompt:
            yield from stream_text(
                self.engine,
                tokens,
                answer,
                max_tokens=most,
                sampling=sampling,
                first_answer=place,
                on_prompt=on_prompt,
            )

    def _too_long_hint(self) -> str:
        alone = not self.history or len(self.conversation.turns) == 1
        return "a shorter message fits" if alone else "/reset forgets the conversation, /save FILE keeps it before"

    def list_adapters(self, _: str) -> None:
        current = self.engine.current
        fitting = [name for name in registry.names() if self._fits(name)]
        for name in sorted({*fitting, *self.engine.adapters}):
            ui.result(f"{'*' if name == current else ' '} {name}")
        ui.result(f"{'*' if current is None else ' '} (base)")

    def use(self, name: str) -> None:
        if not name:
            raise MlxLoraError("/use NAME needs a name", hint="/adapters lists them")
        path = registry.find(name)
        name = registry.label(path)
        if name not in self.engine.adapters:
            stored = store.read(path)
            registry.check_belongs(stored, self.engine.loaded)
            self.trained[name] = trained(stored)
            end = self.trained[name].format(self.engine.loaded.tokenizer).own_end
            self.engine.add(name, store.wrappers_for(self.engine.loaded.model, stored), end=end)
        self._swap(name)

    def base(self, _: str) -> None:
        self._swap(None)

    def system(self, text: str) -> None:
        if text and self.template == "none":
            raise MlxLoraError(NO_SYSTEM)
        self.conversation.set_system(text)

    def set_history(self, value: str) -> None:
        if value not in ("on", "off", ""):
            raise MlxLoraError(f"/history takes on or off, not {value!r}")
        if value:
            self.history_chosen = value == "on"
        if self.template == "none":
            ui.note("(trained without a chat template: each line is continued by itself all the same)")
        elif self.history:
            ui.note("(history on: earlier turns are sent with each question)")
        else:
            ui.note("(history off: each question is answered by itself)")

    def set_thinking(self, value: str) -> None:
        if value not in ("on", "off"):
            raise MlxLoraError(f"/think takes on or off, not {value!r}")
        if not self.of_current.format(self.engine.loaded.tokenizer).thinks:
            ui.note("(the chat template knows no thinking: nothing changes)")
        self.thinking = value == "on"

    def set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not name:
            for key, current in self.settings.items():
                ui.result(f"{key:12} {current}")
            ui.result(f"{'history':12} {'on' if self.history else 'off'}  (/history changes it)")
            return
        if name not in SETTINGS:
            raise MlxLoraError(f"no setting {name!r}{nearest(name, SETTINGS)}")
        try:
            number = SETTINGS[name](value.strip())
        except ValueError:
            raise MlxLoraError(f"{value!r} is not a value for {name}") from None
        if (
            not math.isfinite(number)
            or number < 0
            or (name == "max_tokens" and number < 1)
            or (name == "top_p" and not 0 < number <= 1)
        ):
            raise MlxLoraError(f"{number} is out of range for {name}")
        self.settings[name] = number

    def reset(self, _: str) -> None:
        self.conversation.forget()
        self.engine.forget()

    def save(self, file: str) -> None:
        self.conversation.save(file, history=self.history)
        ui.note(f"appended to {file}")

    def help(self, _: str) -> None:
        for word, command in self.commands.items():
            ui.result(f"{word:10} {command[1]}")
        ui.result(f"{'/bye':10} leave, as /exit and /quit do")

    def _prompt(self) -> tuple[list[int], int | None]:
        """Tokens of what is sent, and where an adapter with virtual tokens finds its first answer in them."""
        tokenizer = self.engine.loaded.tokenizer
        messages = self.conversation.sent(history=self.history)
        if not self.conversation.system_chosen:
            messages = self.of_current.with_system(messages)
        tokens = prompt_tokens(tokenizer, messages, self.of_current)
        if self.engine.virtual is None:
            return tokens, None
        return tokens, first_answer(tokenizer, messages, tokens, self.of_current)

    def _swap(self, name: str | None) -> None:
        before, took = self.engine.current, self.engine.use(name)
        ui.note(f"{name or 'base'} in {took:.1f} ms")
        self._tell_training()
        if self.conversation.turns and before != name and self.history and self.template != "none":
            ui.note(
                f"(earlier answers came from {before or 'base'} and steer the style of the next: /reset forgets them)"
            )

    def _tell_training(self) -> None:
        """Say how the adapter in use was trained, where that changes what is sent."""
        if self.template == "none":
            ui.note("(trained without a chat template: each line is continued by itself, earlier ones aren't read)")
        elif not self.history and self.history_chosen is None:
            ui.note(
                f"({self.engine.current} was trained on single questions: each one is answered by itself; "
                "/history on sends earlier turns too)"
            )

    def _fits(self, name: str) -> bool:
        try:
            registry.check_belongs(store.read(registry.find(name)), self.engine.loaded)
        except AdapterError:
            return False
        return True

    def _label(self) -> str:
        return f"{self.engine.current or 'base'}> "

    def _take_draft(self) -> str:
        draft, self.draft = self.draft, ""
        return draft


def _lines(label: Callable[[], str], draft: Callable[[], str]) -> Iterator[str]:
    """Lines as they are typed: on a terminal with a label and the draft to begin with, else of stdin."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory

    session: PromptSession[str] = PromptSession(history=InMemoryHistory())
    while True:
        try:
            yield session.prompt(ui.one_line(label()), default=draft())
        except KeyboardInterrupt:
            ui.note("(/bye leaves)")
        except EOFError:
            return
