"""Notes of a meeting -> two lines: what was decided, and who does what by when. Format: messages."""

# A table has one row in a line, however long it is.
# ruff: noqa: E501

import random

from ..words import FIRST_NAMES, WEEKDAYS, split_of

# subject: (what was said, the decision in a sentence, the decision in short, the task in a sentence, the task in short)
TOPICS: dict[str, tuple[tuple[str, str, str, str, str], ...]] = {
    "train": (
        ("the kitchen", "we will replace the old fridge", "replace the fridge", "compare three models", "compare fridges"),
        ("the newsletter", "it comes out once a month from now on", "newsletter monthly", "write the first issue", "first issue"),
        ("parking", "the two spaces at the door stay free for visitors", "door spaces for visitors", "put up a sign", "sign"),
        ("the summer party", "we hold it in the garden, not in the hall", "party in the garden", "ask for tents", "tents"),
        ("the printer", "we lease one instead of buying it", "lease a printer", "get two offers", "two offers"),
        ("opening hours", "we close at six on Fridays", "close at 18:00 on Fridays", "change the website", "website"),
        ("the budget", "travel gets a tenth less than last year", "travel budget -10 %", "send the new table round", "new table"),
        ("the interns", "each of them has a mentor", "a mentor for each intern", "make a list of mentors", "list of mentors"),
        ("the broken heating", "we call the firm from the next street", "call the firm next door", "let the plumber in", "let plumber in"),
        ("the catalogue", "we print it on recycled paper", "catalogue on recycled paper", "order samples", "order samples"),
        ("software", "everybody moves to the new calendar", "move to the new calendar", "write a short guide", "short guide"),
        ("cleaning", "the stairs are cleaned twice a week", "stairs twice a week", "tell the cleaning firm", "tell cleaners"),
        ("the trade fair", "we take a small stand this year", "small stand at the fair", "book the stand", "book stand"),
        ("complaints", "every complaint is answered within two days", "answer complaints in 2 days", "draft a reply", "draft reply"),
        ("keys", "lost keys must be reported at once", "report lost keys at once", "count all keys", "count keys"),
        ("the library", "books may be kept for six weeks", "loans of six weeks", "print new cards", "new cards"),
        ("the bicycle shed", "it gets a second lock", "second lock for the shed", "buy the lock", "buy lock"),
        ("training", "first aid is repeated every year", "first aid every year", "find a date for the course", "course date"),
        ("the logo", "we keep the old colours", "keep the old colours", "ask the designer for two drafts", "two drafts"),
        ("suppliers", "we order flour from the mill in the valley", "flour from the valley mill", "sign the contract", "sign contract"),
        ("the phone system", "calls after five go to the mailbox", "calls after 17:00 to mailbox", "record the greeting", "greeting"),
        ("the roof", "it is repaired before winter", "repair roof before winter", "ask the insurance", "ask insurance"),
    ),
    "test": (
        ("the garden", "we plant three apple trees", "plant 3 apple trees", "buy the trees", "buy trees"),
        ("the van", "we sell it and rent one when we need it", "sell the van, rent instead", "write the advert", "advert"),
        ("the coffee machine", "everybody pays five euros a month", "5 euros a month for coffee", "collect the money", "collect money"),
        ("the exhibition", "it opens one week later", "exhibition one week later", "tell the artists", "tell artists"),
        ("passwords", "they are changed twice a year", "change passwords twice a year", "send a reminder", "reminder"),
        ("the playground", "the old swing comes down", "take the old swing down", "call the town hall", "call town hall"),
        ("the choir", "rehearsals move to the school", "rehearse at the school", "ask for the room", "ask for room"),
        ("packaging", "we stop using plastic film", "no more plastic film", "find paper bags", "paper bags"),
        ("the archive", "letters are kept for ten years", "keep letters 10 years", "label the boxes", "label boxes"),
        ("lighting", "the hall gets lamps that switch themselves off", "self-switching lamps in hall", "measure the hall", "measure hall"),
    ),
}  # fmt: skip
OPENINGS = ("Today we talked about {subject}.", "First point: {subject}.", "Long talk about {subject} this morning.",
            "We met because of {subject}.", "Once more {subject} was on the list.")  # fmt: skip
CHATTER = ("It was warm in the room.", "{other} came ten minutes late.", "{other} was against it at first.", "Nobody had read the papers.",
           "We had this last year as well.", "The coffee was cold again.", "{other} told a long story about it.", "There were seven of us.",
           "We looked at photos for a while.", "{other} took the minutes.", "It took longer than planned.")  # fmt: skip
DECISIONS = (
    "In the end {decision}.",
    "We agreed that {decision}.",
    "So {decision}.",
    "Everybody is fine with it: {decision}.",
)
TASKS = ("{who} will {task} by {day}.", "By {day} {who} is to {task}.", "{who} promised to {task}, {day} at the latest.",
         "Until {day} {who} has time to {task}.")  # fmt: skip
ASK = "Summarise my notes."


def row(rng: random.Random, split: str) -> dict:
    """One conversation: notes of four to six sentences, and two lines."""
    subject, decision, short, task, short_task = rng.choice(TOPICS[split])
    names = [name for name in FIRST_NAMES if split_of(name) == split]
    who, other, another = rng.sample(names, 3)
    day = rng.choice(WEEKDAYS)
    said = [rng.choice(OPENINGS).format(subject=subject), *rng.sample(CHATTER, rng.randint(1, 3))]
    said.append(rng.choice(DECISIONS).format(decision=decision))
    ending = [rng.choice(TASKS).format(who=who, task=task, day=day), *rng.sample(CHATTER, rng.randint(0, 1))]
    rng.shuffle(ending)
    notes = " ".join(dict.fromkeys([*said, *ending])).format(other=rng.choice([other, another]))
    summary = f"Decided: {short}\nTo do: {who}, {short_task}, {day}"
    return {"messages": [{"role": "user", "content": f"{ASK}\n\n{notes}"}, {"role": "assistant", "content": summary}]}
