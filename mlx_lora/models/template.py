"""Conversations through a tokenizer's chat template, in processes of their own that can be stopped.

A template comes with a model and is a program. transformers runs it in jinja's sandbox, but sets no limit to its time
or its output, and a sandbox inside an interpreter has been escaped from before. No budget inside the interpreter covers
time and memory (one multiplication of a text can take all memory, and jinja computes constants while it compiles), and
signals reach the main thread only. So workers render. A worker is confined (`machine.confined`: no files, no network,
no other process), and it is killed when it takes too long or too much memory. Many conversations go to a worker in one
message, and several workers render at a time, because a message costs more than rendering a short conversation.

Nothing here knows of masks, rows or thinking: a job is messages and the views wanted of them, a result is their texts.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from transformers import PreTrainedTokenizerBase

from mlx_lora.errors import ModelError
from mlx_lora.machine import confined

# For one conversation: seconds, bytes of memory over what the worker starts with, and characters of a text.
MOST_SECONDS, MOST_MEMORY, MOST_CHARACTERS = 10.0, 1 << 29, 16_000_000
# A worker imports transformers first.
START_SECONDS = 120.0
# More workers would be idle: one process encodes what they render.
MOST_WORKERS = 4
_GLANCE = 0.02
_SCRIPT = Path(__file__).with_name("template_worker.py")


class View(NamedTuple):
    """The first `messages` of a conversation; with `prompt`, up to where the next answer begins."""

    messages: int
    prompt: bool
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """A conversation and the views wanted of it."""

    messages: Sequence[Mapping[str, Any]]
    views: Sequence[View]
    tools: Sequence[Any] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        return {"messages": self.messages, "views": self.views, "tools": list(self.tools) or None}


# The texts of a job's views in order, or the error that the template raised.
Texts = list[str] | ValueError


def render(tokenizer: Any, jobs: Sequence[Job], template: str | None = None) -> list[Texts]:
    """The texts of each job, by `template` or by the tokenizer's own.

    Raises ModelError where the template takes more than its limits.
    """
    return submit(tokenizer, jobs, template)()


def submit(tokenizer: Any, jobs: Sequence[Job], template: str | None = None) -> Callable[[], list[Texts]]:
    """`render`, going on in a worker while the caller does something else; the result is a function that waits."""
    if template is None and _rendered_by_code(tokenizer):
        texts = [_by_code(tokenizer, job) for job in jobs]
        return lambda: texts
    future = _pool.submit(_rendered, tokenizer, jobs, template, _stops)

    def result() -> list[Texts]:
        try:
            return future.result()
        except KeyboardInterrupt:  # a template without end would hold up the end of this process
            stop_workers()
            raise

    return result


def workers() -> int:
    """How many jobs are worth submitting before the first result is taken."""
    return max(min((os.cpu_count() or 2) - 1, MOST_WORKERS), 1)


def _rendered_by_code(tokenizer: Any) -> bool:
    """Whether mlx_lm or transformers have code of their own for this tokenizer's chats, instead of a template."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    renders = getattr(type(inner), "apply_chat_template", None)
    return getattr(tokenizer, "_chat_template", None) is not None or (
        renders is not PreTrainedTokenizerBase.apply_chat_template
    )


def _by_code(tokenizer: Any, job: Job) -> Texts:
    texts = []
    try:
        for view in job.views:
            messages = [dict(message) for message in job.messages[: view.messages]]
            known = {name: value for name, value in view.arguments.items() if name != "thinking"}
            texts.append(
                tokenizer.apply_chat_template(
                    messages, tools=list(job.tools) or None, add_generation_prompt=view.prompt, tokenize=False, **known
                )
            )
    except Exception as error:  # whatever that code raises for a conversation
        return ValueError(str(error)[:1000])
    return texts


def _rendered(tokenizer: Any, jobs: Sequence[Job], template: str | None, stops: int) -> list[Texts]:
    """The texts of each job from a worker.

    If a batch fails, each of its jobs is tried alone, and of a job each view: the limits are those of one rendering.
    """
    worker = _free.get()
    try:
        texts: list[Texts] = []
        for shared, batch in _by_template(tokenizer, jobs, template):
            texts += _asked(worker, shared, batch, stops)
        return texts
    finally:
        _free.put(worker)


def _by_template(
    tokenizer: Any, jobs: Sequence[Job], template: str | None
) -> Iterator[tuple[dict[str, Any], list[Job]]]:
    """What jobs that follow one another have in common, and those jobs: some tokenizers have a template for tools."""

    def text(job: Job) -> str:
        return str(tokenizer.get_chat_template(tools=list(job.tools) or None) if template is None else template)

    for own, batch in groupby(jobs, key=text):
        yield {**tokenizer.special_tokens_map, "chat_template": own}, list(batch)


def _asked(worker: _Worker, shared: dict[str, Any], jobs: list[Job], stops: int) -> list[Texts]:
    if stops != _stops:
        raise ModelError("rendering was stopped")
    try:
        return worker.ask(
            {
                "shared": shared,
                "jobs": [
                    {"messages": job.messages, "views": job.views, "tools": list(job.tools) or None} for job in jobs
                ],
            }
        )
    except ModelError:
        if len(jobs) > 1:
            return [texts for job in jobs for texts in _asked(worker, shared, [job], stops)]
        if len(jobs[0].views) < 2:
            raise
    found: list[str] = []
    for view in jobs[0].views:
        (texts,) = _asked(worker, shared, [replace(jobs[0], views=[view])], stops)
        if isinstance(texts, ValueError):
            return [texts]
        found += texts
    return [found]


class _Worker:
    """A process that renders: started when first needed, again after it was killed, and gone with this one."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.memory = 0

    def ask(self, request: dict[str, Any]) -> list[Texts]:
        """The texts of a request's jobs. Raises ModelError over a limit."""
        try:
            process = self.started()
            _send(process, request)
            answers = _received(process, MOST_SECONDS, self.memory + MOST_MEMORY)
        except BaseException:  # over a limit, or interrupted: its answer would be taken for the next one's
            self.stop()
            raise
        for answer in answers:
            if "characters" in answer:
                raise ModelError(
                    f"the chat template wrote {answer['characters']} characters; the limit is {MOST_CHARACTERS}"
                )
        return [answer["texts"] if "texts" in answer else ValueError(answer["error"]) for answer in answers]

    def started(self) -> subprocess.Popen[bytes]:
        """The running process; its imports are done."""
        if self.process is None or self.process.poll() is not None:
            self.stop()
            with tempfile.TemporaryDirectory(prefix="mlx-lora-") as empty:
                # This process is quicker to stop it; the worker's own limit counts when this one was killed.
                self.process = confined.start(_SCRIPT, MOST_CHARACTERS, MOST_SECONDS + 1, directory=empty)
                _received(self.process, START_SECONDS, None)
            self.memory = _memory(self.process)
        return self.process

    def stop(self) -> None:
        """Kill the process, if there is one, and take back what it holds. Any thread may do it."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError, ValueError):  # what was still to be written has no reader
                    pipe.close()  # type: ignore[union-attr]


def _send(process: subprocess.Popen[bytes], request: dict[str, Any]) -> None:
    content = json.dumps(request, default=str).encode()  # tables have dates
    assert process.stdin is not None
    try:
        process.stdin.write(len(content).to_bytes(8, "little") + content)
        process.stdin.flush()
    except BrokenPipeError:
        raise ModelError("the process that renders chat templates has ended", hint="try again") from None


def _received(process: subprocess.Popen[bytes], seconds: float, memory: int | None) -> Any:
    """The worker's next answer. Raises ModelError when it takes longer, grows past `memory` bytes, or ends."""
    assert process.stdout is not None
    content, deadline = bytearray(), time.monotonic() + seconds
    while len(content) < 8 or len(content) < 8 + int.from_bytes(content[:8], "little"):
        if wait([process.stdout.fileno()], _GLANCE):
            piece = process.stdout.read1(1 << 20)  # type: ignore[attr-defined]
            if not piece:
                raise ModelError("the process that renders chat templates has ended", hint="try again")
            content += piece
        elif time.monotonic() > deadline:
            raise ModelError(f"the chat template takes more than {seconds:.0f} seconds for one conversation")
        elif memory is not None and _memory(process) > memory:
            raise ModelError(f"the chat template takes more than {MOST_MEMORY >> 20} MB for one conversation")
    return json.loads(content[8:])


def _memory(process: subprocess.Popen[bytes]) -> int:
    """Bytes of memory that a process has; 0 when it just ended, as its pipe will tell."""
    try:
        return int(psutil.Process(process.pid).memory_info().rss)
    except psutil.Error:
        return 0


def stop_workers() -> None:
    """End every process that renders, and whatever waits for one; the next job starts one again."""
    global _stops
    _stops += 1  # jobs that were submitted before don't start
    for worker in _workers:
        worker.stop()


def _begin() -> None:
    """Make the pool and its workers; no process is started before there is a job."""
    global _pool, _workers, _free
    _pool = ThreadPoolExecutor(workers(), thread_name_prefix="templates")
    _workers = [_Worker() for _ in range(workers())]
    _free = queue.LifoQueue()  # the last one used is the one that runs
    for worker in reversed(_workers):
        _free.put(worker)


_pool: ThreadPoolExecutor
_workers: list[_Worker]
_free: queue.LifoQueue[_Worker]
_stops = 0
_begin()
os.register_at_fork(after_in_child=_begin)
# Before Python waits for the pool's threads, as it does before `atexit`: a template without end would hold it up.
threading._register_atexit(stop_workers)  # type: ignore[attr-defined]
