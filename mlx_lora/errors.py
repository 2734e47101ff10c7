"""Every error that a user can cause or meet.

    MlxLoraError                 what, where, and a hint; the command line prints it in one or two lines
    ├── RecipeError              a recipe or an override that can't be used
    ├── ModelError               a model that is missing, incomplete or refused
    │   └── NotFinite            a model whose logits are NaN or infinite
    ├── DataError                rows that can't be used; carries every problem, not the first
    ├── AdapterError             an adapter that doesn't exist, doesn't load, or belongs to another base
    │   └── CannotFuse           the method, or the measured loss, forbids merging
    ├── NameTaken                a name or a directory that exists already
    ├── TrainingError            training can't go on (non-finite losses, nothing to train)
    │   └── PeerFailed           another process of the same run failed, which ends all of them
    ├── TooLong                  a prompt that the model's context has no room for
    ├── Busy                     more requests wait than may; asking again later helps
    ├── NoMemory                 an answer would make the machine swap
    ├── Stopped                  the thread that generates has ended, with every request that it had
    └── NetworkBlocked           something tried to leave the machine outside `pull`

The library raises; only the command line turns an error into text and an exit code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass


class MlxLoraError(Exception):
    """Base of all errors here: a message for people, and a hint saying what to do next."""

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint


class RecipeError(MlxLoraError):
    """A recipe or an override names something unknown, or a value that can't be used."""


class ModelError(MlxLoraError):
    """A model directory is missing, incomplete, unsupported or unsafe."""


class NotFinite(ModelError):
    """The model's logits are NaN or infinite: nothing that it says means anything."""


class AdapterError(MlxLoraError):
    """An adapter is missing, damaged, or belongs to another base."""


class CannotFuse(AdapterError):
    """The adapter has no merged form, or merging would lose what it learned."""


class NameTaken(MlxLoraError):
    """The target exists and replacing it was not asked for."""


class TrainingError(MlxLoraError):
    """Training can't start or can't go on."""


class PeerFailed(TrainingError):
    """A process of a run of several failed before the first step, so all of them end; the first one says why."""


class TooLong(MlxLoraError):
    """A prompt is longer than the model's context, beyond which its answers make no sense."""


class Busy(MlxLoraError):
    """More requests are waiting than may wait; asking again later helps."""


class NoMemory(MlxLoraError):
    """The machine would swap: an answer doesn't begin, or ends early, so that the others go on."""


class Stopped(MlxLoraError):
    """The thread that generates has ended, so there are no more answers."""


class NetworkBlocked(MlxLoraError):
    """A connection to something other than this machine was attempted and refused."""


@dataclass(frozen=True)
class Problem:
    """One fault in one file. `line` counts from 1; 0 means the file as a whole."""

    file: str
    line: int
    problem: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.problem}"

    def as_dict(self) -> dict[str, str | int]:
        return asdict(self)


class DataError(MlxLoraError):
    """Rows that can't be used. `problems` lists all of them; the message shows the first few."""

    SHOWN = 5

    def __init__(self, problems: Iterable[Problem], *, hint: str | None = None):
        self.problems = list(problems)
        lines = [str(problem) for problem in self.problems[: self.SHOWN]]
        if len(self.problems) > self.SHOWN:
            lines.append(f"… and {len(self.problems) - self.SHOWN} more")
        super().__init__("\n  ".join(lines), hint=hint)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest known word, or the whole set when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"
