"""Questions to a table: one grammar for the task `sql` and for the pretraining lessons, which ask other tables.

A question is drawn with its meaning, an `Ask`; a query language is a function from an `Ask` to text.
"""

from typing import NamedTuple

from .words import Values


class Table(NamedTuple):
    """Names of a table and of its columns for a person, a place and a number."""

    name: str
    person: str
    place: str
    number: str


class Condition(NamedTuple):
    """`column sign value`; text values are quoted by the languages that quote."""

    column: str
    sign: str
    value: str

    def quoted(self, mark: str) -> str:
        return self.value if self.value.isdigit() else f"{mark}{self.value}{mark}"


class Ask(NamedTuple):
    """What a question means: an action over one column ("all" for whole rows) of the rows that meet the conditions."""

    table: Table
    action: str
    column: str
    conditions: list[Condition]
    few: int = 0


# wordings, action, column, conditions; {table.person} is a column's name, {person} a value
PATTERNS: tuple[tuple[tuple[str, ...], str, str, tuple[str, ...]], ...] = (
    (
        (
            "How many {table.name} has {person}?",
            "Count the {table.name} of {person}.",
            "Number of {table.name} by {person}?",
        ),
        "count",
        "all",
        ("person",),
    ),
    (
        (
            "How many {table.name} are in {city}?",
            "Count the {table.name} in {city}.",
            "Number of {table.name} in {city}?",
        ),
        "count",
        "all",
        ("place",),
    ),
    (
        ("What is the total {table.number} of {person}?", "Total {table.number} of {person}?"),
        "sum",
        "number",
        ("person",),
    ),
    (
        ("What is the total {table.number} of {person} in {city}?", "Total {table.number} of {person} in {city}?"),
        "sum",
        "number",
        ("person", "place"),
    ),
    (
        ("What is the average {table.number} in {city}?", "Average {table.number} in {city}?"),
        "mean",
        "number",
        ("place",),
    ),
    (
        ("What is the largest {table.number} of {person}?", "Largest {table.number} by {person}?"),
        "top",
        "number",
        ("person",),
    ),
    (
        ("Which {table.name} in {city} are above {limit}?", "List the {table.name} over {limit} in {city}."),
        "rows",
        "all",
        ("place", "more"),
    ),
    (
        ("Which {table.name} of {person} are below {limit}?", "List the {table.name} under {limit} of {person}."),
        "rows",
        "all",
        ("person", "less"),
    ),
    (
        ("Who has {table.name} in {city}?", "List every {table.person} in {city}."),
        "names",
        "person",
        ("place",),
    ),
    (
        ("Where does {person} have {table.name}?", "List every {table.place} of {person}."),
        "names",
        "place",
        ("person",),
    ),
    (
        ("Show the {few} newest {table.name} in {city}.", "What are the {few} newest {table.name} in {city}?"),
        "newest",
        "all",
        ("place",),
    ),
)


def draw_question(values: Values, table: Table) -> tuple[str, Ask]:
    """A question to the table and what it means."""
    wordings, action, column, roles = values.rng.choice(PATTERNS)
    person, city, limit = values.person(), values.city(), values.number(20, 5000)
    few = values.rng.randint(2, 9)
    conditions = {
        "person": Condition(table.person, "=", person),
        "place": Condition(table.place, "=", city),
        "more": Condition(table.number, ">", limit),
        "less": Condition(table.number, "<", limit),
    }
    question = values.rng.choice(wordings).format(table=table, person=person, city=city, limit=limit, few=few)
    column_name = column if column == "all" else getattr(table, column)
    return question, Ask(table, action, column_name, [conditions[role] for role in roles], few)
