"""Pretraining lessons about questions to tables: ten tables, six small query languages.

The questions have the wordings of the task `sql`, but its table `orders` and its columns never appear, and none of the
languages is SQL; one has SQL's words in another order.
"""

from .lessons import Turns
from .questions import Ask, Table, draw_question
from .tasks import SQL_COLUMNS
from .words import Values

TABLES = (
    Table("books", "writer", "town", "pages"),
    Table("flights", "pilot", "airport", "seats"),
    Table("pets", "keeper", "village", "weight"),
    Table("rooms", "guest", "hotel", "price"),
    Table("songs", "singer", "studio", "plays"),
    Table("cars", "driver", "garage", "mileage"),
    Table("courses", "teacher", "campus", "credits"),
    Table("plants", "gardener", "park", "height"),
    Table("matches", "referee", "stadium", "goals"),
    Table("films", "director", "cinema", "minutes"),
)


def _action(ask: Ask) -> str:
    return f"{ask.action} {ask.few}" if ask.few and ask.action == "newest" else ask.action


def _pipe(ask: Ask) -> str:
    tests = " and ".join(f"{c.column} {c.sign} {c.quoted(chr(34))}" for c in ask.conditions)
    return f"{ask.table.name} | where {tests} | {_action(ask)} {ask.column}"


def _list(ask: Ask) -> str:
    tests = " ".join(f"({c.sign} {c.column} {c.quoted(chr(39))})" for c in ask.conditions)
    return f"({_action(ask)} {ask.column} {ask.table.name} {tests})"


def _path(ask: Ask) -> str:
    tests = "&".join(f"{c.column}{c.sign}{c.value}" for c in ask.conditions)
    return f"/{ask.table.name}/{_action(ask)}/{ask.column}?{tests}"


def _chain(ask: Ask) -> str:
    tests = "".join(f".where({c.column} {c.sign} {c.quoted(chr(39))})" for c in ask.conditions)
    return f"{ask.table.name}{tests}.{_action(ask)}({ask.column});"


def _tags(ask: Ask) -> str:
    tests = "".join(f"<{c.column}>{c.sign} {c.value}</{c.column}>" for c in ask.conditions)
    return f"<{_action(ask)} {ask.table.name}.{ask.column}>{tests}"


def _from(ask: Ask) -> str:
    """SQL's words in another order, the table first."""
    tests = " AND ".join(f"{c.column} {c.sign} {c.quoted(chr(39))}" for c in ask.conditions)
    order = f" ORDER BY date DESC LIMIT {ask.few}" if ask.action == "newest" else ""
    return f"FROM {ask.table.name} WHERE {tests}{order} SELECT {SQL_COLUMNS[ask.action].format(ask.column)};"


LANGUAGES = {"pipe": _pipe, "list": _list, "path": _path, "chain": _chain, "tags": _tags, "from": _from}


def question_to_query(values: Values) -> Turns:
    """Questions to one table in one language; the language is named in the first prompt, or in all."""
    rng = values.rng
    table = rng.choice(TABLES)
    language = rng.choice((*sorted(LANGUAGES), "from"))
    turns = []
    for index in range(rng.randint(1, 3)):
        question, ask = draw_question(values, table)
        turns.append((f"{language}: {question}" if index == 0 else question, LANGUAGES[language](ask)))
    return turns
