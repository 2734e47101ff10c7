"""The process behind `sql`: runs queries on one database, and answers with what it takes to compare their results.

A script for `machine.confined.start`. The database is opened for reading only, then nothing can be opened any more.
SQLite asks about every action of a statement before it runs, and what isn't reading is refused: writing, ATTACH,
PRAGMA, transactions, load_extension. A query that takes too long is stopped; lengths, results and memory are bounded.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import sys
import time
from typing import Any, BinaryIO

from mlx_lora.data.readers.database import ALLOWED
from mlx_lora.machine import confined

# Steps of SQLite's machine between two looks at the clock.
STEPS = 1000
# Bytes of one value, rows of a result, bytes of all of its values, and bytes that SQLite may hold.
MOST_VALUE, MOST_ROWS, MOST_BYTES, MOST_MEMORY = 1_000_000, 100_000, 32_000_000, 512 << 20
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: MOST_VALUE,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1000,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 50,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
TOO_LONG, FAILED = "too long", "failed"
STOPPED = ("SQLITE_INTERRUPT", "SQLITE_TOOBIG", "SQLITE_NOMEM", "SQLITE_FULL")


def serve(requests: BinaryIO, answers: BinaryIO, place: str, seconds: float) -> None:
    """Answer each line of JSON, a `query`, with what `result` gives; the first answer is an `error`, or {}."""
    try:
        connection = opened(place)
    except sqlite3.Error as error:
        return _send(answers, {"error": str(error)})
    confined.close()
    _send(answers, {})
    for line in requests:
        _send(answers, result(connection, json.loads(line)["query"], seconds))


def opened(place: str) -> sqlite3.Connection:
    """The database at an address of SQLite's. Raises sqlite3.Error for what isn't one."""
    connection = sqlite3.connect(place, uri=True, isolation_level=None)
    connection.execute("pragma temp_store = memory")  # no file can be opened for what is sorted
    connection.execute(f"pragma hard_heap_limit = {MOST_MEMORY}")
    connection.execute("select count(*) from sqlite_master").fetchall()
    connection.text_factory = lambda content: content.decode("utf-8", "replace")
    for limit, most in LIMITS.items():
        connection.setlimit(limit, most)
    connection.set_authorizer(_only_reading)
    return connection


def result(connection: sqlite3.Connection, query: str, seconds: float) -> dict[str, Any]:
    """`rows`, and digests of them `in_order` and in `any_order`; or as `fault` TOO_LONG or FAILED."""
    deadline = time.monotonic() + seconds
    connection.set_progress_handler(lambda: int(time.monotonic() > deadline), STEPS)
    digests, size = list[bytes](), 0
    try:
        cursor = connection.execute(query)
        if cursor.description is None:
            return {"fault": FAILED}
        for row in cursor:
            size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
            if len(digests) == MOST_ROWS or size > MOST_BYTES:
                return {"fault": TOO_LONG}
            digests.append(hashlib.sha256(repr([_same(value) for value in row]).encode("utf-8", "replace")).digest())
    except MemoryError:
        return {"fault": TOO_LONG}
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        return {"fault": TOO_LONG if getattr(error, "sqlite_errorname", "") in STOPPED else FAILED}
    in_order, any_order = (hashlib.sha256(b"".join(rows)).hexdigest() for rows in (digests, sorted(digests)))
    return {"rows": len(digests), "in_order": in_order, "any_order": any_order}


def _same(value: Any) -> Any:
    """A value to compare: whole numbers as they are, others to 9 digits, since sums depend on the order of what is
    added; 3.0 and 2.9999999999 are the whole number 3."""
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    rounded = value if value.is_integer() else float(f"{value:.9g}")
    return int(rounded) if rounded.is_integer() else rounded


def _only_reading(action: int, _: str | None, function: str | None, *__: object) -> int:
    refused = action not in ALLOWED or (action == sqlite3.SQLITE_FUNCTION and function == "load_extension")
    return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK


def _send(answers: BinaryIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer, sys.argv[1], float(sys.argv[2]))
