"""One loaded base with its scheduler, and how each adapter is asked: messages in, text out.

The chat, `run` and the server stand on it. The model belongs to the scheduler's thread; tokenizers, templates and
manifests are used here, in the threads that ask.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora.config import Data
from mlx_lora.data.encode import Encoder
from mlx_lora.data.example import Example
from mlx_lora.errors import AdapterError, DataError, Problem
from mlx_lora.machine import limits as machine_limits
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.open import OpenModel
from mlx_lora.models.unpack import unpack_once
from mlx_lora.serve import memory
from mlx_lora.serve.answer import first_answer
from mlx_lora.serve.conversation import Message, Trained, trained
from mlx_lora.serve.prefill import OnPrompt
from mlx_lora.serve.requests import Answer, Finished, Processor, Reading, Request, Sampling, Token
from mlx_lora.serve.residence import Identity, identity
from mlx_lora.serve.scheduler import FindLimits, Limits, Scheduler
from mlx_lora.serve.status import DEFAULT, Options
from mlx_lora.serve.text import Piece, TextStream
from mlx_lora.store import adapter as store
from mlx_lora.store import registry
from mlx_lora.store.base import base_for

log = logging.getLogger(__name__)

# Seconds for the thread that generates to end the pass that it is in.
ENDING = 10.0


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and where its first answer starts, for an adapter with an infix."""

    tokens: tuple[int, ...]
    first_answer: int | None = None


@dataclass(eq=False)
class Reply:
    """An answer as text: iterate for its pieces. To stop iterating cancels it.

    `finished` is there once it has ended, with the reason `stop` where a stop string came. Times are in seconds from
    the question: `first` to the first token, `seconds` to the last one so far.
    """

    answer: Answer
    stream: TextStream
    on_prompt: OnPrompt
    asked: float = field(default_factory=time.perf_counter)
    text: str = ""
    tokens: int = 0
    first: float | None = None
    seconds: float = 0.0
    finished: Finished | None = None

    def __iter__(self) -> Iterator[Piece]:
        """Pieces of text. Raises what the request failed with."""
        try:
            for event in self.answer:
                piece = None
                if isinstance(event, Reading):
                    self.on_prompt(event.done, event.total)
                elif isinstance(event, Token):
                    piece = self._token(event)
                elif isinstance(event, Finished):
                    piece = self.stream.finish()
                    self.finished = event if self.stream.stopped is None else replace(event, reason="stop")
                if piece is not None:
                    self.text += piece.text
                    yield piece
        finally:
            if self.finished is None:
                self.cancel()

    def _token(self, token: Token) -> Piece | None:
        if self.stream.stopped is not None:
            return None  # it was on its way before the answer could be cancelled
        self.seconds = time.perf_counter() - self.asked
        self.first = self.seconds if self.first is None else self.first
        self.tokens += 1
        piece = self.stream.push(token)
        if self.stream.stopped is not None:
            self.cancel()
        return piece

    def whole(self) -> str:
        """The complete text, once the answer has ended."""
        for _ in self:
            pass
        return self.text

    def cancel(self) -> None:
        """End the answer with what it has. Any thread may, at any time."""
        self.answer.cancel()

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Service:
    """A started scheduler on `loaded`. `places` are adapters by labels, beside those of the home; it may grow."""

    def __init__(self, scheduler: Scheduler, loaded: LoadedModel, places: dict[str, Path]):
        self.scheduler, self.places = scheduler, places
        self.tokenizer, self.config = loaded.tokenizer, loaded.config
        self.base = registry.base_name(loaded.path)
        self.generation = OpenModel(loaded.path).generation
        self._loaded = loaded
        self._known: dict[str, tuple[Identity, Trained | AdapterError, bool]] = {}
        self._lock = threading.Lock()  # tokenizers are used by one thread at a time

    def find(self, name: str) -> Path:
        """The directory of an adapter. Raises AdapterError for one that is neither in `places` nor in the home."""
        return self.places.get(name) or registry.find_by_name(name)

    def label(self, adapter: str) -> str:
        """What to call an adapter that is given by its name or its path, from now on; for a person at this machine.

        Raises AdapterError where there is none.
        """
        path = registry.find(adapter)
        label = registry.label(path)
        if label != path.name:
            self.places[label] = path
        return label

    def names(self) -> list[str]:
        """The adapters that fit this base, by name."""
        return [name for name in sorted({*self.places, *registry.names()}) if self.fault(name) is None]

    def fault(self, name: str) -> AdapterError | None:
        """Why an adapter can't be asked on this base, or None."""
        try:
            self.trained(name)
        except AdapterError as error:
            return error
        return None

    def trained(self, adapter: str | None) -> Trained:
        """How an adapter was trained, which is how it is asked; the base is asked by the model's own template.

        Raises AdapterError for an adapter that isn't there, is damaged, or belongs to another base.
        """
        return Trained() if adapter is None else self._described(adapter)[0]

    def _described(self, adapter: str) -> tuple[Trained, bool]:
        """How an adapter was trained, and whether it has virtual tokens; read again where its files have changed."""
        path = self.find(adapter)
        version = identity(path)
        known = self._known.get(adapter)
        if known is None or known[0] != version:
            try:
                # arrays are the scheduler's thread's business: here they would be evaluated in a thread of a request
                stored = store.StoredAdapter(path, store.read_manifest(path), arrays={})
                registry.check_belongs(stored, self._loaded)
                known = (version, trained(stored), stored.manifest.method == "prompt")
            except AdapterError as error:
                known = (version, error, False)
            self._known[adapter] = known
        _, described, virtual = known
        if isinstance(described, AdapterError):
            raise described
        return described, virtual

    def prompt(
        self,
        messages: Sequence[Message],
        adapter: str | None = None,
        *,
        of: Trained | None = None,
        thinking: bool | None = None,
        tools: Sequence[Any] = (),
        template_args: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt that an answer to `messages` starts from, as the adapter's training rows had it.

        `of` stands for the adapter's own description; `thinking` and `template_args` go before what that says. The
        caller puts the adapter's own system line in front (`Trained.with_system`). Raises DataError where the
        template refuses the messages, AdapterError as `trained`.
        """
        described, virtual = self._described(adapter) if adapter is not None else (Trained(), False)
        described = described if of is None else of
        thinking = described.thinking if thinking is None else thinking
        described = replace(described, template_args={**described.template_args, **(template_args or {})})
        plain = (str(messages[-1].get("content") or ""), "")
        example = Example(messages=tuple(messages), prompt_messages=len(messages), plain=plain, tools=tuple(tools))
        with self._lock:
            chat = described.format(self.tokenizer)
            encoder = Encoder(self.tokenizer, Data(template="none" if described.template == "none" else "auto"), chat)
            try:
                if encoder.templated(example):
                    tokens = encoder.prompt(messages, tools, thinking=thinking)
                else:
                    tokens = encoder.prompt_tokens(example)
            except ValueError as error:
                raise DataError([Problem("prompt", 0, str(error))]) from None
            place = first_answer(self.tokenizer, messages, tokens, described) if virtual else None
        return Prompt(tuple(map(int, tokens)), place)

    def raw(self, text: str) -> Prompt:
        """A text as it is, with what the tokenizer puts in front of every text."""
        with self._lock:
            return Prompt(tuple(map(int, self.tokenizer.encode(text))))

    def ask(
        self,
        prompt: Prompt,
        adapter: str | None = None,
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        processors: Sequence[Processor] = (),
        on_prompt: OnPrompt = lambda done, total: None,
    ) -> Reply:
        """Queue a question; iterate over what comes back. Raises Busy and Stopped as `Scheduler.submit`."""
        request = Request(
            prompt.tokens, adapter, max_tokens, sampling or Sampling(), processors=tuple(processors),
            first_answer=prompt.first_answer,
        )  # fmt: skip
        stream = TextStream(self.tokenizer, stop)
        return Reply(self.scheduler.submit(request), stream, on_prompt)


def _fitting(loaded: LoadedModel, rows: int | None, kv_bits: int | None) -> Limits:
    """The limits that this machine's memory allows beside a base that has just been loaded; `rows` as asked, if so."""
    made = memory.plan(loaded.model, base=mx.get_active_memory(), limit=machine_limits.limit_bytes(), kv_bits=kv_bits)
    log.debug("memory for %s", made)
    return made.limits if rows is None else replace(made.limits, rows=rows)


def _places(stored: Sequence[store.StoredAdapter], label: Callable[[Path], str]) -> dict[str, Path]:
    """The directories of adapters by their names. Raises AdapterError where two have the same."""
    places = {label(adapter.path): adapter.path for adapter in stored}
    if len(places) < len({adapter.path for adapter in stored}):
        raise AdapterError("two of the adapters have the same name", hint="rename the directory of one")
    return places


@contextmanager
def open_service(
    model: str | None,
    adapters: Sequence[str] = (),
    *,
    limits: Limits | None = None,
    rows: int | None = None,
    options: Options = DEFAULT,
    stage: Callable[[str], None] = lambda text: None,
    label: Callable[[Path], str] = registry.label,
    finish: float = 0.0,
) -> Iterator[Service]:
    """A base with its scheduler, and `adapters` (names or paths) in memory; names of the home may be asked for too.

    `label` gives the name of each of `adapters`. Without `model`, the base that the adapters belong to. Without
    `limits`, those that memory allows (`serve.memory`), with `rows` at once where that is given. When the block ends,
    answers that run have `finish` seconds left. Raises what opening the base or loading an adapter raises.
    """
    stored = [store.read(registry.find(adapter)) for adapter in adapters]
    opened = base_for(model, stored)
    places = _places(stored, label)

    def open_base() -> LoadedModel:
        loaded = registry.open_base(opened, stored)
        unpack_once(loaded)
        return loaded

    def find(name: str) -> Path:
        return places.get(name) or registry.find_by_name(name)

    stage(f"loading {model or registry.base_name(opened.path)}")
    found: Limits | FindLimits = limits or (lambda loaded: _fitting(loaded, rows, options.kv_bits))
    scheduler = Scheduler(open_base, limits=found, options=options, find=find)
    try:
        scheduler.start()
        service = Service(scheduler, scheduler.loaded, places)
        for name in places:
            scheduler.load(name)
        yield service
    finally:
        scheduler.close(finish=finish, timeout=ENDING)
