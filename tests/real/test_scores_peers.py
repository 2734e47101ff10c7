"""Scores equal scikit-learn, rouge-score and sacrebleu on the same answers."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mlx_lora.study.scores.choose import choose
from mlx_lora.study.scores.labels import Accuracy
from mlx_lora.study.scores.overlap import ChrF, RougeL

pytestmark = pytest.mark.real

WORDS = (
    "the a cat sat on mat, dog's runs. far 12 over old-town hall; rain began we met at noon and then it ended".split()
)
LABELS = ("billing", "cancel", "not", "not sure", "other")


def texts(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(1, 40))) for _ in range(count)] + ["Cat", "", "3.5 %"]


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_confusion_and_classes_are_scikit_learns(seed: int) -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    draw = np.random.default_rng(seed)
    wanted = draw.choice(LABELS[: 3 + seed % 3], 80).tolist()
    answers = [one if draw.random() < 0.5 else str(draw.choice(LABELS[seed % 2 :])) for one in wanted]
    score = Accuracy(LABELS)
    details = score.details(wanted, answers)
    table = [[details["confusion"][right][answer] for answer in LABELS] for right in LABELS]
    assert table == confusion_matrix(wanted, answers, labels=LABELS).tolist()
    known = sorted({*wanted, *answers}, key=LABELS.index)
    rows = precision_recall_fscore_support(wanted, answers, labels=known, zero_division=0)
    for label, precision, recall, f1, count in zip(known, *rows, strict=True):
        own = details["classes"][label]
        assert [own["precision"], own["recall"], own["f1"], own["rows"]] == pytest.approx(
            [precision, recall, f1, count]
        )
    macro = precision_recall_fscore_support(wanted, answers, average="macro", zero_division=0)[2]
    assert details["macro_f1"] == pytest.approx(macro)
    values = [score.of(*pair) for pair in zip(wanted, answers, strict=True)]
    assert np.mean(values) == pytest.approx(accuracy_score(wanted, answers))


def test_rouge_l_is_rouge_scores() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    peer, wanted, answers = RougeScorer(["rougeL"]), texts(0, 60), texts(1, 60)
    found = [peer.score(*pair)["rougeL"] for pair in zip(wanted, answers, strict=True)]
    assert [RougeL().of(*pair) for pair in zip(wanted, answers, strict=True)] == [one.fmeasure for one in found]
    details = RougeL().details(wanted, answers)
    assert details["precision"] == pytest.approx(np.mean([one.precision for one in found]))
    assert details["recall"] == pytest.approx(np.mean([one.recall for one in found]))
    assert RougeL().of("Öl und Brot", "Öl und Wein") == pytest.approx(2 / 3)


def test_chrf_is_sacrebleus() -> None:
    import sacrebleu

    wanted, answers = texts(2, 60), texts(3, 60)
    found = [
        sacrebleu.sentence_chrf(answer, [right]).score / 100 for right, answer in zip(wanted, answers, strict=True)
    ]
    assert [ChrF().of(*pair) for pair in zip(wanted, answers, strict=True)] == pytest.approx(found)
    assert ChrF().details(wanted, answers)["corpus"] == pytest.approx(
        sacrebleu.corpus_chrf(answers, [wanted]).score / 100
    )
    assert ChrF().of("我们见面", "我们见面") == 1


def test_they_are_chosen_where_they_are_installed() -> None:
    assert choose([" ".join(["word"] * 60)] * 3).score.name == "rouge-l"
    assert choose(["我们在老城区的市政厅见面然后开始下雨了"] * 3).score.name == "chrf"
