"""A scorer of the user's own: a Python file with `score(wanted, answer) -> float`, from 0 to 1.

It is code and may do what the user may: nothing is confined but the network. It runs in a process of its own, so that
one that doesn't end, ends itself or prints disturbs nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_lora.data.read import sha256
from mlx_lora.errors import MlxLoraError
from mlx_lora.study.scores.base import SCORER_SECONDS
from mlx_lora.study.scores.process import Asked

# Its imports may take longer than a row.
START_SECONDS = 60.0
_RUN = "import sys; sys.path[:] = {paths!r}; from mlx_lora.study.scores import scorer_process as p; p.serve({answers})"


class Scorer:
    """Scores of a Python file; raises MlxLoraError where it fails, gives no number from 0 to 1, or takes too long."""

    name = "scorer"

    def __init__(self, file: Path, *, seconds: float = SCORER_SECONDS):
        if not file.is_file():
            raise MlxLoraError(f"{file}: no such file", hint="--scorer FILE.py has score(wanted, answer) -> float")
        self.file, self.seconds = file.absolute(), seconds
        self._process: Asked | None = None

    def of(self, wanted: str, answer: str) -> float:
        if self._process is None:
            self._process = self._started()
            self._ask(self._process, {"file": str(self.file)}, START_SECONDS)
        return float(self._ask(self._process, {"wanted": wanted, "answer": answer}, self.seconds)["score"])

    def details(self, wanted: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
        return {"scorer": {"file": self.file.name, "sha256": sha256(self.file)}}

    def close(self) -> None:
        """End the process, and whatever it has started in its group; the next score starts it again."""
        if self._process is not None:
            self._process.close()
        self._process = None

    def _started(self) -> Asked:
        """The process. It answers in a pipe of its own, and what it prints goes to stderr."""
        read, write = os.pipe()
        packages = str(Path(__file__).parents[3])
        paths = [path for path in dict.fromkeys([*sys.path, packages]) if os.path.isabs(path)]
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN.format(paths=paths, answers=write)],
            stdin=subprocess.PIPE, stdout=2, start_new_session=True, pass_fds=[write],
        )  # fmt: skip
        os.close(write)
        process.stdout = os.fdopen(read, "rb")  # closed with the process
        return Asked(process, read)

    def _ask(self, process: Asked, request: dict[str, str], seconds: float) -> dict[str, Any]:
        try:
            found = process.ask(request, seconds)
        except TimeoutError:
            found = {"error": f"takes more than {seconds:.0f} seconds for one answer"}
        except EOFError:
            found = {"error": "its process ended, or answered what isn't a score"}
        except BaseException:
            self._process = None
            raise
        if "error" in found:
            self.close()
            raise MlxLoraError(f"{self.file}: {found['error']}", hint="score(wanted, answer) gives a number, 0 to 1")
        return found
