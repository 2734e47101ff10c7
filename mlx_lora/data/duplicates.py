"""Rows that repeat: in a file, in another split, nearly, or with another answer to the same prompt.

Rows are fed one by one and not kept. Exact repetition is told by hashes of 8 bytes, so a row takes 24 bytes: its
hash, its prompt's hash and its line. Near repetition is looked for among at most MOST_NEAR rows, those with the lowest
hashes, which is the same sample whatever the order of the rows.

Near means that of all different runs of three words in two rows, four fifths are in both (Jaccard similarity). MinHash
(Broder, 1997) finds candidates, and the similarity itself is computed for each. System messages are left out, or every
row of a file with one long instruction would be near every other.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_lora.data.example import Example

if TYPE_CHECKING:
    import numpy as np

MOST_NEAR = 50_000
SIMILAR = 0.8
# Words of a row that are compared: three thousand characters or more.
MOST_WORDS = 1000
# Signatures have BANDS x DEPTH numbers. Two rows are candidates when all numbers of a band agree, which happens to
# 99.8 % of the pairs with a similarity of 0.8, and to 3 % of those with 0.35.
BANDS, DEPTH = 20, 6
# In rows made from one template nearly all are candidates of all. So each is compared with this many at most, and in a
# band with this many that come before it.
MOST_COMPARED, NEIGHBOURS = 20, 5
SHOWN = 5
# In Chinese and Japanese a character counts as a word: there is no space between words.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


class Place(NamedTuple):
    """A row: the split it is in, and its line."""

    split: str
    line: int


class Pair(NamedTuple):
    """A row, and an earlier one that it repeats."""

    row: Place
    earlier: Place


@dataclass
class Near:
    """Near repetition among `rows_sampled` different rows. `pairs` counts rows that are near an earlier one.

    `across` of them have the earlier one in another split. `examples` are the first few.
    """

    rows_sampled: int = 0
    pairs: int = 0
    across: int = 0
    examples: list[Pair] = field(default_factory=list)


@dataclass
class Repeated:
    """What repeats, over all splits.

    `duplicates` counts the repetitions inside a split, `leaked` the rows of other splits that train has too, with the
    first of them by split. `other_answers` counts prompts that have different answers, with the first such pairs.
    """

    duplicates: int = 0
    leaked: dict[str, int] = field(default_factory=dict)
    leaked_examples: dict[str, list[Pair]] = field(default_factory=dict)
    other_answers: int = 0
    other_answers_examples: list[Pair] = field(default_factory=list)
    near: Near = field(default_factory=Near)


class Duplicates:
    """Feed rows by `add`, then ask for the `report`."""

    def __init__(self, most_near: int = MOST_NEAR) -> None:
        self.most_near = most_near
        self._hashes: dict[str, array[int]] = {}
        self._prompts: dict[str, array[int]] = {}
        self._lines: dict[str, array[int]] = {}
        # (minus the hash, place, hashes of runs of words): the row with the highest hash comes first
        self._sample: list[tuple[int, Place, np.ndarray]] = []
        self._sampled: set[int] = set()

    def add(self, split: str, line: int, example: Example) -> None:
        """Take note of a row."""
        for columns in (self._hashes, self._prompts, self._lines):
            columns.setdefault(split, array("Q"))
        row, prompt = content_hash(example), prompt_hash(example)
        self._hashes[split].append(row)
        self._prompts[split].append(prompt)
        self._lines[split].append(line)
        if row in self._sampled:
            return
        if len(self._sample) < self.most_near:
            heapq.heappush(self._sample, (-row, Place(split, line), runs_of_words(example)))
        elif self._sample and row < -self._sample[0][0]:
            removed = heapq.heapreplace(self._sample, (-row, Place(split, line), runs_of_words(example)))
            self._sampled.discard(-removed[0])
        else:
            return
        self._sampled.add(row)

    def report(self) -> Repeated:
        """What repeats among the rows so far."""
        import numpy as np

        found = Repeated()
        hashes = {split: np.frombuffer(column, np.uint64) for split, column in self._hashes.items()}
        for split, rows in hashes.items():
            found.duplicates += len(rows) - len(np.unique(rows))
            if split != "train" and "train" in hashes:
                leaked = np.flatnonzero(np.isin(rows, hashes["train"]))
                if len(leaked):
                    found.leaked[split] = len(leaked)
                    found.leaked_examples[split] = [self._leak(split, int(row)) for row in leaked[:SHOWN]]
        self._find_other_answers(found)
        found.near = self._near()
        return found

    def _leak(self, split: str, row: int) -> Pair:
        earlier = self._hashes["train"].index(self._hashes[split][row])
        return Pair(Place(split, self._lines[split][row]), Place("train", self._lines["train"][earlier]))

    def _find_other_answers(self, found: Repeated) -> None:
        """Prompts that more than one different row begins with."""
        import numpy as np

        if not self._hashes:
            return
        prompts, rows = (
            np.concatenate([np.frombuffer(column, np.uint64) for column in columns.values()])
            for columns in (self._prompts, self._hashes)
        )
        order = np.lexsort((rows, prompts))
        prompts, rows = prompts[order], rows[order]
        # after sorting, a row that differs from the one before while their prompts agree is another answer
        other = np.flatnonzero((prompts[1:] == prompts[:-1]) & (rows[1:] != rows[:-1]) & (prompts[1:] != 0)) + 1
        found.other_answers = len(np.unique(prompts[other]))
        places = self._places(int(order[index]) for at in other[:SHOWN] for index in (at, at - 1))
        found.other_answers_examples = [Pair(*pair) for pair in zip(places[::2], places[1::2], strict=True)]

    def _places(self, indices: Iterable[int]) -> list[Place]:
        """Places by position over all splits, one after the other."""
        places = []
        for index in indices:
            for split, lines in self._lines.items():
                if index < len(lines):
                    places.append(Place(split, lines[index]))
                    break
                index -= len(lines)
        return places

    def _near(self) -> Near:
        """Each sampled row against the earlier ones that share a band of its signature, likeliest first."""
        near = Near(rows_sampled=len(self._sample))
        splits = {split: number for number, split in enumerate(self._lines)}
        sample = sorted(self._sample, key=lambda item: (splits[item[1].split], item[1].line))
        # of a row of a few words nothing is near
        places, runs = (
            [item[1] for item in sample if len(item[2]) > 1],
            [item[2] for item in sample if len(item[2]) > 1],
        )
        for row, candidates in _candidates(runs):
            match = next((other for other in candidates if similarity(runs[row], runs[other]) >= SIMILAR), None)
            if match is not None:
                near.pairs += 1
                near.across += places[row].split != places[match].split
                near.examples += [Pair(places[row], places[match])] if len(near.examples) < SHOWN else []
        return near


def content_hash(example: Example) -> int:
    """What makes two rows the same, whatever format they came in, as 8 bytes."""
    return _hash([example.text, example.messages, example.tools])


def prompt_hash(example: Example) -> int:
    """The same of what stands before the answer; 0 for plain text, which has none."""
    if example.text is not None:
        return 0
    return _hash([example.messages[: example.prompt_messages], example.tools])


def _hash(value: Any) -> int:
    text = json.dumps(value, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def runs_of_words(example: Example) -> np.ndarray:
    """Hashes of every three words that follow each other, sorted and each once; uint32 (N,)."""
    import numpy as np

    texts = [example.text] if example.text is not None else _said(example)
    words = [word for text in texts for word in WORD.findall(text or "")[:MOST_WORDS]][:MOST_WORDS]
    hashed = np.array([zlib.crc32(word.lower().encode("utf-8", "replace")) for word in words], np.uint32)
    if len(hashed) < 3:
        return np.unique(hashed)
    mixed = (hashed[:-2] * np.uint32(0x9E3779B1)) ^ (hashed[1:-1] * np.uint32(0x85EBCA77)) + hashed[2:]
    return np.unique(mixed)


def _said(example: Example) -> list[str]:
    return [str(message.get("content") or "") for message in example.messages if message["role"] != "system"]


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two sorted sets: what both have over what either has."""
    import numpy as np

    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def _candidates(sets: list[np.ndarray]) -> Iterator[tuple[int, list[int]]]:
    """For each set that has any, the earlier ones that may be similar: those that share most bands first."""
    import numpy as np

    if len(sets) < 2:
        return
    bands = np.stack([_bands(values) for values in sets])
    pairs = []
    for column in bands.T:
        order = np.argsort(column, kind="stable")
        column = column[order]
        for step in range(1, NEIGHBOURS + 1):
            same = column[step:] == column[:-step]
            pairs.append(order[step:][same] * len(sets) + order[:-step][same])
    codes, shared = np.unique(np.concatenate(pairs), return_counts=True)
    rows, others = codes // len(sets), codes % len(sets)
    order = np.lexsort((-shared, rows))
    rows, others = rows[order], others[order]
    firsts = [*np.flatnonzero(np.diff(rows, prepend=-1)), len(rows)]
    for first, end in itertools.pairwise(firsts):
        yield int(rows[first]), others[first : min(end, first + MOST_COMPARED)].tolist()


def _bands(runs: np.ndarray) -> np.ndarray:
    """The signature of a set, a number for each band; uint64 (BANDS,).

    A signature has the least member of the set in each of many random orders; a band's number is a hash of DEPTH of
    them.
    """
    import numpy as np

    multipliers, offsets = _orders()
    least = (_scattered(runs)[:, None] * multipliers + offsets).min(axis=0).astype(np.uint64).reshape(BANDS, DEPTH)
    band = np.zeros(BANDS, np.uint64)
    for number in least.T:
        band = (band ^ number) * np.uint64(0x9E3779B97F4A7C15)
        band ^= band >> np.uint64(29)
    return band


def _scattered(values: np.ndarray) -> np.ndarray:
    """A bijection of uint32 that leaves no order (the finalizer of MurmurHash3)."""
    import numpy as np

    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return np.asarray(values ^ (values >> np.uint32(16)))


@cache
def _orders() -> tuple[np.ndarray, np.ndarray]:
    """Odd multipliers and offsets, always the same: each pair orders the numbers of 32 bits in its own way."""
    import numpy as np

    drawn = np.random.default_rng(0).integers(0, 2**32, (2, BANDS * DEPTH), np.uint32)
    return drawn[0] | np.uint32(1), drawn[1]
