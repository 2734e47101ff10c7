"""Queries of a model, run: right by their result, refused where they do more than read, stopped where they go on."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from mlx_lora.errors import MlxLoraError
from mlx_lora.study.scores.sql import Sql, has_order


@pytest.fixture
def database(tmp_path: Path) -> Path:
    file = tmp_path / "shop & co?.sqlite"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("create table sale (item text, price real, day integer, picture blob)")
        rows = [("tea", 2.5, 1, b"\0"), ("cake", 3.1, 2, None), ("tea", 2.5, 1, b"\0"), ("jam", 0.1 + 0.2, 3, None)]
        connection.executemany("insert into sale values (?, ?, ?, ?)", rows)
        connection.commit()
    return file


SAME = (
    ("select item from sale", "SELECT item FROM sale ORDER BY day DESC;"),
    ("select item, day from sale order by day", "select item, day from sale order by day, item"),
    ("select sum(price) from sale", "select total(price) from sale"),
    ("select count(*) from sale where item = 'tea'", "```sql\nselect 2\n```"),
    ("select 3", "select 2.9999999999"),
    ("select 12345678901", "select 12345678901.0"),
    ("select 9e999", "select 9e999"),
    ("select 0.3", "select price from sale where item = 'jam'"),
    ("select item from (select * from sale order by day desc)", "select item from sale"),
    ("select day from sale where item = 'x'", "select item from sale where price < 0"),
    ("select cast(x'ff' as text)", "select cast(x'ff' as text)"),
    ("with t as (select max(price) m from sale) select item from sale, t where price = m", "select 'cake'"),
)
DIFFERENT = (
    ("select 4915112345678", "select 4915112345679"),  # ids and telephone numbers have more than 9 digits
    ("select 9007199254740993", "select 9007199254740992"),
    ("select item from sale order by day desc", "select item from sale order by day"),
    ("select item from sale", "select distinct item from sale"),
    ("select item, day from sale", "select day, item from sale"),
    ("select day from sale", "select cast(day as text) from sale"),
    ("select item from sale", "select item from sales"),
    ("select item from sale", "I would select the item"),
    ("select item from sale", ""),
    ("select null", "select 0"),
)


def test_queries_are_right_by_their_result(database: Path) -> None:
    score = Sql(database)
    for right, pairs in ((1, SAME), (0, DIFFERENT)):
        for wanted, answer in pairs:
            assert score.of(wanted, answer) == right, (wanted, answer)


HOSTILE = (
    "insert into sale values ('x', 1, 1, null)", "delete from sale", "drop table sale", "update sale set price = 0",
    "attach database '{folder}/new.sqlite' as other", "vacuum into '{folder}/copy.sqlite'",
    "pragma writable_schema = 1",
    "create temp table x (y)", "select load_extension('{folder}/x.so')", "select 1; delete from sale", "begin",
    "select * from pragma_database_list", "reindex", "create view v as select 1", "savepoint s", "analyze",
    "select writefile('{folder}/new.txt', 'x')", "select edit('x')", "select 'a\0b'", "select \ud800",
)  # fmt: skip


def test_what_does_more_than_read_is_refused(database: Path) -> None:
    score, before = Sql(database), database.read_bytes()
    folder = database.parent
    files = sorted(folder.iterdir())
    for query in HOSTILE:
        assert score.result(query.format(folder=folder)) == {"fault": "failed"}, query
        assert score.of("select count(*) from sale", "select 4") == 1  # the process goes on
    assert database.read_bytes() == before and sorted(folder.iterdir()) == files


ENDLESS = (
    "with recursive n(x) as (select 1 union all select x + 1 from n) select count(*) from n",
    "with recursive n(x) as (select 1 union all select x + 1 from n) select x from n order by x",
    "with recursive n(x) as (select 1 union all select x + 1 from n) select x from n",
    f"select count(*) from {', '.join(f'sale s{number}' for number in range(14))}",
    "with recursive n(x) as (select 1 union all select x + 1 from n) select zeroblob(1000000) from n",
    "select length(zeroblob(2000000000))", "select printf('%.*c', 2000000000, 'x')",
    "select group_concat(hex(zeroblob(400000))) from sale",
)  # fmt: skip


def test_queries_without_end_or_measure_are_stopped(database: Path) -> None:
    score = Sql(database, seconds=0.05)
    for query in ENDLESS:
        start = time.monotonic()
        assert score.result(query) == {"fault": "too long"}, query
        assert time.monotonic() - start < 3 and score.of("select 1", query) == 0


def test_details_count_what_became_of_the_queries(database: Path) -> None:
    wanted = ["select 1", "select 2", "select day from sale where day = 9", "select nothing", "select 5"]
    answers = ["select 1", "drop table sale", "select item from sale", "select nothing", ENDLESS[0]]
    score = Sql(database, seconds=0.1)
    assert [score.of(*pair) for pair in zip(wanted, answers, strict=True)] == [1, 0, 0, 1, 0]
    details = score.details(wanted, answers)
    assert {**details, "database": None} == {
        "ran": 2, "too_long": 1, "failed": 2, "wanted_empty": 1, "wanted_failed": 1, "database": None,
    }  # fmt: skip


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.sqlite").write_text("hello " * 200)
    for name in ("text.sqlite", "absent.sqlite"):
        with pytest.raises(MlxLoraError, match=f"{name}: not a readable SQLite database"):
            Sql(tmp_path / name)
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == ["text.sqlite"]


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("select a from t order  by a", True), ("select a from t", False), ("select 'order by' from t", False),
        ("select rank() over (order by a) from t", False), ("select a from (select a from t order by (b)) x", False),
        ("select a from t -- order by a", False), ("select (1), a from t /* x */ ORDER\nBY a limit 3", True),
        ('select "order by" from t', False), ("select border, bye from t", False),
    ],
)  # fmt: skip
def test_order_is_that_of_the_query_itself(query: str, ordered: bool) -> None:
    assert has_order(query) is ordered
