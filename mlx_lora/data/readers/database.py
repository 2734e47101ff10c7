""".sqlite, .sqlite3, .db: the rows of `data.query`. The database is opened for reading, and the query may only read."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from mlx_lora.config import Data
from mlx_lora.data.readers.base import Note, Raw, Unreadable, cell

ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
SHOWN_TABLES, SHOWN_COLUMNS, LONGEST_NAME = 8, 8, 40
TABLES = "select name from sqlite_master where type in ('table', 'view') and name not like 'sqlite_%' order by name"


def rows(file: Path, settings: Data, note: Note) -> Iterator[Raw]:
    number = 0
    try:
        with closing(sqlite3.connect(address(file), uri=True)) as connection:
            if settings.query is None:
                raise Unreadable(_choices(connection))
            connection.set_authorizer(_only_reading)
            cursor = connection.execute(settings.query)
            names = [name for name, *_ in cursor.description or ()]
            for number, values in enumerate(cursor, start=1):
                yield Raw(number, {name: cell(value) for name, value in zip(names, values, strict=True)})
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorname", "") in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
            raise Unreadable(f"is damaged, or not an SQLite database ({error})") from None
        place = f"after row {number}" if number else "data.query"
        raise Unreadable(f"{place}: {str(error)[:80]}") from None
    except (sqlite3.Warning, sqlite3.ProgrammingError) as error:
        raise Unreadable(f"data.query: {str(error)[:80]}") from None


def address(file: Path) -> str:
    """A write-ahead log that holds something has to be read too; without one, SQLite may leave no file beside this."""
    log = file.with_name(f"{file.name}-wal")
    alone = not (log.exists() and log.stat().st_size)
    return f"file:{quote(str(file.absolute()))}?mode=ro" + ("&immutable=1" if alone else "")


def _only_reading(action: int, *_: object) -> int:
    return sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY


def _choices(connection: sqlite3.Connection) -> str:
    """What a query can ask for: the tables and their columns."""
    names = [name for (name,) in connection.execute(TABLES)]
    if not names:
        return "has no tables"
    tables = {name: _columns(connection, name) for name in names[:SHOWN_TABLES]}
    listed = "; ".join(f"{name[:LONGEST_NAME]} ({', '.join(columns)})" for name, columns in tables.items())
    more = f" and {len(names) - SHOWN_TABLES} more" if len(names) > SHOWN_TABLES else ""
    table, columns = next(iter(tables.items()))
    example = f"select {columns[0]} as prompt, {columns[-1]} as completion from {table}"
    asked = "is a database, so data.query has to say what to read"
    return f'{asked}; tables: {listed}{more}; for example "data.query={example}"'


def _columns(connection: sqlite3.Connection, table: str) -> list[str]:
    found = connection.execute("select name from pragma_table_info(?)", [table])
    return [name[:LONGEST_NAME] for (name,) in found][:SHOWN_COLUMNS]
