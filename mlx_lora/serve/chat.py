"""The chat: a read-answer loop with streaming, and commands that begin with a slash.

A swap exchanges adapters inside the loaded base and drops the key-value cache; the conversation stays. Lines come
from prompt_toolkit on a terminal and from plain stdin elsewhere, so a script can hold a conversation too.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_lora import paths, ui
from mlx_lora.errors import AdapterError, MlxLoraError, NotFinite, nearest
from mlx_lora.serve.answer import Answer, first_answer, prompt_tokens, stream_text
from mlx_lora.serve.engine import Engine, Sampling
from mlx_lora.store import adapter as store
from mlx_lora.store import registry

SETTINGS: dict[str, Callable[[str], Any]] = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}


class Chat:
    """A conversation with an engine. `messages` holds all turns, the system message first if there is one."""

    def __init__(self, engine: Engine, *, template: str = "chat"):
        self.engine, self.template = engine, template
        self.messages: list[dict[str, str]] = []
        self.settings: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 512, "seed": None}
        self.templates: dict[str | None, str] = {None: template, engine.current: template}
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/adapters": (self.list_adapters, "the adapters in the home that fit this base"),
            "/use": (self.use, "NAME  swap to an adapter"),
            "/base": (self.base, "swap to the bare base"),
            "/system": (self.system, "TEXT  set the system message; without text, remove it"),
            "/set": (self.set, f"NAME VALUE  change {', '.join(SETTINGS)}"),
            "/reset": (self.reset, "forget the conversation"),
            "/save": (self.save, "FILE  append the conversation as a line of training data"),
            "/help": (self.help, "this list"),
            "/?": (self.help, "this list"),
            "/clear": (self.reset, "forget the conversation"),
        }

    def run(self) -> None:
        """Answer lines until /bye or the end of input."""
        self._tell_template()
        for line in _lines(self._label):
            line = line.strip()
            if line == "/bye":
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
                ui.result()
                ui.note("(stopped)")

    def command(self, line: str) -> None:
        """Run one slash command. Raises MlxLoraError naming the nearest one for an unknown."""
        word, _, rest = line.partition(" ")
        if word not in self.commands:
            raise MlxLoraError(f"no command {word}{nearest(word, self.commands)}")
        self.commands[word][0](rest.strip())

    def say(self, text: str) -> None:
        """Add a user turn and stream the answer. An interrupted answer is kept as far as it came."""
        self.messages.append({"role": "user", "content": text})
        answer = Answer()
        pieces: list[str] = []
        try:
            tokens, place = self._prompt()
            sampling = Sampling(**{key: self.settings[key] for key in ("temperature", "top_p", "seed")})
            most = self.settings["max_tokens"]
            for piece in stream_text(
                self.engine, tokens, answer, max_tokens=most, sampling=sampling, first_answer=place
            ):
                pieces.append(piece)
                ui.piece(piece)
            ui.result()
        except MlxLoraError:
            self.messages.pop()
            raise
        finally:
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
        if answer.finish_reason == "length":
            ui.note(f"(cut at {self.settings['max_tokens']} tokens; /set max_tokens N)")

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
            self.engine.add(name, store.wrappers_for(self.engine.loaded.model, stored))
            self.templates[name] = stored.manifest.template or "chat"
        self._swap(name)

    def base(self, _: str) -> None:
        self._swap(None)

    def system(self, text: str) -> None:
        if text and self.template == "none":
            raise MlxLoraError("this adapter was trained without a chat template, it has no system message")
        if self.messages and self.messages[0]["role"] == "system":
            self.messages.pop(0)
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not name:
            for key, current in self.settings.items():
                ui.result(f"{key:12} {current}")
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
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]
        self.engine.forget()

    def save(self, file: str) -> None:
        if not file or not self.messages:
            raise MlxLoraError("/save FILE needs a file name and a conversation")
        try:
            with paths.created(Path(file).expanduser(), "ab") as stream:  # readable by the user alone
                stream.write((json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise MlxLoraError(f"can't write {file}: {error.strerror}") from None
        ui.note(f"appended to {file}")

    def help(self, _: str) -> None:
        for word, command in self.commands.items():
            ui.result(f"{word:10} {command[1]}")
        ui.result(f"{'/bye':10} leave")

    def _prompt(self) -> tuple[list[int], int | None]:
        """Tokens of the conversation, and where an adapter with virtual tokens finds its first answer in them."""
        tokenizer = self.engine.loaded.tokenizer
        tokens = prompt_tokens(tokenizer, self.messages, template=self.template)
        if self.engine.virtual is None:
            return tokens, None
        return tokens, first_answer(tokenizer, self.messages, tokens, template=self.template)

    def _swap(self, name: str | None) -> None:
        took = self.engine.use(name)
        self.template = self.templates[name]
        ui.note(f"{name or 'base'} in {took:.1f} ms")
        self._tell_template()

    def _tell_template(self) -> None:
        if self.template == "none":
            ui.note("(trained without a chat template: each line is continued by itself, earlier ones aren't read)")

    def _fits(self, name: str) -> bool:
        try:
            registry.check_belongs(store.read(registry.find(name)), self.engine.loaded)
        except AdapterError:
            return False
        return True

    def _label(self) -> str:
        return f"{self.engine.current or 'base'}> "


def _lines(label: Callable[[], str]) -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory

    session: PromptSession[str] = PromptSession(history=InMemoryHistory())
    while True:
        try:
            yield session.prompt(ui.one_line(label()))
        except KeyboardInterrupt:
            ui.note("(/bye leaves)")
        except EOFError:
            return
