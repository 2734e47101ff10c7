"""Scores between 0 and 1 of texts that say the same in other words: token F1, ROUGE-L, chrF.

ROUGE-L and chrF are those of rouge-score and sacrebleu (extra `scores`).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mlx_lora.errors import MlxLoraError
from mlx_lora.study.scores.base import f1, mean

ARTICLES = re.compile(r"\b(a|an|the)\b")
# Writing without spaces between words: each character is a token.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
TOKEN = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")


@dataclass(frozen=True)
class TokenF1:
    """F1 of the words that both texts have, in any order, as SQuAD defines it (arXiv 1606.05250).

    Lower case, without ASCII punctuation and the articles a, an, the.
    """

    name: str = "token-f1"

    def of(self, wanted: str, answer: str) -> float:
        right, found = squad_tokens(wanted), squad_tokens(answer)
        return f1((Counter(right) & Counter(found)).total(), len(right), len(found))

    def details(self, wanted: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
        pairs = zip(wanted, answers, strict=True)
        return {"same": mean([float(squad_tokens(right) == squad_tokens(found)) for right, found in pairs])}


def words(text: str) -> list[str]:
    """The tokens of ROUGE-L."""
    return TOKEN.findall(text.lower())


def squad_tokens(text: str) -> list[str]:
    """The words of a text as SQuAD's evaluation counts them."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return ARTICLES.sub(" ", plain).split()


class RougeL:
    """F1 of the longest common subsequence of words, by rouge-score, without stemming.

    Its own tokens are runs of a-z and 0-9, which leaves nothing of other scripts. Here a token is a run of letters and
    digits of any script, or one character of a script without spaces: the same for plain English. Raises MlxLoraError
    without rouge-score.
    """

    name = "rouge-l"

    def __init__(self) -> None:
        self._scorer = library("rouge_score.rouge_scorer", self.name).RougeScorer(["rougeL"], tokenizer=self)

    def tokenize(self, text: str) -> list[str]:
        """rouge-score's interface of a tokenizer."""
        return words(text)

    def of(self, wanted: str, answer: str) -> float:
        return float(self._scorer.score(wanted, answer)["rougeL"].fmeasure)

    def details(self, wanted: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
        scores = [self._scorer.score(right, answer)["rougeL"] for right, answer in zip(wanted, answers, strict=True)]
        return {"precision": mean([one.precision for one in scores]), "recall": mean([one.recall for one in scores])}


class ChrF:
    """F2 of character n-grams up to 6, by sacrebleu, divided by 100; `corpus` is that of all answers as one text.

    Raises MlxLoraError without sacrebleu.
    """

    name = "chrf"

    def __init__(self) -> None:
        self._metric = library("sacrebleu.metrics", self.name).CHRF()

    def of(self, wanted: str, answer: str) -> float:
        return float(self._metric.sentence_score(answer, [wanted]).score) / 100

    def details(self, wanted: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
        return {"corpus": float(self._metric.corpus_score(list(answers), [list(wanted)]).score) / 100}


def library(module: str, score: str) -> Any:
    """A module of the extra `scores`. Raises MlxLoraError where it isn't installed."""
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0].replace("_", "-")
        raise MlxLoraError(
            f"the score {score} needs {package}", hint="pip install 'mlx-lora[scores]', or --score token-f1"
        ) from None


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return find_spec(package) is not None
