"""Which score suits the wanted answers, and why: the user is told both.

the user's own scorer or expression          that one
JSON objects or lists                        json
SELECT … and a database                      sql
few short texts that repeat                  accuracy
numbers                                      numbers
texts of a few words                         normalised
one or two sentences                         token-f1
longer                                       rouge-l; chrf where words aren't parted by spaces
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mlx_lora.errors import MlxLoraError, nearest
from mlx_lora.study.scores.base import Score
from mlx_lora.study.scores.fields import Json, parsed
from mlx_lora.study.scores.labels import Accuracy
from mlx_lora.study.scores.match import NUMBER, Exact, Normalised, Numbers, Pattern
from mlx_lora.study.scores.overlap import UNSPACED, ChrF, RougeL, TokenF1, installed
from mlx_lora.study.scores.scorer import Scorer
from mlx_lora.study.scores.sql import Sql, query_of

NAMES = (
    "exact", "normalised", "accuracy", "json", "token-f1", "rouge-l", "chrf", "pattern", "numbers", "sql", "scorer",
)  # fmt: skip
# Labels: at most so many different answers of so many words and characters, each given twice or more on average.
MOST_LABELS, LABEL_WORDS, LABEL_CHARACTERS = 30, 5, 48
# The median of words up to which answers are short, and up to which they are a sentence or two.
SHORT, SENTENCES = 5, 40
# What is given for a score.
OPTIONS = {"scorer": "scorer FILE.py", "pattern": "pattern REGEX", "sql": "database FILE", "numbers": "tolerance X"}
# Wanted queries that are run before anything is generated.
TRIED = 10
# A number with a sign, a currency or a unit around it.
AROUND = re.compile(r"[^\d\W]{0,4}[\W_]?")
SELECT = re.compile(r"\s*(?:select|with)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Given:
    """What the user gave for scores that need something; `tolerance` is a number, or a share as 5%."""

    database: Path | None = None
    pattern: str | None = None
    scorer: Path | None = None
    tolerance: str | None = None

    @property
    def names(self) -> list[str]:
        """The scores that something was given for."""
        given = {"scorer": self.scorer, "pattern": self.pattern, "sql": self.database, "numbers": self.tolerance}
        return [name for name, value in given.items() if value is not None]


@dataclass(frozen=True)
class Chosen:
    """A score, and in one line why it is that one."""

    score: Score
    why: str


def choose(wanted: Sequence[str], asked: str = "auto", given: Given | None = None) -> Chosen:
    """The score called `asked`, or for auto the one that suits the wanted answers.

    Raises MlxLoraError for an unknown name, for what a score lacks, and where there is no answer to compare with.
    """
    given = given or Given()
    answers = [answer.strip() for answer in wanted]
    if not answers:
        raise MlxLoraError("no row has an answer to score", hint="scores need prompts with answers, not plain text")
    name, why = (asked, "as asked") if asked != "auto" else _suited(answers, given)
    return Chosen(_made(name, answers, given), why)


def check(asked: Sequence[str], given: Given) -> None:
    """Raise what `choose` would without knowing the answers: for names, packages and files that aren't there."""
    names = {*given.names, *asked} - {"auto", "accuracy"}
    for name in sorted(names):
        _made(name, [], given)


def _suited(answers: list[str], given: Given) -> tuple[str, str]:
    """The name of the score for these answers, and the reason."""
    if given.names:
        return given.names[0], f"--{OPTIONS[given.names[0]]} was given"
    if _share(answers, _is_structure) >= 0.95:
        return "json", "the wanted answers are JSON"
    labels = set(answers)
    if _are_labels(answers, labels):
        return "accuracy", f"{len(answers)} wanted answers are {len(labels)} short texts that repeat"
    if _share(answers, _is_number) >= 0.95:
        return "numbers", "the wanted answers are numbers"
    queries = _share(answers, lambda answer: SELECT.match(query_of(answer)) is not None) >= 0.95
    return _for_texts(answers, "; --database FILE would run these queries" if queries else "")


def _for_texts(answers: list[str], more: str) -> tuple[str, str]:
    """The score for texts, by the median of their length in words."""
    unspaced = re.compile(f"[{UNSPACED}]")
    characters = sum(map(len, answers))
    words = median(len(answer.split()) + len(unspaced.findall(answer)) / 2 for answer in answers)
    if words <= SHORT:
        return "normalised", f"the wanted answers are short, a median of {words:g} words{more}"
    if sum(len(unspaced.findall(answer)) for answer in answers) > characters / 4:
        name, package = "chrf", "sacrebleu"
        why = "the wanted answers are texts without spaces between words"
    else:
        name, package = "rouge-l", "rouge_score"
        why = f"the wanted answers are texts with a median of {words:g} words"
        if words <= SENTENCES:
            return "token-f1", f"{why}{more}"
    if not installed(package):
        return "token-f1", f"{why}; pip install 'mlx-lora[scores]' brings {name}, which suits them better{more}"
    return name, f"{why}{more}"


def _made(name: str, answers: list[str], given: Given) -> Score:
    """The score of a name. Raises MlxLoraError for an unknown one, and where something that it needs isn't given."""
    if name not in NAMES:
        raise MlxLoraError(f"no score is called {name!r}{nearest(name, ('auto', *NAMES))}")
    if name in OPTIONS and name != "numbers" and name not in given.names:
        raise MlxLoraError(f"the score {name} needs --{OPTIONS[name]}")
    if given.database is not None and name == "sql":
        return _running(Sql(given.database), answers)
    if given.pattern is not None and name == "pattern":
        return Pattern(given.pattern)
    if given.scorer is not None and name == "scorer":
        return Scorer(given.scorer)
    if name == "numbers":
        return Numbers(*tolerance_of(given.tolerance or "0"))
    if name == "accuracy":
        labels = tuple(sorted(set(answers)))
        if len(labels) > MOST_LABELS:
            raise MlxLoraError(
                f"the score accuracy takes the wanted answers as labels, and {len(labels)} of them differ",
                hint=f"at most {MOST_LABELS} labels; --score normalised compares texts",
            )
        return Accuracy(labels)
    plain: dict[str, Callable[[], Score]] = {
        "exact": Exact, "normalised": Normalised, "json": Json, "token-f1": TokenF1, "rouge-l": RougeL, "chrf": ChrF,
    }  # fmt: skip
    return plain[name]()


def tolerance_of(text: str) -> tuple[float, bool]:
    """(tolerance, whether it is a share of the wanted number) of a text as 0.5 or 5%. Raises MlxLoraError."""
    relative = text.strip().endswith("%")
    try:
        tolerance = float(text.strip().rstrip("%")) / (100 if relative else 1)
    except ValueError:
        tolerance = -1.0
    if not 0 <= tolerance < float("inf"):
        raise MlxLoraError(f"--tolerance is {text!r}, a number of at least 0 or a share like 5% is needed")
    return tolerance, relative


def _running(score: Sql, answers: list[str]) -> Sql:
    """A score of queries, of which the first few of the wanted ones can't all fail. Raises MlxLoraError."""
    few = answers[:TRIED]
    if few and all("fault" in score.result(answer) for answer in few):
        raise MlxLoraError(
            f"none of the first {len(few)} wanted answers runs as a query on {score.database.name}",
            hint="the score sql compares results, so the wanted answers have to be queries of this database",
        )
    return score


def _are_labels(answers: list[str], labels: set[str]) -> bool:
    few = 2 <= len(labels) <= MOST_LABELS and len(answers) >= 2 * len(labels)
    return few and all(
        label and len(label) <= LABEL_CHARACTERS and len(label.split()) <= LABEL_WORDS and "\n" not in label
        for label in labels
    )


def _is_structure(answer: str) -> bool:
    try:
        return isinstance(parsed(answer), dict | list)
    except ValueError:
        return False


def _is_number(answer: str) -> bool:
    found = NUMBER.search(answer)
    return found is not None and all(
        AROUND.fullmatch(part) is not None for part in (answer[: found.start()], answer[found.end() :][::-1])
    )


def _share(answers: list[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, answers)) / len(answers)
