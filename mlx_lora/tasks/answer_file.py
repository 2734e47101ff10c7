"""Answer a file of prompts at full throughput: the scheduler is kept filled, and every answer is written as it ends.

Rows begin in windows of a few batches, sorted by length within each: prompts that are read together are then about as
long as each other. Memory holds two windows, however long the file is. The answers are in input order at the end.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_lora import paths
from mlx_lora.data import prompts
from mlx_lora.data.prompts import PromptRow
from mlx_lora.data.read import sha256
from mlx_lora.errors import DataError, MlxLoraError, NoMemory, Stopped
from mlx_lora.serve.answer import NO_SYSTEM
from mlx_lora.serve.requests import LOOK, Event, Failed, Finished, Request, Sampling, Token
from mlx_lora.serve.service import Prompt, Service, open_service
from mlx_lora.serve.status import Options
from mlx_lora.serve.text import Piece, TextStream
from mlx_lora.store import adapter as store
from mlx_lora.store import fingerprint, registry
from mlx_lora.tasks.answers import Answers

Advance = Callable[[int, str], None]
Bar = Callable[[str, int | None], AbstractContextManager[Advance]]
# Batches of rows that are sorted by length together, and that are with the scheduler.
WINDOW, AHEAD = 4, 2
# What a line has beside the row's own fields, which keep their values under another name where they have one of these.
RESULTS = ("index", "answer", "error", "finish_reason", "prompt_tokens", "generated_tokens")


@dataclass(frozen=True)
class Asking:
    """How rows are asked that don't say it themselves. `rows` are answered at once, by default as many as memory
    allows.

    `system` is a system message for rows without one, None for the adapter's own. With `raw`, prompts are encoded
    without a template. A row's seed is `seed` plus its index.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = None
    system: str | None = None
    raw: bool = False
    thinking: bool | None = None
    rows: int | None = None


@dataclass
class AnsweredFile:
    """`rows` of the file, of which `failed` have an error in place of an answer, and `before` were there already.

    The other figures are of this call alone.
    """

    rows: int
    failed: int
    before: int
    generated_tokens: int
    tokens_per_second: float
    seconds: float
    out: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def answer_file(
    file: str,
    out: Path,
    model: str | None,
    adapter: str | None,
    asking: Asking,
    *,
    bar: Bar,
    force: bool = False,
    stage: Callable[[str], None] = lambda text: None,
) -> AnsweredFile:
    """Answer the rows of `file` into `out`, or the rows that an earlier call has left.

    Raises DataError for a file that can't be read, AdapterError for an `adapter` that isn't there, NameTaken and
    MlxLoraError as `Answers`. A row that can't be answered has its error in its line.
    """
    found = paths.existing(file)
    if found is None or found.is_dir():
        raise MlxLoraError(f"{file}: no such file", hint="a .jsonl file, or a text file with a prompt a line")
    if found.resolve() == out.resolve():
        raise MlxLoraError(f"{out} holds the prompts", hint="--out FILE names another one")
    if asking.raw and asking.system:
        raise MlxLoraError(NO_SYSTEM, hint="leave --system out, and put its text into the prompts")
    stage(f"reading {found}")
    scanned = prompts.scan(found)
    options, named = Options(throughput=True), [adapter] if adapter else []
    with open_service(model, named, rows=asking.rows, options=options, stage=stage) as service:
        default = registry.label(registry.find(adapter)) if adapter else None
        made_of = _made_of(service, found, {*scanned.adapters, *([default] if default else [])}, asking, default)
        with Answers(out, scanned.rows, made_of, force=force) as answers:
            if answers.before:
                stage(f"going on: {answers.before:,} of {scanned.rows:,} rows are answered")
            with bar("answering", scanned.rows - answers.before) as advance:
                filling = _Filling(service, answers, asking, default, advance)
                filling.run(row for row in prompts.rows(found) if not answers.done[row.index])
            answers.complete()
    return AnsweredFile(
        scanned.rows, answers.failed, answers.before, filling.generated, filling.rate, filling.seconds, str(out)
    )


def _made_of(service: Service, file: Path, adapters: set[str], asking: Asking, default: str | None) -> dict[str, Any]:
    """What the answers follow from; the keys are words for an error."""
    settings = {key: value for key, value in asdict(asking).items() if key != "rows"}
    return {
        "the input file": sha256(file), "the model": fingerprint.of_directory(service.scheduler.loaded.path),
        "--adapter": default, "the options": settings,
    } | {f"adapter {name}": _digest(service, name) for name in sorted(adapters)}  # fmt: skip


def _digest(service: Service, name: str) -> str | None:
    try:
        return sha256(service.find(name) / store.WEIGHTS)
    except (MlxLoraError, OSError):
        return None  # its rows say so


@dataclass
class _Running:
    row: PromptRow
    request: Request
    stream: TextStream
    text: str = ""

    def add(self, piece: Piece | None) -> None:
        self.text += piece.text if piece else ""


class _Filling:
    """Keeps a scheduler filled with the rows of an iterator, and writes what comes back."""

    def __init__(self, service: Service, answers: Answers, asking: Asking, adapter: str | None, advance: Advance):
        self.service, self.answers, self.asking, self.adapter = service, answers, asking, adapter
        limits = service.scheduler.limits
        self.rows, self.most = limits.rows, min(AHEAD * limits.rows, limits.rows + limits.waiting)
        self.generated, self.failed = 0, 0
        self._advance, self._start = advance, time.perf_counter()
        self._events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        self._running: dict[int, _Running] = {}

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def rate(self) -> float:
        return self.generated / self.seconds

    def run(self, rows: Iterator[PromptRow]) -> None:
        """Answer all rows. Raises Stopped when the scheduler's thread has ended; what is written stays."""
        requests = self._requests(rows)
        more = True
        while more or self._running:
            while more and len(self._running) < self.most:
                if (found := next(requests, None)) is None:
                    more = False
                    break
                self._submit(*found)
            if self._running:
                self._take()

    def _submit(self, row: PromptRow, request: Request) -> None:
        self._running[row.index] = _Running(row, request, TextStream(self.service.tokenizer))
        self.service.scheduler.submit(request, self._deliver_to(row.index))

    def _deliver_to(self, index: int) -> Callable[[Event], None]:
        return lambda event: self._events.put((index, event))

    def _requests(self, rows: Iterator[PromptRow]) -> Iterator[tuple[PromptRow, Request]]:
        """Rows with what is asked, the shorter ones of a window first; those that can't be asked are written so."""
        while window := list(islice(rows, WINDOW * self.rows)):
            asked: list[tuple[PromptRow, Request]] = []
            for row in window:
                try:
                    if row.problem is not None:
                        raise MlxLoraError(f"line {row.line}: {row.problem}")
                    asked.append((row, self._request(row)))
                except MlxLoraError as error:
                    self._write(row, {"error": _message(error)})
            yield from sorted(asked, key=lambda one: len(one[1].tokens))

    def _request(self, row: PromptRow) -> Request:
        asking, adapter = self.asking, row.adapter if row.named else self.adapter
        trained = self.service.trained(adapter)
        messages = list(row.messages)
        if asking.raw or trained.template == "none" or not trained.format(self.service.tokenizer).available:
            if asking.system:
                raise MlxLoraError(NO_SYSTEM)
            if len(messages) > 1 or row.tools:
                raise MlxLoraError("without a chat template a row is one text, without earlier messages and tools")
        if asking.raw:
            prompt: Prompt = self.service.raw(row.text)
        else:
            if messages[0]["role"] != "system" and asking.system is None:
                messages = trained.with_system(messages)
            elif messages[0]["role"] != "system" and asking.system:
                messages = [{"role": "system", "content": asking.system}, *messages]
            prompt = self.service.prompt(messages, adapter, thinking=asking.thinking, tools=row.tools)
        seed = None if asking.seed is None else asking.seed + row.index
        return Request(
            prompt.tokens, adapter, row.max_tokens or asking.max_tokens, Sampling(asking.temperature, seed=seed),
            first_answer=prompt.first_answer,
        )  # fmt: skip

    def _take(self) -> None:
        """Wait for an event, and write the row that has ended with it."""
        try:
            index, event = self._events.get(timeout=LOOK)
        except queue.Empty:
            if not self.service.scheduler.alive:
                raise Stopped("the thread that generates has ended", hint="run the same command to go on") from None
            return
        running = self._running[index]
        if isinstance(event, Token):
            running.add(running.stream.push(event))
        elif isinstance(event, Failed):
            if isinstance(event.error, Stopped):
                raise event.error
            del self._running[index]
            if isinstance(event.error, NoMemory) and self._running:  # there may be room when others have ended
                self._submit(running.row, running.request)
            else:
                self._write(running.row, {"error": _message(event.error)})
        elif isinstance(event, Finished):
            del self._running[index]
            running.add(running.stream.finish())
            self.generated += event.generated_tokens
            self._write(running.row, {
                "answer": running.text, "finish_reason": event.reason, "prompt_tokens": event.prompt_tokens,
                "generated_tokens": event.generated_tokens,
            })  # fmt: skip

    def _write(self, row: PromptRow, values: dict[str, Any]) -> None:
        kept = {f"input_{name}" if name in RESULTS else name: value for name, value in row.fields.items()}
        self.answers.write(row.index, kept | values)
        self.failed += "error" in values
        self._advance(1, f"{self.rate:.0f} tok/s" + (f", {self.failed} failed" if self.failed else ""))


def _message(error: BaseException) -> str:
    if isinstance(error, DataError):
        return "; ".join(problem.problem for problem in error.problems)
    return error.message if isinstance(error, MlxLoraError) else f"{type(error).__name__}: {error}"
