"""The pretraining corpus: an endless, seeded stream of short conversations from the lessons.

A curriculum of one step: in the first part of training every conversation is a list that comes twice. Copying, on which
every other lesson builds, appears there within 300 steps; with all lessons mixed it had not appeared after 1400. All
names and numbers come from the split `train`.

The words of the tasks, SQL's among them, come as single words to copy. Without that all words never seen end up with
nearly one embedding (cosine 0.99), and an adapter of the attention alone could not tell them apart.
"""

import random
from collections.abc import Iterator

from .lessons import Turns, copying, repeated_list, table
from .mails import mail_questions
from .notes import note_questions, note_to_record
from .queries import question_to_query
from .tasks import known_words
from .words import Values

LESSONS = {
    note_to_record: 26,
    copying: 20,
    note_questions: 12,
    question_to_query: 19,
    mail_questions: 13,
    table: 6,
    repeated_list: 4,
}
SYSTEM_SHARE = 0.05  # of the conversations that open with a system turn
SYSTEM_TEXTS = ("You are a helpful assistant.", "Answer briefly.", "You copy names exactly.", "Be precise.")

Message = dict[str, str]


def conversation(values: Values, first_part: bool) -> list[Message]:
    """One conversation of one to four turns."""
    rng = values.rng
    lesson = repeated_list if first_part else rng.choices(list(LESSONS), list(LESSONS.values()))[0]
    turns: Turns = lesson(values)
    messages = [{"role": "system", "content": rng.choice(SYSTEM_TEXTS)}] if rng.random() < SYSTEM_SHARE else []
    for prompt, answer in turns:
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return messages


def conversations(seed: int, first_part: bool) -> Iterator[list[Message]]:
    """Conversations without end; the two parts of a seed are different streams."""
    values = Values(random.Random(f"{seed} corpus {first_part}"), "train", known=known_words())
    while True:
        yield conversation(values, first_part)
