"""SQL answers, run on a database: right where the result is that of the wanted query.

A model writes these queries, so they are taken for hostile: they run in a process that can read the database and
nothing else (`sql_process`), and that is killed where SQLite doesn't stop a query by itself.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_lora.data.read import sha256
from mlx_lora.data.readers.database import address
from mlx_lora.errors import MlxLoraError
from mlx_lora.machine import confined
from mlx_lora.study.scores.base import QUERY_SECONDS
from mlx_lora.study.scores.process import Asked

# What the process needs to start, and how much later than SQLite this process stops a query.
START_SECONDS, LATER = 60.0, 1.0
TOO_LONG = "too long"
SCRIPT = Path(__file__).with_name("sql_process.py")
FENCE = re.compile(r"\s*```\w*\n(.*?)\n?```\s*", re.DOTALL)
# What hides words that aren't the query's own: strings, quoted names, comments, and, innermost first, parentheses.
QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", re.DOTALL)
INNER = re.compile(r"\([^()]*\)")
ORDERED = re.compile(r"\border\s+by\b", re.IGNORECASE)


class Sql:
    """Whether an answer's result is the wanted query's: the same rows, in the same order where that one has ORDER BY.

    Names of columns don't count, their order does. Numbers that aren't whole are compared to 9 digits. Raises
    MlxLoraError for a file that isn't a database.
    """

    name = "sql"

    def __init__(self, database: Path, *, seconds: float = QUERY_SECONDS):
        self.database, self.seconds = database, seconds
        self._results: dict[str, dict[str, Any]] = {}
        self._process: Asked | None = self._started()

    def of(self, wanted: str, answer: str) -> float:
        right, found = self.result(wanted), self.result(answer)
        if "fault" in right:
            return float(query_of(wanted) == query_of(answer))
        kind = "in_order" if has_order(query_of(wanted)) else "any_order"
        return float(right[kind] == found.get(kind))

    def details(self, wanted: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
        """Counts of rows: answers that ran, were too slow or too large, or were refused or failed; wanted queries
        whose result is empty (any other empty result counts as theirs), or that fail."""
        rights, found = [self.result(one) for one in wanted], [self.result(one) for one in answers]
        faults = [one.get("fault") for one in found]
        return {
            "ran": faults.count(None),
            "too_long": faults.count(TOO_LONG),
            "failed": len(faults) - faults.count(None) - faults.count(TOO_LONG),
            "wanted_empty": sum(one.get("rows") == 0 for one in rights),
            "wanted_failed": sum("fault" in one for one in rights),
            "database": {"file": self.database.name, "sha256": sha256(self.database)},
        }

    def result(self, text: str) -> dict[str, Any]:
        """What `sql_process.result` says of a query, kept for the next time."""
        query = query_of(text)
        if query not in self._results:
            self._results[query] = self._run(query)
        return self._results[query]

    def close(self) -> None:
        """End the process; the next query starts it again."""
        if self._process is not None:
            self._process.close()
        self._process = None

    def _run(self, query: str) -> dict[str, Any]:
        self._process = self._process or self._started()
        try:
            return self._process.ask({"query": query}, self.seconds + LATER)
        except (TimeoutError, EOFError):
            self._process = None
            return {"fault": TOO_LONG}
        except BaseException:
            self._process = None
            raise

    def _started(self) -> Asked:
        with tempfile.TemporaryDirectory(prefix="mlx-lora-") as empty:
            process = confined.start(SCRIPT, address(self.database), self.seconds, directory=empty)
            assert process.stdout is not None
            asked = Asked(process, process.stdout.fileno())
            try:
                found = asked.hear(START_SECONDS)
            except (TimeoutError, EOFError):
                found = {"error": "the process that reads it doesn't start"}
        if "error" in found:
            asked.close()
            raise MlxLoraError(f"{self.database}: not a readable SQLite database ({found['error']})")
        return asked


def query_of(text: str) -> str:
    """The query in an answer: without the fence of a code block around it, and the semicolon at its end."""
    fenced = FENCE.fullmatch(text)
    return (fenced[1] if fenced else text).strip().rstrip(";").strip()


def has_order(query: str) -> bool:
    """Whether the rows of a query have an order: ORDER BY outside of all parentheses."""
    query, count = QUOTED.sub(" x ", query), 1
    while count:
        query, count = INNER.subn(" ", query)
    return ORDERED.search(query) is not None
