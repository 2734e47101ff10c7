"""A sentence in common words -> the same sentence in the words of the house. Format: a table with input and output.

The house is a haulage firm that has its own word for twenty things. A test sentence has a pattern, or two terms
together, that no training sentence has.
"""

# A table has one row in a line, however long it is.
# ruff: noqa: E501

import random

from ..words import WEEKDAYS

PEOPLE = {
    "customer": "partner",
    "supplier": "feeder",
    "manager": "lead hand",
    "new employee": "sprout",
    "driver": "pilot",
}
THINGS = {"invoice": "white sheet", "contract": "long sheet", "complaint": "blue slip", "spare part": "twin", "parcel": "egg",
          "price list": "ladder", "delivery van": "runner"}  # fmt: skip
PLACES = {"warehouse": "barn", "loading dock": "mouth", "office": "bridge", "petrol station": "trough"}
STATES = {"delayed": "on amber", "broken": "off song", "urgent": "red-tag", "finished": "bedded"}
PATTERNS: dict[str, tuple[str, ...]] = {
    "train": (
        "The {person} is waiting in the {place}.",
        "Please send the {thing} to the {person}.",
        "The {thing} is {state}.",
        "Our {person} took the {thing} to the {place} on {day}.",
        "Is the {thing} still in the {place}?",
        "On {day} the {person} asked for the {thing}.",
        "The {person} says that the {thing} is {state}.",
        "Nobody has seen the {thing} since {day}.",
        "Put the {thing} next to the door of the {place}.",
        "I gave the {person} a new {thing}.",
        "Who is the {person} in the {place} today?",
        "Every {thing} that is {state} goes to the {place}.",
    ),
    "test": (
        "Tell the {person} to look for the {thing} in the {place}.",
        "If the {thing} is {state}, call the {person}.",
        "The {thing} from {day} was for another {person}.",
        "We keep each {thing} in the {place} until {day}.",
        "Has the {person} signed the {thing} yet?",
        "A {thing} was left at the {place}, and it is {state}.",
    ),
}


def row(rng: random.Random, split: str) -> dict:
    """One pair of sentences."""
    chosen = {
        "person": rng.choice(sorted(PEOPLE)), "thing": rng.choice(sorted(THINGS)), "place": rng.choice(sorted(PLACES)),
        "state": rng.choice(sorted(STATES)),
    }  # fmt: skip
    pattern, day = rng.choice(PATTERNS[split]), rng.choice(WEEKDAYS)
    house = {slot: (PEOPLE | THINGS | PLACES | STATES)[word] for slot, word in chosen.items()}
    return {"input": _filled(pattern, chosen, day), "output": _filled(pattern, house, day)}


def _filled(pattern: str, words: dict[str, str], day: str) -> str:
    """The pattern with its slots filled, and `an` where a word needs it."""
    text = pattern.format(**words, day=day)
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}").replace(f"A {vowel}", f"An {vowel}")
    return text
