"""Makes the three task sets: notes to JSON records, mails to folders, questions to SQL.

Each set has its own file format (messages, alpaca, completions), so that the three together exercise three readers.
Sentences, topic words, months and labels are shared by train, valid and test; names and numbers never are.
"""

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .questions import PATTERNS, Ask, Table, draw_question
from .words import COMMON_WORDS, Values

ROWS = {"train": 1200, "valid": 100, "test": 100}
REAL_NAMES = {"train": 0.35, "valid": 0.5, "test": 0.5}

NOTE_SENTENCES = (
    "Meeting with {who} in {where} on {day} at {time} about the {topic}.",
    "Call {who} on {day} at {time}, the {topic} in {where} is late.",
    "{who} comes to {where} on {day}. We talk about the {topic} at {time}.",
    "On {day} I see {who} in {where} at {time}, topic: {topic}.",
    "New {topic} with {who}, {where}, {day}, {time}.",
    "Don't forget: {day}, {time}, {who} shows us the {topic} in {where}.",
    "In {where} at {time} on {day}: {who} wants to discuss the {topic}.",
    "{who} asked about the {topic}. We meet in {where} on {day} at {time}.",
    "At {time} on {day} take the train to {where}, {who} has news about the {topic}.",
    "Lunch in {where} with {who} to plan the {topic}, {day} at {time}.",
    "The {topic} is due on {day}. Ask {who} in {where} before {time}.",
    "{day}: pick up {who} in {where} at {time}, then go through the {topic}.",
)

# kind of mail: subjects, sentences
MAILS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "invoices": (
        ("Invoice {number}", "Payment of {number} euros", "Reminder for bill {number}"),
        (
            "please find the invoice attached.",
            "the bill of {number} euros is still open.",
            "could you pay us by {date}?",
            "we have not received your payment yet.",
        ),
    ),
    "travel": (
        ("Flight to {city}", "Hotel in {city}", "Your trip on {date}"),
        (
            "the hotel in {city} is booked.",
            "your flight leaves at {time}.",
            "the train to {city} was cancelled.",
            "please send me your passport for the trip.",
        ),
    ),
    "hiring": (
        ("Application of {person}", "Interview on {date}", "Open position in {city}"),
        (
            "I would like to apply for the open position.",
            "the interview with {person} is at {time}.",
            "her references are very good.",
            "three candidates are left for the job.",
        ),
    ),
    "support": (
        ("Ticket {number}", "Password problem", "Error {number} after the update"),
        (
            "I cannot log in since {date}.",
            "the app shows error {number}.",
            "my screen stays black after the update.",
            "please reset my password.",
        ),
    ),
    "press": (
        ("Interview request", "Article about {city}", "Question from a journalist"),
        (
            "I write for a newspaper in {city}.",
            "our readers would like a quote from {person}.",
            "the article appears on {date}.",
            "may our photographer visit you?",
        ),
    ),
    "legal": (
        ("Contract {number}", "Letter from our lawyer", "Signature needed"),
        (
            "our lawyer has read the agreement.",
            "clause {number} must be changed.",
            "please sign both copies by {date}.",
            "the court in {city} has decided.",
        ),
    ),
    "events": (
        ("Party on {date}", "Invitation to {city}", "Concert with {person}"),
        (
            "you are invited to our party.",
            "the concert begins at {time}.",
            "bring your family and a cake.",
            "we celebrate the birthday of {person}.",
        ),
    ),
    "deliveries": (
        ("Parcel {number}", "Your order is on its way", "Shipment to {city}"),
        (
            "the parcel arrives on {date}.",
            "the driver could not find your door.",
            "the shipment from {city} was damaged.",
            "track your package with the code {number}.",
        ),
    ),
}
FOLDERS = ("invoices", "travel", "hiring", "support", "events")  # the task sorts these; pretraining knows all kinds
GREETINGS = ("Hello,", "Dear team,", "Hi,", "Good morning,", "Dear {first},")
CLOSINGS = ("Best, {sender}", "Thanks, {sender}", "Kind regards, {sender}", "{sender}")
MAIL_INSTRUCTION = "Sort this mail into a folder."

ORDERS = Table("orders", "customer", "city", "amount")
SQL_COLUMNS = {
    "count": "COUNT(*)",
    "sum": "SUM({})",
    "mean": "AVG({})",
    "top": "MAX({})",
    "rows": "*",
    "names": "DISTINCT {}",
    "newest": "*",
}


def write_sql(ask: Ask) -> str:
    """The meaning of a question as one SQL query."""
    tests = " AND ".join(f"{c.column} {c.sign} {c.quoted(chr(39))}" for c in ask.conditions)
    query = f"SELECT {SQL_COLUMNS[ask.action].format(ask.column)} FROM {ask.table.name} WHERE {tests}"
    return f"{query} ORDER BY date DESC LIMIT {ask.few};" if ask.action == "newest" else f"{query};"


def known_words() -> list[str]:
    """Every word that the tasks' sentences, labels and queries are made of, and the common words; no names."""
    sentences = [*NOTE_SENTENCES, MAIL_INSTRUCTION, *GREETINGS, *CLOSINGS, *COMMON_WORDS, *MAILS]
    for subjects, bodies in MAILS.values():
        sentences += [*subjects, *bodies, *(body.capitalize() for body in bodies)]
    sentences += [wording for wordings, *_ in PATTERNS for wording in wordings]
    sentences += [*SQL_COLUMNS.values(), *ORDERS, "SELECT FROM WHERE AND ORDER BY date DESC LIMIT"]
    return sorted(set(re.findall(r"[A-Za-z]+", " ".join(sentences))))


def note_row(values: Values) -> dict:
    """One chat row: a note of one or two sentences, answered with a JSON record of five fields."""
    record = {
        "who": values.person(),
        "where": values.city(),
        "day": values.date(),
        "time": values.time(),
        "topic": values.topic(),
    }
    return {
        "messages": [
            {"role": "user", "content": values.rng.choice(NOTE_SENTENCES).format(**record)},
            {"role": "assistant", "content": json.dumps(record)},
        ]
    }


def write_mail(values: Values, subjects: Sequence[str], sentences: Sequence[str]) -> tuple[str, str]:
    """A mail of subject, greeting, two sentences and sender; return it with the sender's name."""
    sender = values.person()
    body = " ".join(text[0].upper() + text[1:] for text in values.rng.sample(sentences, 2))
    subject = values.rng.choice(subjects)
    lines = (f"Subject: {subject}", values.rng.choice(GREETINGS), body, values.rng.choice(CLOSINGS))
    mail = "\n".join(lines).format(
        sender=sender,
        person=values.person(),
        first=values.first_name(),
        city=values.city(),
        number=values.number(100, 10_000),
        date=values.date(),
        time=values.time(),
    )
    return mail, sender


def mail_row(values: Values, kinds: Iterable[str] = FOLDERS) -> dict:
    """One alpaca row: a mail of one of the kinds, answered with its name, the folder."""
    folder = values.rng.choice(sorted(kinds))
    mail, _ = write_mail(values, *MAILS[folder])
    return {"instruction": MAIL_INSTRUCTION, "input": mail, "output": folder}


def sql_row(values: Values) -> dict:
    """One completion row: a question about the table `orders`, answered with a query."""
    question, ask = draw_question(values, ORDERS)
    return {"prompt": question, "completion": write_sql(ask)}


ROW_MAKERS: dict[str, Callable[[Values], dict]] = {"notes": note_row, "mail": mail_row, "sql": sql_row}


def make_rows(task: str, split: str, seed: int, make_row: Callable[[Values], dict] | None = None) -> list[dict]:
    """The rows of one split of one task, none of them twice."""
    values = Values(random.Random(f"{seed} {task} {split}"), split, REAL_NAMES[split])
    rows: dict[str, dict] = {}
    while len(rows) < ROWS[split]:
        row = (make_row or ROW_MAKERS[task])(values)
        rows.setdefault(json.dumps(row), row)
    return list(rows.values())


def make_tasks(folder: Path, seed: int) -> None:
    """Write `<task>/<split>.jsonl` for every task and split."""
    for task in ROW_MAKERS:
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split in ROWS:
            text = "".join(json.dumps(row) + "\n" for row in make_rows(task, split, seed))
            (folder / task / f"{split}.jsonl").write_text(text, encoding="utf-8")
