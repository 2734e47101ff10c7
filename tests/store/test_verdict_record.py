"""The record of a verdict: written whole, read back as it was, without text, and refused where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from mlx_lora.errors import MlxLoraError
from mlx_lora.store import verdict as store
from mlx_lora.study.behaviour import Answer, shares
from mlx_lora.study.scores.choose import NAMES
from mlx_lora.study.verdict import LOSS

KEYS = {"adapter", "verdict", "metric", "base", "tuned", "difference", "interval", "rows", "fixed", "broken", "drift"}
DRIFT = {"kl_task", "kl_general", "loss_general_base", "loss_general_tuned"}


def record(name: str = "mail") -> store.Verdict:
    judged = store.Judged(
        adapter="mail", verdict="helped", sentence="helped: …", metric="accuracy", base=0.2, tuned=0.8, difference=0.6,
        interval=(0.5, 0.7), p_value=0.001, test="McNemar", detectable=0.14, rows=100, fixed=2, broken=1,
        fixed_rows=[3, 5], broken_rows=[7], drift=store.Drift(kl_task=1.5),
    )  # fmt: skip
    data = store.Rows(file="test.jsonl", sha256="0" * 64, rows=100)
    return store.Verdict(created=store.now(), name=name, model="base", data=data, results=[judged])


def test_a_record_comes_back_as_it_was(home: Path) -> None:
    file = store.write(record())
    assert store.read("mail") == record().model_copy(update={"created": store.read("mail").created})
    assert file == home / "verdicts" / "mail" / "verdict.json" and file.stat().st_mode & 0o777 == 0o600
    (result,) = json.loads(file.read_text())["results"]
    assert result.keys() >= KEYS and result["drift"].keys() >= DRIFT
    assert result["interval"] == [0.5, 0.7] and result["drift"]["kl_general"] is None


def test_a_later_verdict_takes_the_place_of_an_earlier_one(home: Path) -> None:
    store.write(record())
    store.write(record().model_copy(update={"model": "another"}))
    assert store.read("mail").model == "another" and store.names() == ["mail"]
    assert [path.name for path in (home / "verdicts").iterdir()] == ["mail"]


def test_a_record_that_is_missing_or_damaged_says_so(home: Path) -> None:
    with pytest.raises(MlxLoraError, match="there are none yet"):
        store.read("mail")
    file = store.write(record())
    with pytest.raises(MlxLoraError, match="did you mean 'mail'"):
        store.read("mial")
    file.write_text(file.read_text().replace('"helped"', '"perhaps"', 1))
    with pytest.raises(MlxLoraError, match=r"results\.0\.verdict"):
        store.read("mail")
    file.write_text("{")
    with pytest.raises(MlxLoraError, match="verdict.json"):
        store.read("mail")


@pytest.mark.parametrize(
    "values",
    [
        {"metric": "Billing"},
        {"test": "Ann Smith"},
        {"behaviour": {"salary": {}}},
        {"behaviour": {"task": {"base": {"salary": 1.0}}}},
    ],
)
def test_a_record_takes_no_words_but_its_own(values: dict[str, Any]) -> None:
    """Names of the user's labels and fields have no place that they could get into."""
    judged = record().results[0].model_dump()
    with pytest.raises(ValidationError):
        store.Judged.model_validate(judged | values)


def test_the_words_of_a_record_are_those_of_a_verdict() -> None:
    assert set(get_args(store.Metric)) == {*NAMES, LOSS}
    assert set(get_args(store.Look)) == {*shares([Answer(3, False, True, False, False)])}
