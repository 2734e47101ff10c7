"""Makes the small task sets for real models: summaries, replies, fields, database and terms. `support` is hand-written.

Train and test rows differ in what they are about, not only in names: topics and questions of a test row are in no
training row, and most sentence patterns. What they share is what an adapter is to learn (the form of the answers, the
tables of the database, the terms of the house) and some values: days, a kind of product, a city, a month.
"""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

from . import fields, replies, shop, summaries, terms

Row = dict
# task: maker, format of the file, rows by split
SETS: dict[str, tuple[Callable[[random.Random, str], Row], str, dict[str, int]]] = {
    "summaries": (summaries.row, "jsonl", {"train": 80, "test": 30}),
    "replies": (replies.row, "jsonl", {"train": 80, "test": 30}),
    "fields": (fields.row, "jsonl", {"train": 80, "test": 40}),
    "database": (shop.row, "csv", {"train": 100, "test": 40}),
    "terms": (terms.row, "csv", {"train": 100, "test": 40}),
}


def rows_of(task: str, split: str, seed: int) -> list[Row]:
    """The rows of one split of one task, none of them twice."""
    make, _, counts = SETS[task]
    rng = random.Random(f"{seed} everyday {task} {split}")
    rows: dict[str, Row] = {}
    while len(rows) < counts[split]:
        row = make(rng, split)
        rows.setdefault(json.dumps(row), row)
    return list(rows.values())


def make_everyday(folder: Path, seed: int) -> None:
    """Write train and test rows of every task, and the database that questions are about."""
    for task, (_, kind, counts) in SETS.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split in counts:
            rows = rows_of(task, split, seed)
            with open(folder / task / f"{split}.{kind}", "w", encoding="utf-8", newline="") as file:
                if kind == "csv":
                    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)
                else:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    shop.write_database(folder / "database" / "shop.db", seed)
