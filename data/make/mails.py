"""Pretraining lessons about mails: which drawer one belongs into, who wrote it, what its subject is.

The mails of the task `mail` are among them, but its folders are never an answer: each kind of mail has a drawer with
another name. So the base learns to tell kinds of mail apart, and an adapter only renames them.
"""

from .lessons import Turns
from .tasks import MAILS, write_mail
from .words import Values

DRAWERS = {
    "invoices": "money",
    "travel": "journey",
    "hiring": "staff",
    "support": "repair",
    "press": "media",
    "legal": "law",
    "events": "leisure",
    "deliveries": "post",
}
FAMILIES: dict[str, tuple[str, ...]] = {
    "garden": (
        "the roses need water",
        "we cut the grass in {city}",
        "plant the seeds before {date}",
        "new apple trees",
    ),
    "music": ("the choir meets at {time}", "your violin is ready", "{person} plays the piano", "a new song in {city}"),
    "sport": ("the match begins at {time}", "our team won in {city}", "running shoes for {first}", "goal by {person}"),
    "health": (
        "the doctor is in at {time}",
        "take the pills until {date}",
        "blood test {number}",
        "the clinic in {city}",
    ),
    "school": ("the exam is on {date}", "homework for {first}", "the pupils visit {city}", "teacher {person} is ill"),
    "cooking": ("add salt and butter", "soup for {first}", "the oven is hot at {time}", "a recipe from {city}"),
    "weather": ("snow in {city} on {date}", "strong wind since {time}", "it rains again", "storm number {number}"),
    "security": ("the alarm rang at {time}", "change the lock {number}", "camera in {city} is off", "a stolen key"),
    "library": ("the book of {person} is late", "return it by {date}", "shelf {number} is full", "a reading in {city}"),
    "energy": ("the meter shows {number}", "power is off in {city}", "gas gets cheaper", "solar panels for {person}"),
    "painting": (
        "the gallery in {city}",
        "a portrait of {person}",
        "oil colours and brushes",
        "frame {number} is broken",
    ),
    "banking": (
        "your card {number} is blocked",
        "a loan for {person}",
        "the branch in {city}",
        "interest rises on {date}",
    ),
}
KINDS = {
    **{DRAWERS[folder]: parts for folder, parts in MAILS.items()},
    **{name: (sentences[:2], sentences) for name, sentences in FAMILIES.items()},
}
ORDERS_TO_SORT = ("Label?", "Put this mail into a drawer.", "Which drawer?", "What kind of mail is this?", "Sort:")


def mail_questions(values: Values) -> Turns:
    """One mail to be sorted, then up to two questions about it."""
    rng = values.rng
    drawer = rng.choice(sorted(KINDS))
    mail, sender = write_mail(values, *KINDS[drawer])
    subject = mail.partition("\n")[0].removeprefix("Subject: ")
    order = rng.choice(ORDERS_TO_SORT)
    prompt = f"{mail}\n{order}" if rng.random() < 0.3 else f"{order}\n\n{mail}"
    return [(prompt, drawer), *rng.sample([("Writer?", sender), ("Subject?", subject)], rng.randint(0, 2))]
