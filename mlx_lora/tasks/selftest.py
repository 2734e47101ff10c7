"""Does this device compute what it should? The checks on the embedded base, each beside what should have come out.

On a GPU everything runs three times: in the files' dtype, in float32, and on MLX's CPU backend, whose numbers the
GPU's are held against too. What is checked, and against what, is in `checks`; nothing of the user's is read or shown.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_lora import __version__
from mlx_lora.machine import device, facts
from mlx_lora.tasks.checks import PARTS
from mlx_lora.tasks.doctor import versions
from mlx_lora.tasks.subject import CPU, Check, Place, Subject, computing_on


@dataclass(frozen=True)
class Line:
    """One result. `difference` is NaN where `error` says what went wrong instead."""

    name: str
    against: str
    difference: float
    tolerance: float
    error: str | None = None

    @classmethod
    def of(cls, place: Place, check: Check) -> Line:
        return cls(f"{place}: {check.name}", check.against, check.difference, check.tolerance)

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


@dataclass
class Report:
    """`facts` about the machine and the versions, and a line for every check."""

    facts: dict[str, Any]
    lines: list[Line]

    @property
    def passed(self) -> bool:
        return all(line.passed for line in self.lines)

    def as_dict(self) -> dict[str, Any]:
        """The keys of `selftest --json`."""
        return {**self.facts, "passed": self.passed, "lines": [line.as_dict() for line in self.lines]}


def selftest(
    *, stage: Callable[[str], None] = lambda text: None, subject: Subject | None = None, only: str | None = None
) -> Report:
    """Run every check, or those of the part called `only`. A part that raises is one failed line; the others run."""
    start, subject = time.perf_counter(), subject or Subject()
    lines: list[Line] = []
    done: list[tuple[Place, dict[str, Check]]] = [(place, {}) for place in places()]
    for place, checks in done:
        for part in PARTS if only is None else [only]:
            stage(f"{place}: {part}")
            try:
                with computing_on(place.device):
                    for check in PARTS[part](place, subject):
                        checks[check.name] = check
                        lines.append(Line.of(place, check))
            except Exception as fault:  # what works still counts as evidence from a machine that can't be looked at
                message = f"{type(fault).__name__}: {fault}"
                lines.append(Line(f"{place}: {part}", "", float("nan"), 0.0, error=message))
    *on_gpu, (_, on_cpu) = done
    for place, checks in on_gpu:
        same = [check for name, check in checks.items() if name in on_cpu and check.tolerance]
        against_cpu = (replace(check, against="cpu", expected=on_cpu[check.name].values) for check in same)
        lines += [Line.of(place, check) for check in against_cpu]
    return Report(_facts() | {"seconds": round(time.perf_counter() - start, 1)}, lines)


def places() -> list[Place]:
    """This device in the files' dtype and in float32, then the CPU backend; without a GPU, that alone."""
    gpu = mx.default_device()
    on_gpu = [Place(gpu, mx.float16), Place(gpu, mx.float32)] if device.on_gpu() else []
    return [*on_gpu, CPU]


def _facts() -> dict[str, Any]:
    return {"version": __version__, "system": platform.platform(), **facts.collect(), "packages": versions()}
