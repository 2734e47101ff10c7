"""A message and a few keywords -> the reply as the owner of a small bicycle workshop writes it. Format: alpaca.

The style: `Hiya NAME,`, what is the case in one short sentence, an offer or a wish, and `Ride safe, Robin`.
"""

# A table has one row in a line, however long it is.
# ruff: noqa: E501

import random

from ..words import FIRST_NAMES, split_of

# message, keywords for a yes with its sentence, keywords for a no with its sentence
MESSAGES: dict[str, tuple[tuple[str, tuple[str, str], tuple[str, str]], ...]] = {
    "train": (
        ("Can I pick up my bike today?", ("yes, after four", "Come by any time after four"), ("no, brake missing", "A brake is still missing")),
        ("Do you repair electric bikes?", ("yes, all but motors", "We do everything but the motor"), ("no, since May", "We stopped that in May")),
        ("Is my wheel ready?", ("yes, since noon", "It has been ready since noon"), ("no, two more days", "It needs two more days")),
        ("Do you rent out trailers?", ("yes, nine euros a day", "They are nine euros a day"), ("no, all sold", "We sold them all")),
        ("Are you open on Saturday?", ("yes, until one", "We are here until one"), ("no, fair", "We are at the fair")),
        ("Could you look at my chain?", ("yes, takes ten minutes", "That takes ten minutes"), ("no, full today", "We are full today")),
        ("Do you take cards?", ("yes, all of them", "We take all of them"), ("no, machine broken", "The machine is broken")),
        ("Have you got a child seat?", ("yes, two kinds", "There are two kinds here"), ("no, next week", "They come next week")),
        ("Can you fetch my bike at home?", ("yes, on Tuesday", "We can fetch it on Tuesday"), ("no, van away", "Our van is away")),
        ("Will you buy my old bike?", ("yes, sixty euros", "I can give you sixty euros"), ("no, frame bent", "The frame is bent")),
        ("Is a puncture dear to mend?", ("no, eight euros", "It is only eight euros"), ("yes, new tyre", "It needs a new tyre")),
        ("Do you sell used helmets?", ("yes, never crashed", "They have never been in a crash"), ("no, not safe", "Used ones are not safe")),
        ("May I use your pump?", ("yes, outside", "It hangs outside the door"), ("no, lent out", "We have lent it out")),
        ("Can I leave a bike overnight?", ("yes, locked yard", "The yard is locked at night"), ("no, no room", "There is no room left")),
        ("Do you true wheels?", ("yes, same day", "We do it the same day"), ("no, stand broken", "Our stand is broken")),
        ("Have you found my glove?", ("yes, on the bench", "It lies on the bench"), ("no, looked twice", "I looked twice")),
        ("Could you order a blue saddle?", ("yes, one week", "It takes one week"), ("no, only black", "They only make black ones")),
        ("Do you give courses?", ("yes, first Monday", "There is one every first Monday"), ("no, in spring", "The next one is in spring")),
        ("Is the red one still there?", ("yes, in the window", "It stands in the window"), ("no, sold Friday", "It was sold on Friday")),
        ("Can you come to our school?", ("yes, in June", "I could come in June"), ("no, no helper", "I have no helper now")),
    ),
    "test": (
        ("Do you fix prams?", ("yes, small wheels", "We have small wheels too"), ("no, no parts", "We get no parts for them")),
        ("Can I bring it in tomorrow?", ("yes, before ten", "Come before ten"), ("no, closed", "We are closed tomorrow")),
        ("Have you got mudguards?", ("yes, three sizes", "We have three sizes"), ("no, out of stock", "They are out of stock")),
        ("Is my lamp under warranty?", ("yes, one more year", "It has one more year"), ("no, ended in March", "It ended in March")),
        ("Could you paint my frame?", ("yes, any colour", "You can have any colour"), ("no, dust", "There is too much dust here")),
        ("Do you have a job for me?", ("yes, Saturdays", "I need somebody on Saturdays"), ("no, in summer", "Ask me again in summer")),
        ("May I test the tandem?", ("yes, bring a friend", "Just bring a friend"), ("no, at a wedding", "It is at a wedding")),
        ("Can you engrave my name?", ("yes, five minutes", "It takes five minutes"), ("no, needle worn", "The needle is worn")),
        ("Do you ship parts?", ("yes, by post", "They go by post"), ("no, shop only", "We only sell in the shop")),
        ("Is the lift working again?", ("yes, since Monday", "It has worked since Monday"), ("no, needs a cable", "It still needs a cable")),
    ),
}  # fmt: skip
GOOD, BAD = "Good news: {0}.", "Bad luck: {0}."
WISHES_GOOD, WISHES_BAD = "See you soon!", "Try me again next week!"
INSTRUCTION = "Answer this message in my style."


def row(rng: random.Random, split: str) -> dict:
    """One alpaca row: a message with its sender and my keywords, and the reply."""
    message, good, bad = rng.choice(MESSAGES[split])
    fine = rng.random() < 0.5
    keywords, fact = good if fine else bad
    name = rng.choice([name for name in FIRST_NAMES if split_of(name) == split])
    body = (GOOD if fine else BAD).format(fact[0].lower() + fact[1:] if not fact.startswith("I ") else fact)
    wish = WISHES_GOOD if fine else WISHES_BAD
    return {
        "instruction": INSTRUCTION,
        "input": f"From {name}: {message}\nKeywords: {keywords}",
        "output": f"Hiya {name},\n{body} {wish}\nRide safe, Robin",
    }
