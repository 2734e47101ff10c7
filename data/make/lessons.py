"""Small lessons of the pretraining corpus that are only about copying and looking up.

A lesson is a list of (prompt, answer) turns of one conversation. Everything a fine-tuned adapter needs later, finding a
name and writing it down letter by letter, is learned here first.
"""

from .words import COMMON_WORDS, Values

Turns = list[tuple[str, str]]


def _phrase(values: Values) -> str:
    """Something worth copying: a name, a place, a date, a code or some words."""
    make = values.rng.choice(
        (
            values.person,
            values.person,
            values.first_name,
            values.city,
            values.date,
            values.time,
            values.code,
            lambda: values.number(10, 100_000),
            lambda: " ".join(values.word() for _ in range(values.rng.randint(1, 4))),
        )
    )
    return make()


def _items(values: Values, count: int) -> list[str]:
    """Different one-word items."""
    items: dict[str, None] = {}
    while len(items) < count:
        make = values.rng.choice((values.first_name, values.last_name, values.word, values.code, values.weekday))
        items[make()] = None
    return list(items)


def echo(values: Values) -> Turns:
    """Repeat a phrase, once or in a frame such as quotes or brackets."""
    word, left, right = values.rng.choice(
        (
            ("Repeat", "", ""),
            ("Echo", "", ""),
            ("Say", "", ""),
            ("Quote", '"', '"'),
            ("Single quote", "'", "'"),
            ("Bracket", "[", "]"),
            ("Paren", "(", ")"),
            ("Tag", "<", ">"),
            ("Json", '{"value": "', '"}'),
            ("Greet", "Hello ", "!"),
            ("Star", "*", "*"),
        )
    )
    phrases = [_phrase(values) for _ in range(values.rng.randint(1, 3))]
    return [(f"{word}: {phrase}", f"{left}{phrase}{right}") for phrase in phrases]


def positions(values: Values) -> Turns:
    """The first or last word of a list, or the one after or before another."""
    items = _items(values, values.rng.randint(3, 7))
    separator = values.rng.choice((" ", ", ", "\n", "; "))
    index = values.rng.randrange(1, len(items))
    questions = [
        ("First?", items[0]),
        ("Last?", items[-1]),
        (f"After {items[index - 1]}?", items[index]),
        (f"Before {items[index]}?", items[index - 1]),
    ]
    turns = values.rng.sample(questions, values.rng.randint(1, 3))
    question, answer = turns[0]
    return [(f"{separator.join(items)}\n{question}", answer), *turns[1:]]


def key_values(values: Values) -> Turns:
    """Look up what belongs to a key."""
    keys = _items(values, values.rng.randint(2, 5))
    pairs = {key: _phrase(values) for key in keys}
    joint, end = values.rng.choice(((" = ", "; "), (": ", "\n"), (" is ", ", "), (" -> ", "\n"), ("=", ", ")))
    listing = end.join(f"{key}{joint}{value}" for key, value in pairs.items())
    turns = [(f"{key}?", pairs[key]) for key in values.rng.sample(keys, values.rng.randint(1, len(keys)))]
    question, answer = turns[0]
    return [(f"{listing}\n{question}", answer), *turns[1:]]


def replace(values: Values) -> Turns:
    """Write a sentence again with one word replaced, dropped or kept."""
    words = [values.word() for _ in range(values.rng.randint(2, 5))]
    old = values.first_name()
    position = values.rng.randrange(len(words) + 1)
    sentence = " ".join([*words[:position], old, *words[position:]])
    new = values.rng.choice((values.first_name, values.city, values.code))()
    changed = " ".join([*words[:position], new, *words[position:]])
    return [(f"Replace {old} by {new}: {sentence}", changed)]


def repeated_list(values: Values) -> Turns:
    """A list of random words that comes twice: the plainest text in which copying pays."""
    items = [
        values.rng.choice((values.word, values.first_name, values.code))() for _ in range(values.rng.randint(6, 12))
    ]
    return [("List: " + " ".join(items), " ".join(items))]


def table(values: Values) -> Turns:
    """Questions to a small table with a header."""
    columns = {
        "name": values.first_name,
        "town": values.city,
        "month": lambda: values.date().split()[1],
        "points": lambda: values.number(10, 1000),
        "code": values.code,
        "colour": lambda: values.rng.choice(COMMON_WORDS),
        "surname": values.last_name,
    }
    header = values.rng.sample(sorted(columns), values.rng.randint(2, 3))
    row_count = values.rng.randint(2, 4)
    rows = [[columns[column]() for column in header] for _ in range(row_count)]
    if any(len({row[i] for row in rows}) < row_count for i in range(len(header))):
        return table(values)
    bar = values.rng.choice((" | ", ", ", " ; "))
    text = "\n".join(bar.join(row) for row in [header, *rows])
    turns = []
    for _ in range(values.rng.randint(1, 3)):
        row = values.rng.choice(rows)
        known, asked = values.rng.sample(range(len(header)), 2)
        turns.append((f"{header[asked]} of {row[known]}?", row[asked]))
    question, answer = turns[0]
    return [(f"{text}\n{question}", answer), *turns[1:]]


def copying(values: Values) -> Turns:
    """One of the copying lessons."""
    return values.rng.choice((echo, echo, positions, key_values, key_values, replace))(values)
