"""Pretraining lessons about notes: turn a note into a record of any format, or answer questions about one or two notes.

Half of the notes to write down are built like those of the task `notes`, but its keys (who, where, day, time, topic)
are never a key here, and the base sees no fixed record:
formats and keys change with every conversation and are always named in the first prompt.
"""

import json
from collections.abc import Callable

from .lessons import Turns
from .tasks import NOTE_SENTENCES
from .words import Values

KEYS = {
    "person": ("name", "contact", "client", "guest", "visitor", "speaker", "host", "caller", "partner", "person"),
    "city": ("city", "town", "location", "site", "venue", "area", "office", "place"),
    "date": ("date", "when", "due", "deadline", "calendar", "on"),
    "hour": ("hour", "clock", "start", "at", "begin"),
    "matter": ("subject", "about", "matter", "item", "reason", "title"),
    "amount": ("amount", "sum", "cost", "price", "euros"),
    "code": ("code", "file", "reference", "case"),
}

# the slots of the task's sentences
SENTENCE_SLOTS = {"person": "who", "city": "where", "date": "day", "hour": "time", "matter": "topic"}

CLAUSES = {
    "person": (
        "with {}",
        "meet {}",
        "ask {}",
        "call {}",
        "{} called",
        "{} comes",
        "{} wants to talk",
        "see {}",
        "by {}",
    ),
    "city": ("in {}", "to {}", "from {}", "near {}", "at the {} office", "we go to {}", "{}"),
    "date": ("on {}", "{}", "by {}", "until {}", "due on {}"),
    "hour": ("at {}", "before {}", "from {}", "around {}", "{}"),
    "matter": (
        "about the {}",
        "for the {}",
        "to discuss the {}",
        "topic {}",
        "the {} is late",
        "the {}",
        "plan the {}",
    ),
    "amount": ("for {} euros", "costs {} euros", "{} euros", "budget {}"),
    "code": ("file {}", "reference {}", "see case {}", "code {}"),
}

OPENINGS = (
    "Meeting",
    "Lunch",
    "Reminder",
    "Call",
    "Visit",
    "Note",
    "Don't forget",
    "Today",
    "Dinner",
    "Trip",
    "New",
    "Task",
)
FILLERS = (
    "Bring the slides.",
    "We need a room.",
    "Take the train.",
    "It is late.",
    "Please confirm.",
    "Ask for coffee.",
    "They have news.",
    "The room is small.",
    "Pick up the key.",
    "I will drive.",
)

FORMATS: dict[str, Callable[[dict[str, str]], str]] = {
    "json": json.dumps,
    "compact": lambda record: json.dumps(record, separators=(",", ":")),
    "lines": lambda record: "\n".join(f"{key}: {value}" for key, value in record.items()),
    "pairs": lambda record: "; ".join(f"{key}={value}" for key, value in record.items()),
    "xml": lambda record: "".join(f"<{key}>{value}</{key}>" for key, value in record.items()),
    "arrows": lambda record: " | ".join(f"{key} -> {value}" for key, value in record.items()),
    "lisp": lambda record: " ".join(f'({key} "{value}")' for key, value in record.items()),
    "brackets": lambda record: "\n".join(f"[{key}] {value}" for key, value in record.items()),
    "words": lambda record: ", ".join(f"{key} is {value}" for key, value in record.items()),
    "call": lambda record: f"note({', '.join(f'{key}={value!r}' for key, value in record.items())})",
}


def _fields(values: Values) -> dict[str, str]:
    return {
        "person": values.person() if values.rng.random() < 0.7 else values.first_name(),
        "city": values.city(),
        "date": values.date() if values.rng.random() < 0.8 else values.weekday(),
        "hour": values.time(),
        "matter": values.topic(),
        "amount": values.number(20, 10_000),
        "code": values.code(),
    }


def _write_note(values: Values, fields: dict[str, str]) -> str:
    """The fields in random order, as clauses of one or two sentences."""
    rng = values.rng
    clauses = [rng.choice(CLAUSES[kind]).format(fields[kind]) for kind in rng.sample(sorted(fields), len(fields))]
    if rng.random() < 0.5:
        clauses[0] = f"{rng.choice(OPENINGS)}{rng.choice((' ', ' ', ': '))}{clauses[0]}"
    text = ""
    for index, clause in enumerate(clauses):
        text += ("" if index == 0 else rng.choice((" ", " ", " ", ", ", ", ", ". ", ": "))) + clause
    if rng.random() < 0.15:
        text = f"{text}. {rng.choice(FILLERS)}"
    elif rng.random() < 0.8:
        text += "."
    return text


def _choose_kinds(values: Values, count: int) -> list[str]:
    """Kinds of fields; the five that any diary holds come more often."""
    everyday = ["person", "city", "date", "hour", "matter"]
    pool = everyday if values.rng.random() < 0.6 else sorted(KEYS)
    return values.rng.sample(pool, min(count, len(pool)))


def note_to_record(values: Values) -> Turns:
    """Notes to records; format and keys are named in the first prompt and stay for the conversation."""
    rng = values.rng
    kinds = _choose_kinds(values, rng.choice((2, 3, 3, 4, 5, 5)))
    in_sentence = rng.random() < 0.5
    if in_sentence:
        kinds = rng.sample(sorted(SENTENCE_SLOTS), rng.choice((2, 3, 4, 5, 5)))
    keys = {kind: rng.choice(KEYS[kind]) for kind in kinds}
    format_name = rng.choice(sorted(FORMATS))
    turns = []
    for index in range(rng.randint(1, 3)):
        fields = _fields(values)
        if in_sentence:
            note = rng.choice(NOTE_SENTENCES).format(**{slot: fields[kind] for kind, slot in SENTENCE_SLOTS.items()})
        else:
            note = _write_note(values, {kind: value for kind, value in fields.items() if kind in kinds})
        if index == 0:
            wish = f"{format_name}: {', '.join(keys[kind] for kind in kinds)}"
            note = rng.choice((f"{note}\n{wish}", f"{wish}\n{note}"))
        turns.append((note, FORMATS[format_name]({keys[kind]: fields[kind] for kind in kinds})))
    return turns


QUESTIONS = {
    "person": ("Who?", "Which person?", "What is the name?"),
    "city": ("Which city?", "In which town?", "What place?"),
    "date": ("Which date?", "When?", "What date?"),
    "hour": ("What hour?", "At what time?", "How late?"),
    "matter": ("About what?", "Which matter?", "What is it about?"),
    "amount": ("How much?", "What does it cost?", "How many euros?"),
    "code": ("Which code?", "Which file?", "What reference?"),
}


def note_questions(values: Values) -> Turns:
    """Questions about one note, or about two that a name or another value tells apart."""
    rng = values.rng
    kinds = _choose_kinds(values, rng.choice((2, 3, 4)))
    notes = [
        {kind: value for kind, value in _fields(values).items() if kind in kinds} for _ in range(rng.choice((1, 1, 2)))
    ]
    text = "\n".join(_write_note(values, fields) for fields in notes)
    turns = []
    for _ in range(rng.randint(1, 4)):
        fields = rng.choice(notes)
        asked, given = rng.sample(kinds, 2)
        question = rng.choice(QUESTIONS[asked])
        if len(notes) > 1:
            if notes[0][given] == notes[1][given]:
                continue
            question = f"{fields[given]}: {question}"
        turns.append((question, fields[asked]))
    if not turns:
        return note_questions(values)
    question, answer = turns[0]
    return [(f"{text}\n{question}", answer), *turns[1:]]
