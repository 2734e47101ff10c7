"""Which rows an audit of leaks looks at: those that an adapter learned, and those that it didn't.

Rows are encoded as the adapter learned them. Training sets validation rows aside where there is no file of them, by the
seed and the number of examples alone, so the same rows are found again and count as held out. Planted rows are neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlx_lora.data.canaries import Planting, read_record
from mlx_lora.data.encode import Encoded, Encoder
from mlx_lora.data.fit import encode_file
from mlx_lora.data.prepare import OnFile, set_aside
from mlx_lora.data.read import HINT, sha256
from mlx_lora.data.rows import Chosen, Row, RowFile
from mlx_lora.data.splits import find_splits
from mlx_lora.errors import DataError, Problem
from mlx_lora.store.manifest import Manifest


@dataclass
class Part:
    """Rows of `file`, each with the number of its example there, from 0 as read."""

    file: Path
    rows: Sequence[Row]
    numbers: np.ndarray

    def only(self, places: np.ndarray) -> Part:
        """The rows at `places`."""
        return Part(self.file, [self.rows[int(place)] for place in places], self.numbers[places])

    def spaced(self, most: int) -> Part:
        """At most so many of the rows, evenly spaced."""
        count = min(most, len(self.rows))
        return self.only(np.linspace(0, max(len(self.rows) - 1, 0), count).round().astype(int))


@dataclass
class Gathered:
    """`members` are training rows, `others` held-out ones; `planting` says what was planted among the former."""

    sha256: str
    members: Part
    others: Part
    planting: Planting | None = None
    notes: list[str] = field(default_factory=list)


def gather(
    data: str, held_out: str | None, encoder: Encoder, manifest: Manifest, *, most: int, progress: OnFile
) -> Gathered:
    """The rows of a path's train file, and held-out rows: those of the file `held_out`, else of the path's test or
    valid file, else those that training set aside. At most `most` of each. Raises DataError for faulty rows."""
    splits = find_splits(data)
    file = splits.get("train") or next(iter(splits.values()))
    digest = sha256(file)
    whole = _encoded(file, encoder, progress)
    members, aside = _sides(whole, manifest, digest)
    found = Gathered(digest, members, aside, read_record(file))
    known = [entry.get("sha256") for entry in manifest.data]
    if known and digest not in known:
        found.notes.append(f"{file.name} is not a file that the adapter was trained on, or it has changed since")
    if found.planting:
        if found.planting.sha256 != digest:
            found.notes.append(f"{file.name} has changed since canaries were planted in it")
        planted = sorted(found.planting.planted())
        found.members = members.only(np.flatnonzero(~np.isin(members.numbers, planted)))
    others = find_splits(held_out) if held_out else {name: path for name, path in splits.items() if path != file}
    other = next((others[name] for name in ("test", "valid", "train") if name in others), None)
    if other is not None:
        found.others = _unseen(_encoded(other, encoder, progress), whole, found.notes)
    found.members, found.others = found.members.spaced(most), found.others.spaced(most)
    if not found.members.rows:
        raise DataError([Problem(str(file), 0, "no training row is left to look at")])
    if not found.others.rows:
        found.notes.append("there are no held-out rows to compare with: --held-out FILE names some")
    return found


def _sides(whole: Part, manifest: Manifest, digest: str) -> tuple[Part, Part]:
    """The rows of a file that were learned, and those that training set aside for validation."""
    recipe = manifest.recipe or {}
    trained = next((entry for entry in manifest.data if entry.get("sha256") == digest), None)
    fraction = float((recipe.get("data") or {}).get("valid_fraction") or 0)
    if trained is None or len(manifest.data) > 1 or not isinstance(whole.rows, RowFile):
        return whole, whole.only(np.array([], int))
    places = []
    for side in set_aside(whole.rows, fraction, int(recipe.get("seed") or 0)):
        places.append(side.numbers if isinstance(side, Chosen) else np.arange(len(side)))
    return whole.only(places[0]), whole.only(places[1])


def _encoded(file: Path, encoder: Encoder, progress: OnFile) -> Part:
    """Every row of a file. Raises DataError listing every fault."""
    numbers: list[int] = []
    read = 0
    advance = progress(f"reading {file.name}", None)

    def count() -> None:
        nonlocal read
        read += 1
        advance()

    def take(line: int, one: Encoded) -> None:
        numbers.append(read - 1)

    encoded = encode_file(file, encoder, count, take)
    if encoded.problems:
        raise DataError(encoded.problems, hint=HINT)
    if not encoded.rows:
        raise DataError([Problem(str(file), 0, "no row is left to look at")])
    return Part(file, encoded.rows, np.array(numbers)[encoded.rows.groups])


def _unseen(others: Part, whole: Part, notes: list[str]) -> Part:
    """The rows of `others` that aren't in the training file too."""
    seen = {row.tokens.tobytes() for row in whole.rows}
    new = [place for place, row in enumerate(others.rows) if row.tokens.tobytes() not in seen]
    if repeated := len(others.rows) - len(new):
        notes.append(f"{repeated} held-out rows are in {whole.file.name} too, and were left out")
    return others.only(np.array(new, int))
