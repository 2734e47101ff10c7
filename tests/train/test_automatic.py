"""What `auto` becomes: numbers that follow from the base, the method and the rows, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_lora.config import Adapter, Train
from mlx_lora.errors import RecipeError
from mlx_lora.methods import COMBINATIONS, METHODS
from mlx_lora.train import automatic
from mlx_lora.train.optim import schedule, total_steps


def chosen(*, rows: int = 1000, valid: int = 100, hidden: int = 2048, adapter: Any = None, **settings: Any) -> Train:
    made = automatic.choose(Train(**settings), Adapter(**(adapter or {})), hidden=hidden, rows=rows, valid=valid)
    assert "auto" not in [getattr(made.settings, key) for key in automatic.KEYS]
    return made.settings


def test_nothing_is_left_to_choose_and_each_choice_is_said() -> None:
    made = automatic.choose(Train(), Adapter(), hidden=576, rows=72, valid=8)
    assert list(made.reasons) == [f"train.{key}" for key in automatic.KEYS]
    assert all(sentence.startswith("train.") and ": " in sentence for sentence in made.sentences)
    again = automatic.choose(made.settings, Adapter(), hidden=4096, rows=9999, valid=0)
    assert again.settings == made.settings and not again.reasons, "numbers stay as they are"
    assert automatic.choose(Train(), Adapter(), hidden=576, rows=72, valid=8) == made


def test_one_of_a_thing_is_said_as_one_and_a_large_number_whole() -> None:
    made = automatic.choose(Train(), Adapter(), hidden=576, rows=1, valid=1)
    assert made.sentences[0] == "train.epochs is 10: 1 row makes 10 steps"
    assert made.sentences[2] == "train.eval_every is 1: 10 validations on 1 row"
    once = automatic.choose(Train(iters=2_000_001), Adapter(), hidden=576, rows=100, valid=10**8)
    assert once.sentences[1] == "train.eval_every is 2000001: 1 validation on 100000000 rows"


@pytest.mark.parametrize(("hidden", "theirs"), [(2048, 4.91e-4), (4096, 2.86e-4)], ids=["llama-3.2-1b", "llama-3.1-8b"])
def test_the_rate_of_a_long_run_is_the_published_formula(hidden: int, theirs: float) -> None:
    assert chosen(hidden=hidden, iters=1000).learning_rate == pytest.approx(theirs, rel=0.02)


def test_a_short_run_learns_faster_by_half_at_most() -> None:
    rates = [chosen(iters=steps).learning_rate for steps in (10, 100, 200, 400, 4000)]
    assert rates[0] == rates[1] > rates[2] > rates[3] == rates[4]
    assert rates[0] / rates[3] == pytest.approx(1.5, rel=0.03)


def test_a_larger_scale_or_rank_wants_a_lower_rate() -> None:
    plain = chosen(iters=1000).learning_rate
    for adapter, times in (
        ({"rank": 32, "alpha": 64}, 0.5),
        ({"alpha": 64}, 0.5),
        ({"rank": 2, "alpha": 4}, 2.0),
        ({"rank": 64, "alpha": 16}, 1.0),
        ({"rank": 16, "rslora": True}, 0.5),
    ):
        assert chosen(iters=1000, adapter=adapter).learning_rate == pytest.approx(times * plain, rel=0.03), adapter


def test_every_method_has_a_rate_and_a_combination_the_lower_one() -> None:
    assert automatic.METHODS.keys() == METHODS.keys()
    rates = {name: chosen(iters=1000, adapter={"method": name}).learning_rate for name in (*METHODS, *COMBINATIONS)}
    assert rates["full"] == pytest.approx(rates["lora"] / 10, rel=0.03)
    assert rates["lora+prefix"] == rates["lora+prompt"] == rates["lora"] < rates["prefix"]


def test_sgd_has_to_be_given_a_rate() -> None:
    with pytest.raises(RecipeError, match="not known for sgd"):
        chosen(optimizer="sgd")
    assert chosen(optimizer="sgd", learning_rate=0.1).learning_rate == 0.1
    assert chosen(optimizer="lion").learning_rate < chosen().learning_rate
    assert chosen(loraplus_ratio=16).learning_rate == pytest.approx(chosen().learning_rate / 4, rel=0.05)


@pytest.mark.parametrize(
    ("rows", "settings", "epochs", "steps"),
    [
        (45, {}, 10, 120),
        (72, {}, 10, 180),
        (300, {}, 4, 300),
        (1000, {}, 1, 250),
        (100_000, {}, 1, 25_000),
        (1000, {"batch_size": 8, "grad_accumulation": 2}, 5, 315),
        (1, {}, 10, 10),
        (72, {"iters": 40}, 3, 40),
    ],
)
def test_few_rows_are_repeated_and_many_are_not(rows: int, settings: dict[str, Any], epochs: int, steps: int) -> None:
    made = chosen(rows=rows, **settings)
    per_epoch = -(-rows // (made.batch_size * made.grad_accumulation))
    assert made.epochs == epochs and total_steps(made, per_epoch) == steps


@pytest.mark.parametrize("rows", [10, 45, 72, 300, 1000, 20_000])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 3.0])
def test_evaluations_are_five_to_ten_and_take_a_fifth_at_most(rows: int, share: float) -> None:
    valid = max(round(rows * share), 1)
    made = chosen(rows=rows, valid=valid)
    steps = total_steps(made, -(-rows // 4))
    count = -(-steps // made.eval_every)
    cost = count * valid / 3 / (steps * 4)
    assert 1 <= count <= 10 and (cost <= 0.2 or count == 1)
    if share <= 0.1:
        assert count >= 5, "there is time for as many"
    assert chosen(rows=rows, valid=valid, max_drift=1.0).eval_every >= made.eval_every, "the base runs too"


def test_patience_is_a_third_of_the_run_and_longer_with_few_validation_rows() -> None:
    assert chosen(rows=300, valid=30).patience == 4
    assert chosen(rows=45, valid=5).patience == 5, "five rows are noisy"
    assert chosen(valid=0).patience is None and chosen(valid=0).eval_every is None
    assert chosen(eval_every=None).patience is None, "only the end is evaluated"
    assert chosen(rows=100, valid=30, eval_every=200).patience is None, "it would never stop anything"
    assert chosen(patience=2).patience == 2


def test_the_loop_refuses_what_is_still_auto() -> None:
    with pytest.raises(ValueError, match="still auto"):
        schedule(Train(), 10)
