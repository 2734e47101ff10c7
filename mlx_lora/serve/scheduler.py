"""Many requests at once, each with its own adapter: one thread owns MLX, queues carry everything in and out.

    submit (any thread) ── inbox ──> waiting ── admit: adapter, prompt cache ──> lane ── a pass ──> events to the waiter

Rows of the base and of adapters that join share every forward pass; each other adapter has a lane of its own, and lanes
take turns. A pass makes one token for every row that answers, and reads a chunk of the prompts that are new. A row ends
by itself: an error of its own, a cancellation or a finished answer leaves the others as they are. A pass that fails as
a whole is run again row by row, so that only the row at fault is lost.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_lora.errors import Busy, Stopped
from mlx_lora.machine import allocation
from mlx_lora.models.load import LoadedModel
from mlx_lora.serve.requests import LOOK, Answer, Deliver, Failed, Request
from mlx_lora.serve.residence import Residence
from mlx_lora.serve.running import Row
from mlx_lora.serve.status import DEFAULT, Limits, Options, Status
from mlx_lora.serve.worker import Worker

__all__ = ["Limits", "Scheduler", "Status"]

# What is sent to the thread: something to do there, None to end.
Action = Callable[[Worker], None]
FindLimits = Callable[[LoadedModel], Limits]
STUCK = "the thread that generates doesn't move"

log = logging.getLogger(__name__)


class Scheduler:
    """Answers requests on a base that `open_base` loads in the scheduler's own thread.

    `limits` may be found from the loaded base. `prepare(residence)` runs in that thread before the first request. Use
    as a context manager, or `start` and `close`.
    """

    def __init__(
        self,
        open_base: Callable[[], LoadedModel],
        *,
        limits: Limits | FindLimits | None = None,
        prepare: Callable[[Residence], None] = lambda residence: None,
        options: Options = DEFAULT,
        **residence: Any,
    ):
        self.limits = limits if isinstance(limits, Limits) else Limits()
        self._find_limits = limits if callable(limits) else lambda loaded: self.limits
        self._open_base, self._prepare, self._residence_options = open_base, prepare, residence
        self._options = options
        self._inbox: queue.SimpleQueue[Action | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        self._ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[Row] = set()  # every row that has no end yet; guarded by the lock
        self._started = self._closing = self._ended = False
        self._beat = time.monotonic()  # when the thread last began a turn, or got work after none
        self._slowest = 0.0  # seconds of its longest turn
        self._given_up: float | None = None  # the beat at which it was given up
        self._status = Status(alive=False, running=0, waiting=0, quiet_seconds=0.0)
        self._loaded: LoadedModel | None = None

    # ---- any thread ----

    def start(self) -> Scheduler:
        """Start the thread and wait until the base is loaded and tried. Raises what loading it raises."""
        self._started = True
        self._thread.start()
        if (error := self._ready.get()) is not None:
            self._thread.join()
            raise error
        return self

    def __enter__(self) -> Scheduler:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, finish: float = 0.0, timeout: float | None = None) -> None:
        """Take no more requests, let those that run finish for `finish` seconds, end the others with what they have.

        Waits for the thread at most `timeout` seconds more.
        """
        with self._lock:
            self._closing = True
        if not self._started:
            return
        end = time.monotonic() + finish
        while self._open and self.alive and time.monotonic() < end:
            time.sleep(0.02)
        self._inbox.put(None)
        self._thread.join(timeout)

    @property
    def loaded(self) -> LoadedModel:
        """The base, once it has started. Its model belongs to the scheduler's thread, its tokenizer to nobody."""
        assert self._loaded is not None, "not started"
        return self._loaded

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._ended

    def submit(self, request: Request, deliver: Deliver | None = None) -> Answer:
        """Queue a request; its events go to the answer's queue, or to `deliver`, which the generating thread calls.

        Raises Busy when too many wait, and Stopped when the thread has ended or is about to.
        """
        row = Row(request, deliver or (lambda event: None))
        answer = Answer(request, cancel=lambda: self._cancel(row), alive=lambda: self.alive)
        if deliver is None:
            row.deliver = answer.events.put
        with self._lock:
            if (error := self.refusal()) is not None:
                raise error
            if not self._open:
                self._beat = time.monotonic()
            self._open.add(row)
            self._inbox.put(lambda worker: worker.waiting.append(row))  # before `give_up` can cancel it
        return answer

    def refusal(self) -> Busy | Stopped | None:
        """Why a request would be refused now, or None."""
        if self._closing:
            return Stopped("no more requests are taken: it is about to end")
        if not self.alive:
            return Stopped("the thread that generates has ended", hint="start again")
        if self.stuck:
            return Stopped(STUCK, hint="start again")
        if len(self._open) >= self.limits.rows + self.limits.waiting:
            return Busy(f"{len(self._open)} requests are being answered or wait", hint="ask again in a moment")
        return None

    @property
    def stuck(self) -> bool:
        """Whether it was given up and hasn't moved since."""
        return self._given_up is not None and self._given_up == self._beat

    def give_up(self, reason: str) -> None:
        """End every open request with an error now, because the thread doesn't: it is stuck, or has ended badly.

        No requests are taken until it moves again. A request whose row it still holds is cancelled then.
        """
        with self._lock:
            self._given_up = self._beat
            left, self._open = self._open, set()
        for row in left:
            deliver, row.deliver = row.deliver, lambda event: None
            deliver(Failed(Stopped(reason, hint="start again")))
            self._cancel(row)

    def _cancel(self, row: Row) -> None:
        self._inbox.put(lambda worker: worker.cancel(row))

    def status(self) -> Status:
        """What it does at this moment."""
        with self._lock:
            rows = len(self._open)
        quiet = time.monotonic() - self._beat if rows else 0.0
        running = self._status.running
        return replace(
            self._status, alive=self.alive, stuck=self.stuck, waiting=max(rows - running, 0), quiet_seconds=quiet,
            slowest_seconds=self._slowest,
        )  # fmt: skip

    def load(self, name: str, *, timeout: float | None = None) -> None:
        """Bring an adapter into memory before its first request. Raises as a request that names it would fail."""
        done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._inbox.put(lambda worker: worker.want(name, done.put))
        self._wait(done, timeout)

    def unload(self, name: str, *, timeout: float | None = None) -> None:
        """Let an adapter go; rows that have it finish first."""
        self.ask(lambda worker: worker.residence.retire(name), timeout=timeout)

    def ask(self, action: Action, *, timeout: float | None = None) -> None:
        """Run something in the scheduler's thread, between two passes, and wait for it; what it raises is raised here.

        Raises TimeoutError after `timeout` seconds, and Stopped when the thread has ended or was given up.
        """
        done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def act(worker: Worker) -> None:
            try:
                action(worker)
                done.put(None)
            except Exception as error:
                done.put(error)

        self._inbox.put(act)
        self._wait(done, timeout)

    def _wait(self, done: queue.SimpleQueue[BaseException | None], timeout: float | None) -> None:
        """Wait for what the thread says, and raise it."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                error = done.get(timeout=LOOK)
                break
            except queue.Empty:
                if not self.alive:
                    raise Stopped("the thread that generates has ended", hint="start again") from None
                if self.stuck:
                    raise Stopped(STUCK, hint="start again") from None
                if end is not None and time.monotonic() > end:
                    raise TimeoutError from None
        if error is not None:
            raise error

    # ---- the thread that owns MLX ----

    def _run(self) -> None:
        error: BaseException = Stopped("the thread that generates has ended", hint="start again")
        try:
            try:
                options = {"wake": lambda: self._inbox.put(lambda _: None), **self._residence_options}
                self._loaded = self._open_base()
                self.limits = self._find_limits(self._loaded)
                start = time.monotonic()
                worker = Worker(self._loaded, self.limits, self._leave, self._options, **options)
                self._slowest = time.monotonic() - start  # of the passes that try the model out
                self._prepare(worker.residence)
                self._status = worker.status()
            except BaseException as fault:
                self._ready.put(fault)
                return
            self._ready.put(None)
            with allocation.memory_limits(lean=False):
                self._loop(worker)
        except BaseException as fault:  # whatever it is: nobody may wait for ever
            log.exception("the thread that generates has ended")
            error = Stopped(f"the thread that generates has ended: {fault!r}", hint="start again")
        finally:
            _clear_streams()
            with self._lock:
                self._ended = True
                left, self._open = self._open, set()
            for row in left:
                row.deliver(Failed(error))

    def _loop(self, worker: Worker) -> None:
        while self._listen(worker):
            start = self._beat = time.monotonic()
            worker.turn()
            self._slowest = max(self._slowest, time.monotonic() - start)
            self._status = worker.status()
        worker.end_all()

    def _listen(self, worker: Worker) -> bool:
        """Do what has arrived; wait for it where there is nothing else to do. False when it is time to end."""
        idle = worker.idle
        while True:
            try:
                action = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if action is None:
                return False
            action(worker)
            idle = False

    def _leave(self, row: Row) -> bool:
        """Note that a row has ended; False where it had before."""
        with self._lock:
            known = row in self._open
            self._open.discard(row)
        return known


def _clear_streams() -> None:
    """End MLX's own threads for the thread that calls this: left to the process's end, they abort it."""
    try:
        mx.synchronize()
    finally:
        mx.clear_streams()
