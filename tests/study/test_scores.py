"""Scores against definitions that are written out here, and what a score makes of hostile answers."""

from __future__ import annotations

import re
import string
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from mlx_lora.errors import MlxLoraError
from mlx_lora.study.scores.choose import NAMES, Given, choose, tolerance_of
from mlx_lora.study.scores.fields import Json, fields_of
from mlx_lora.study.scores.labels import OTHER, Accuracy
from mlx_lora.study.scores.match import Exact, Normalised, Numbers, Pattern, normalised, numbers
from mlx_lora.study.scores.overlap import ChrF, RougeL, TokenF1, words

SAME = (
    ("Yes.", "yes"), ("  New\n York ", "new york"), ("ﬁne", "fine"), ("ＡＢＣ", "abc"), ("Straße", "STRASSE"),
    ("“quoted”", '"quoted"'), ("(5)", "5"), ("e\u0301", "é"), ("well-known", "wellknown"), ("?!", " ?! "),
)  # fmt: skip
DIFFERENT = (("3.5", "35"), ("-2", "2"), ("10%", "10"), ("1,000", "1000"), ("a b", "ab"), ("?!", "."), ("", "x"))


@pytest.mark.parametrize(("one", "other"), SAME)
def test_form_does_not_count(one: str, other: str) -> None:
    assert Normalised().of(one, other) == Normalised().of(other, one) == 1
    assert normalised(normalised(one)) == normalised(one)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_meaning_counts(one: str, other: str) -> None:
    assert Normalised().of(one, other) == 0


def test_exact_is_exact_apart_from_white_space_around() -> None:
    assert [Exact().of(" a b\n", other) for other in ("a b", "A b", "a  b")] == [1, 0, 0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It costs $1,234.50, or −3 %", ["1234.50", "-3"]), ("3", ["3"]), (".5 and -.25", ["0.5", "-0.25"]),
        ("6e23", ["6E+23"]), ("B2 v1.2", []), ("1,23", ["1", "23"]), ("2020-05", ["2020", "5"]), ("no", []),
    ],
)  # fmt: skip
def test_numbers_are_found(text: str, found: list[str]) -> None:
    assert list(map(str, numbers(text))) == found


@pytest.mark.parametrize(
    ("wanted", "answer", "tolerance", "score"),
    [
        ("12", "5 + 7 = 12", "0", 1), ("12", "12.0", "0", 1), ("12", "12.4", "0.5", 1), ("12", "12.6", "0.5", 0),
        ("0.3", "0.1", "0.2", 1), ("200", "189", "5%", 0), ("-200", "-190", "5%", 1), ("1 2", "2", "0", 0),
        ("1 2", "1 and 2", "0", 1), ("none", "None.", "0", 1), ("7", "seven", "9", 0),
        ("9" * 40, "9" * 39 + "8", "0", 0), ("5", "1e9999", "1", 0),
    ],
)  # fmt: skip
def test_numbers_within_a_tolerance(wanted: str, answer: str, tolerance: str, score: int) -> None:
    assert Numbers(*tolerance_of(tolerance)).of(wanted, answer) == score


def test_distances_of_numbers_are_those_of_numpy() -> None:
    wanted, answers = ["1", "2.5", "-4"], ["1.5", "about 2", "four"]
    details = Numbers(1.0).details(wanted, answers)
    distances = np.abs(np.array([1.5, 2]) - np.array([1, 2.5]))
    assert details["numbers"] == 2 and details["mean_error"] == pytest.approx(distances.mean())
    assert details["largest_error"] == pytest.approx(distances.max())


def test_an_expression_is_searched_and_its_groups_are_compared() -> None:
    assert [Pattern(r"^\d{3}$").of("whatever", answer) for answer in ("123", "1234")] == [1, 0]
    of = Pattern(r"Answer: (\w+)").of
    assert [of("Answer: B", answer) for answer in ("so. Answer: B", "Answer: C", "B")] == [1, 0, 0]
    with pytest.raises(MlxLoraError, match="not a regular expression"):
        Pattern("(")


def test_an_expression_that_blows_up_is_stopped_and_counted() -> None:
    score = Pattern(r"^(a|aa)+$")
    assert score.of("b", "a" * 60 + "b") == 0
    assert score.details(["b", "b"], ["a" * 60 + "b", "a"]) == {"wanted_found": 0, "timed_out": 1}


def squad_f1(wanted: str, answer: str) -> float:
    """SQuAD's evaluation, version 2, written out."""

    def tokens(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    right, found = tokens(wanted), tokens(answer)
    if not right or not found:
        return float(right == found)
    common = sum((Counter(right) & Counter(found)).values())
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(right)
    return 2 * precision * recall / (precision + recall)


TEXTS = (
    "The cat sat on the mat.", "a cat, the mat", "A dog sat", "", "the", "cat cat cat", "Anna's theatre: an end",
    "We met at 10:30 in the old town hall, and then the rain began.",
    "In the old hall we met before the rain at 10:30!",
)  # fmt: skip


@pytest.mark.parametrize("wanted", TEXTS)
def test_token_f1_is_squads(wanted: str) -> None:
    for answer in TEXTS:
        assert TokenF1().of(wanted, answer) == pytest.approx(squad_f1(wanted, answer))


def test_rouge_tokens_are_its_own_for_plain_english_and_there_are_some_of_other_scripts() -> None:
    def own(text: str) -> list[str]:
        return re.sub(r"[^a-z0-9]+", " ", text.lower()).split()

    for text in (*TEXTS, "snake_case 1st\tline\n2nd"):
        assert words(text) == own(text)
    assert words("Öl für 我们 よ") == ["öl", "für", "我", "们", "よ"]


LABELS = ("billing", "cancel", "not", "not sure", "other")


def confusion(wanted: Sequence[str], answers: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Counts (wanted, answered), by numpy."""
    table = np.zeros((len(names), len(names)), int)
    np.add.at(table, ([names.index(one) for one in wanted], [names.index(one) for one in answers]), 1)
    return table


def drawn(seed: int, rows: int = 60) -> tuple[list[str], list[str]]:
    """Wanted and answered labels; the last label is never wanted, the first never answered."""
    generator = np.random.default_rng(seed)
    wanted = generator.choice(LABELS[:4], rows).tolist()
    answers = [one if generator.random() < 0.6 else generator.choice(LABELS[1:]) for one in wanted]
    return wanted, [LABELS[1] if one == LABELS[0] else str(one) for one in answers]


@pytest.mark.parametrize("seed", range(3))
def test_confusion_and_classes_are_those_of_numpy(seed: int) -> None:
    wanted, answers = drawn(seed)
    details = Accuracy(LABELS).details(wanted, answers)
    table = confusion(wanted, answers, LABELS)
    assert [[details["confusion"][right][answer] for answer in LABELS] for right in LABELS] == table.tolist()
    with np.errstate(invalid="ignore"):
        precision, recall = (np.nan_to_num(table.diagonal() / table.sum(axis)) for axis in (0, 1))
        f1 = np.nan_to_num(2 * precision * recall / (precision + recall))
    for place, label in enumerate(LABELS):
        own = details["classes"][label]
        assert (own["precision"], own["recall"], own["f1"]) == pytest.approx(
            (precision[place], recall[place], f1[place])
        )
    assert details["macro_f1"] == pytest.approx(f1.mean())
    score = [Accuracy(LABELS).of(*pair) for pair in zip(wanted, answers, strict=True)]
    assert np.mean(score) == pytest.approx(table.trace() / table.sum())


def test_generated_answers_are_labels_apart_from_their_form_or_none_of_them() -> None:
    score = Accuracy(("Billing", "not sure"))
    assert [score.label(answer) for answer in ("billing.", "Not  sure", "not", "")] == [
        "Billing", "not sure", OTHER, OTHER,
    ]  # fmt: skip
    details = score.details(["Billing", "not sure"], ["billing", "no idea"])
    assert details["confusion"]["not sure"] == {"Billing": 0, "not sure": 0, OTHER: 1}
    assert Accuracy(("A", "a")).label("a") == "a"


WANTED = '{"name": "Ann", "age": 30, "tags": ["a", 2], "empty": {}}'


@pytest.mark.parametrize(
    ("answer", "right", "found"),
    [
        (WANTED, 5, 5), ('{"age": 30.0, "name": "Ann"}', 2, 2), ('{"name": "Ann", "age": "30"}', 1, 2),
        ('{"tags": [2, "a"], "more": true}', 0, 3), ('{"tags": ["a"], "empty": []}', 1, 2), ("[]", 0, 1),
    ],
)  # fmt: skip
def test_fields_are_paths_with_types_and_values(answer: str, right: int, found: int) -> None:
    assert len(fields_of(answer) or ()) == found
    assert Json().of(WANTED, answer) == pytest.approx(2 * right / (5 + found))
    details = Json().details([WANTED], [answer])
    assert (details["precision"], details["recall"]) == pytest.approx((right / found, right / 5))


@pytest.mark.parametrize("answer", ["", "{", '{"a": NaN}', "```json\n{}\n```", WANTED + " and more", "[" * 200_000])
def test_what_is_not_json_has_no_fields(answer: str) -> None:
    assert fields_of(answer) is None and Json().of(WANTED, answer) == 0
    assert Json().details([WANTED, "{}"], [answer, "{}"])["valid"] == 0.5


def test_one_and_true_are_not_the_same_and_lists_share_a_name() -> None:
    assert Json().of('{"a": 1}', '{"a": true}') == Json().of('{"a": 0}', '{"a": false}') == 0
    details = Json().details(['{"a": [{"b": 1}, {"b": 2}]}'], ['{"a": [{"b": 1}]}'])
    assert details["fields"] == {"a[].b": {"wanted": 2, "right": 1}}
    assert Json().of("not json", "not json") == 1 and Json().details(["x"], ["x"])["wanted_not_json"] == 1


CHOICES = {
    "accuracy": ["billing", "cancel", "billing", "cancel", "Other one"] * 2,
    "json": ['{"a": 1}', "[]", '{"b": {"c": null}}'],
    "numbers": ["12", "$3.50", "7 kg", "-1", "1,000", "12%"],
    "normalised": ["Paris", "the old town", "Rome", "blue", "Berlin"],
    "token-f1": ["we meet at noon in the old town hall", "a sentence of some more words than five", "see above, twice"],
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_score_that_suits_the_answers_is_chosen(name: str) -> None:
    chosen = choose(CHOICES[name])
    assert chosen.score.name == name and chosen.why
    assert all(chosen.score.of(wanted, wanted) == 1 for wanted in CHOICES[name])


def test_what_is_asked_for_is_taken_and_what_it_lacks_is_named() -> None:
    assert choose(CHOICES["accuracy"], "exact").score.name == "exact"
    assert choose(["x"], given=Given(pattern="x")).score.name == "pattern"
    assert choose(["a b c"], given=Given(tolerance="1")).score.name == "numbers"
    queries = ["select 1", "SELECT 2", "with x as (select 1) select * from x"]
    assert choose(queries).score.name == "normalised" and "--database" in choose(queries).why
    cases: Any = ({"asked": "sql"}, "--database"), ({"asked": "rouge"}, "rouge-l"), ({"asked": "scorer"}, "--scorer")
    for asked, named in cases:
        with pytest.raises(MlxLoraError, match=named):
            choose(["x"], **asked)
    with pytest.raises(MlxLoraError, match="31 of them"):
        choose([str(number) for number in range(31)], "accuracy")
    with pytest.raises(MlxLoraError, match="no row"):
        choose([])
    for tolerance in ("-1", "x", "inf", "nan", "%"):
        with pytest.raises(MlxLoraError, match="--tolerance"):
            choose(["1"], "numbers", Given(tolerance=tolerance))


def test_long_texts_are_compared_by_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_lora.study.scores.overlap.library", lambda module, score: MagicMock())
    long, chinese = [" ".join(["word"] * 60)] * 3, ["我们在老城区的市政厅见面然后开始下雨了"] * 3
    for there in (True, False):
        monkeypatch.setattr("mlx_lora.study.scores.choose.installed", lambda package, there=there: there)
        names = [choose(answers).score.name for answers in (long, chinese)]
        assert names == (["rouge-l", "chrf"] if there else ["token-f1", "token-f1"])
        assert there or "pip install" in choose(long).why


def test_a_package_that_is_missing_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, make in (("rouge_score.rouge_scorer", RougeL), ("sacrebleu.metrics", ChrF)):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MlxLoraError, match=module[:5]) as raised:
            make()
        assert "mlx-lora[scores]" in str(raised.value.hint)


def test_every_name_can_be_asked_for() -> None:
    assert set(NAMES) >= {*CHOICES, "exact", "rouge-l", "chrf", "pattern", "sql", "scorer"}
