"""A message that asks for a repair -> a JSON object of five fields, null where one isn't said. Format: completions."""

# A table has one row in a line, however long it is.
# ruff: noqa: E501

import json
import random

from ..words import WEEKDAYS, Values

THINGS: dict[str, tuple[str, ...]] = {
    "train": ("boiler", "window", "lift", "front door", "tap", "oven", "gutter", "doorbell", "radiator", "shower", "lamp",
              "fence", "dishwasher", "blind", "fan", "sink", "garage door", "socket"),
    "test": ("washing machine", "chimney", "intercom", "toilet", "freezer", "skylight", "handrail", "water heater"),
}  # fmt: skip
FAULTS: dict[str, tuple[str, ...]] = {
    "train": ("leaks", "makes a noise", "won't open", "is stuck", "smells", "is loose", "drips", "went dead", "sparks"),
    "test": ("rattles", "won't close", "is cracked", "turns itself off", "is blocked"),
}
SAID: dict[str, tuple[str, ...]] = {
    "train": (
        "Hello, this is {who}. The {thing} {fault}.{flat}{day}{phone}",
        "The {thing} {fault}. My name is {who}.{flat}{phone}{day}",
        "{who} here. Our {thing} {fault}, please send somebody.{day}{flat}{phone}",
        "Please help, the {thing} {fault} since yesterday.{flat}{phone}{day} Regards, {who}",
        "Good morning, our {thing} {fault}.{phone}{flat}{day} Thank you, {who}",
        "I am {who}.{flat} Since last night the {thing} {fault}.{day}{phone}",
        "Could you look at the {thing}? It {fault}.{day}{phone}{flat} {who}",
    ),
    "test": (
        "Dear caretaker, the {thing} in our place {fault}.{flat}{day}{phone} Yours, {who}",
        "{who} speaking: something is wrong, the {thing} {fault}.{phone}{day}{flat}",
        "It is the {thing} again, it {fault}.{day}{flat}{phone} With thanks, {who}",
    ),
}
FLATS: dict[str, tuple[str, ...]] = {
    "train": (" We live in flat {}.", " It is flat {}.", " Flat {}."),
    "test": (" You find us in flat {}.", " Flat {}."),
}
DAYS: dict[str, tuple[str, ...]] = {
    "train": (" {} would suit us.", " Please come on {}.", " I am at home on {}."),
    "test": (" {} is the best day for us.", " Please come on {}."),
}
PHONES: dict[str, tuple[str, ...]] = {
    "train": (" Call {}.", " My number is {}.", " Phone: {}."),
    "test": (" You reach me at {}.", " Phone: {}."),
}


def row(rng: random.Random, split: str) -> dict:
    """One row: what somebody wrote, and the record."""
    values = Values(rng, split, real=1.0)
    thing, fault = rng.choice(THINGS[split]), rng.choice(FAULTS[split])
    flat = values.number(1, 90) if rng.random() < 0.75 else None
    day = rng.choice(WEEKDAYS) if rng.random() < 0.7 else None
    phone = f"0{values.number(100, 1000)} {values.number(1000, 10_000)}" if rng.random() < 0.6 else None
    who = values.person()
    text = rng.choice(SAID[split]).format(
        who=who,
        thing=thing,
        fault=fault,
        flat=rng.choice(FLATS[split]).format(flat) if flat else "",
        day=rng.choice(DAYS[split]).format(day) if day else "",
        phone=rng.choice(PHONES[split]).format(phone) if phone else "",
    )
    record = {"name": who, "flat": flat and int(flat), "object": thing, "day": day, "phone": phone}
    return {"prompt": text, "completion": json.dumps(record)}
