"""The commands of a chat: each takes the rest of its line, and says what it did on the screen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_lora import ui
from mlx_lora.errors import MlxLoraError, nearest
from mlx_lora.serve.answer import NO_SYSTEM
from mlx_lora.serve.chat import files
from mlx_lora.serve.chat.compare import compare, speed

if TYPE_CHECKING:
    from mlx_lora.serve.chat.chat import Chat

SETTINGS: dict[str, Callable[[str], Any]] = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}
LEAVE, LEAVE_WORDS = ("/bye", "/exit", "/quit"), ("exit", "quit")
BASE = "base"
# What an argument is, for completion: one of these, or one of the words themselves.
ADAPTERS, FILE, SWITCH = ("ADAPTER",), "FILE", ("on", "off")


@dataclass(frozen=True)
class Command:
    run: Callable[[str], None]
    help: str
    takes: tuple[str, ...] = ()


class Commands:
    """The commands on one chat, by their words."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self.table = {
            "/adapters": Command(self.adapters, "the adapters that fit this base"),
            "/use": Command(self.use, "NAME  swap to an adapter", ADAPTERS),
            "/base": Command(self.base, "swap to the bare base"),
            "/compare": Command(self.compare, "A B [TEXT]  two answers side by side, to the last message", ADAPTERS),
            "/system": Command(self.system, "TEXT  set the system message; without text, remove it"),
            "/history": Command(self.history, "on|off  send earlier turns with each question, or not", SWITCH),
            "/think": Command(self.think, "on|off  ask a model that can think to think first, or not to", SWITCH),
            "/markdown": Command(self.markdown, "on|off  show answers formatted, or as they are", SWITCH),
            "/set": Command(self.set, f"NAME VALUE  change {', '.join(SETTINGS)}", tuple(SETTINGS)),
            "/retry": Command(self.retry, "answer the last message again, with another seed where it samples"),
            "/edit": Command(self.edit, "take the last message back to change it"),
            "/rate": Command(self.rate, "FILE  where /good and /bad put answers, as training data", (FILE,)),
            "/good": Command(lambda _: self.rated(good=True), "rate the last answer good"),
            "/bad": Command(lambda _: self.rated(good=False), "rate the last answer bad"),
            "/stats": Command(self.stats, "speed of the last answer, and memory"),
            "/reset": Command(self.reset, "forget the conversation"),
            "/clear": Command(self.reset, "forget the conversation"),
            "/save": Command(self.save, "FILE  append the conversation as training data", (FILE,)),
            "/load": Command(self.load, "FILE  go on with the last conversation of a file", (FILE,)),
            "/help": Command(self.help, "this list"),
            "/?": Command(self.help, "this list"),
        }

    def run(self, line: str) -> None:
        """Run one slash command. Raises MlxLoraError naming the nearest one for an unknown."""
        word, _, rest = line.partition(" ")
        if word not in self.table:
            raise MlxLoraError(f"no command {word}{nearest(word, (*self.table, *LEAVE))}")
        self.table[word].run(rest.strip())

    # ---- who answers ----

    def adapters(self, _: str) -> None:
        current = self.chat.adapter
        for name in self.chat.service.names():
            ui.result(f"{'*' if name == current else ' '} {name}")
        ui.result(f"{'*' if current is None else ' '} (base)")

    def use(self, name: str) -> None:
        if not name:
            raise MlxLoraError("/use NAME needs a name", hint="/adapters lists them")
        self._swap(name)

    def base(self, _: str) -> None:
        self._swap(None)

    def _swap(self, name: str | None) -> None:
        chat, before = self.chat, self.chat.adapter
        start = time.perf_counter()
        label = None if name is None else self._named(name)
        if label is not None:
            self._load(label)
        chat.adapter = label
        ui.note(f"{chat.adapter or 'base'} in {1000 * (time.perf_counter() - start):.1f} ms")
        chat.tell_training()
        if chat.conversation.turns and before != chat.adapter and chat.history and chat.template != "none":
            ui.note(
                f"(earlier answers came from {before or 'base'} and steer the style of the next: /reset forgets them)"
            )

    def _named(self, name: str) -> str:
        """What the service calls an adapter. Raises AdapterError where it can't be asked."""
        label = self.chat.service.label(name)
        self.chat.service.trained(label)
        return label

    def _load(self, label: str) -> None:
        """Bring an adapter into memory, or a version of it that is new."""
        scheduler = self.chat.service.scheduler
        if label in scheduler.status().adapters:
            scheduler.load(label)
        else:
            with ui.working(f"loading {label}"):
                scheduler.load(label)

    def compare(self, rest: str) -> None:
        chat = self.chat
        first, _, more = rest.partition(" ")
        second, _, text = more.strip().partition(" ")
        if not second:
            raise MlxLoraError("/compare A B needs two adapters", hint=f"/adapters lists them; {BASE} is the bare base")
        names = (self._side(first), self._side(second))
        for name in filter(None, names):
            self._load(name)
        alone = dict(chat.service.scheduler.status().alone)
        for reason in (alone[name] for name in names if name is not None and name in alone):
            ui.note(f"(they take turns instead of sharing passes: {reason})")
            break
        if text.strip() or not chat.conversation.turns:
            chat.compared_next = names
            if text.strip():
                try:
                    chat.say(text.strip())
                finally:
                    chat.compared_next = None  # where a file in the text can't be read, the next message isn't compared
            else:
                ui.note("(the next message goes to both, and isn't part of the conversation)")
        else:
            compare(chat, chat.messages[:-1], names)

    def _side(self, name: str) -> str | None:
        """One of two that are compared; None for the bare base, unless an adapter is called so."""
        return None if name == BASE and name not in self.chat.service.names() else self._named(name)

    # ---- how it is asked ----

    def system(self, text: str) -> None:
        if text and self.chat.template == "none":
            raise MlxLoraError(NO_SYSTEM)
        self.chat.conversation.set_system(text)

    def history(self, value: str) -> None:
        chat = self.chat
        if value:
            chat.history_chosen = _switch("/history", value)
        if chat.template == "none":
            ui.note("(without a chat template each line is continued by itself all the same)")
        elif chat.history:
            ui.note("(history on: earlier turns are sent with each question)")
        else:
            ui.note("(history off: each question is answered by itself)")

    def think(self, value: str) -> None:
        thinking = _switch("/think", value)
        if not self.chat.described(self.chat.adapter).format(self.chat.service.tokenizer).thinks:
            ui.note("(the chat template knows no thinking: nothing changes)")
        self.chat.thinking = thinking

    def markdown(self, value: str) -> None:
        self.chat.markdown = _switch("/markdown", value)

    def set(self, rest: str) -> None:
        settings = self.chat.settings
        name, _, value = rest.partition(" ")
        if not name:
            for key, current in settings.items():
                ui.result(f"{key:12} {current}")
            ui.result(f"{'history':12} {'on' if self.chat.history else 'off'}  (/history changes it)")
            return
        if name not in SETTINGS:
            raise MlxLoraError(f"no setting {name!r}{nearest(name, SETTINGS)}")
        try:
            number = SETTINGS[name](value.strip())
        except ValueError:
            raise MlxLoraError(f"{value!r} is not a value for {name}") from None
        beyond = (name == "max_tokens" and number < 1) or (name == "top_p" and not 0 < number <= 1)
        if not math.isfinite(number) or number < 0 or beyond:
            raise MlxLoraError(f"{number} is out of range for {name}")
        settings[name] = number

    # ---- turns ----

    def retry(self, _: str) -> None:
        self.chat.retry()

    def edit(self, _: str) -> None:
        if not self.chat.conversation.turns:
            raise MlxLoraError("there is no message to take back")
        self.chat.draft = self.chat.conversation.take_back()
        ui.note("(your last message and its answer were taken back)")

    def reset(self, _: str) -> None:
        self.chat.conversation.forget()

    def save(self, file: str) -> None:
        files.save(self.chat.conversation, file, history=self.chat.history)
        ui.note(f"appended to {file}")

    def load(self, file: str) -> None:
        self.chat.conversation.begin_with(files.load(file))
        turns = self.chat.conversation.turns
        ui.note(f"({len(turns) // 2} questions with their answers; the last one: {str(turns[-2]['content'])[:60]})")

    # ---- ratings and figures ----

    def rate(self, file: str) -> None:
        if not file:
            raise MlxLoraError("/rate FILE needs the name of a .jsonl file")
        path = Path(file).expanduser()
        if path.suffix != ".jsonl":
            raise MlxLoraError(f"{file} isn't a .jsonl file", hint=f"/rate {path.stem}.jsonl")
        self.chat.ratings = files.Ratings(path)
        ui.note(f"(/good and /bad append the last answer to {file}; train learns from the good ones)")

    def rated(self, *, good: bool) -> None:
        chat = self.chat
        if chat.ratings is None:
            raise MlxLoraError("there is no file for rated answers yet", hint="/rate FILE chooses one")
        if not chat.conversation.turns:
            raise MlxLoraError("there is no answer to rate")
        who = chat.answered_by
        template = chat.described(who).template != "none"
        sent = chat.sent(who, chat.messages[:-1]) if template else chat.messages[-2:-1]
        ui.note(f"({chat.ratings.add(sent, chat.messages[-1], good=good, template=template)})")

    def stats(self, _: str) -> None:
        chat, status = self.chat, self.chat.service.scheduler.status()
        if (last := chat.last) is not None:
            ui.result(f"{'answer':14} {last.tokens} tokens, {speed(last):.1f} tokens/s")
            if (finished := last.finished) is not None:
                cached = finished.cached_tokens
                read = finished.prompt_tokens - cached
                ui.result(f"{'prompt':14} {finished.prompt_tokens} tokens: {read} read, {cached} cached")
            ui.result(f"{'first token':14} after {1000 * (last.first or 0):.0f} ms")
        adapters, prompts = ui.size(status.adapter_bytes), ui.size(status.prompt_cache_bytes)
        ui.result(f"{'memory':14} {ui.size(mx.get_active_memory())}, of it {adapters} adapters, {prompts} prompts kept")
        ui.result(f"{'adapters':14} {', '.join(status.adapters) or 'none'} in memory")

    def help(self, _: str) -> None:
        for word, command in self.table.items():
            ui.result(f"{word:10} {command.help}")
        ui.result(f"{'/bye':10} leave, as /exit and /quit do")
        ui.result('@path in a message puts a file\'s text in; """ begins and ends a message of several lines')


def _switch(command: str, value: str) -> bool:
    if value not in SWITCH:
        raise MlxLoraError(f"{command} takes on or off, not {value!r}")
    return value == "on"
