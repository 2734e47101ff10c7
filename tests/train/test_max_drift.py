"""`train.max_drift`: the KL from the base that an evaluation reports, and what it does to a run."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach, attached, detach, put
from mlx_lora.config import Adapter
from mlx_lora.data.rows import Row
from mlx_lora.errors import RecipeError
from mlx_lora.models.load import LoadedModel
from mlx_lora.recipe import parse_recipe
from mlx_lora.tasks.begin import check_start
from mlx_lora.train.events import Evaluated, Finished, Note, Saved
from mlx_lora.train.objectives.drift import without_adapter
from mlx_lora.train.trainer import train
from tests.fixed import fixed
from tests.train.test_trainer import arrays_of, make_rows, of

VALID = make_rows(7, seed=1)


def run(loaded: LoadedModel, adapter: Adapter, rows: list[Row] | None = None, **settings: Any) -> list[Any]:
    detach(loaded.model)
    attach(loaded.model, adapter, seed=3)
    chosen = fixed(**{"batch_size": 4, "learning_rate": 2e-2, "warmup": 0.0, "iters": 4} | settings)
    return list(train(loaded.model, rows or make_rows(24), VALID, chosen, seed=3))


def logits(loaded: LoadedModel, row: Row) -> np.ndarray:
    return np.array(loaded.model(mx.array(row.tokens[None, :-1]))[0].astype(mx.float32)).astype(np.float64)


def kl_by_numpy(loaded: LoadedModel) -> float:
    """KL(base ‖ tuned) over the positions with loss, from whole logits in float64, row by row."""
    total, tokens = 0.0, 0
    for row in VALID:
        tuned = logits(loaded, row)
        wrappers = attached(loaded.model)
        detach(loaded.model)
        base = logits(loaded, row)
        put(loaded.model, wrappers)
        p, q = (values - np.logaddexp.reduce(values, axis=-1, keepdims=True) for values in (base, tuned))
        there = row.weights[1:] != 0
        total += float((np.exp(p) * (p - q)).sum(axis=-1)[there].sum())
        tokens += int(there.sum())
    return total / tokens


@pytest.mark.parametrize(
    ("adapter", "settings"),
    [
        (Adapter(rank=4, targets="all-linear", dropout=0.2), {"batch_size": 3}),
        (Adapter(rank=4, layers=1), {"cache_prefix": "on"}),
        (Adapter(rank=4, targets=["embed_tokens", "q_proj"]), {}),
        (Adapter(method="prefix", virtual_tokens=3), {"learning_rate": 0.2}),
        (Adapter(method="full"), {"learning_rate": 2e-3}),
    ],
    ids=["all-linear", "kept-states", "embedding", "prefix", "full"],
)
def test_the_drift_is_the_divergence_that_numpy_finds(
    tiny: LoadedModel, adapter: Adapter, settings: dict[str, Any]
) -> None:
    events = run(tiny, adapter, max_drift=1e3, eval_every=2, **settings)
    drifts = [event.drift for event in of(events, Evaluated)]
    assert len(drifts) == 3 and drifts[-1] > 1e-3
    if adapter.method != "prefix":  # whose random keys change the output from the start
        assert drifts[0] == pytest.approx(0, abs=1e-6)
    assert drifts[-1] == pytest.approx(kl_by_numpy(tiny), rel=2e-4)


def test_measuring_it_changes_no_byte_of_what_is_learned(tiny: LoadedModel) -> None:
    base = {name: np.array(array) for name, array in tree_flatten(tiny.model.parameters())}
    without, beside = (run(tiny, Adapter(rank=4, dropout=0.1), eval_every=2, max_drift=most) for most in (None, 1e3))
    assert [event.drift for event in of(without, Evaluated)] == [None] * 3
    assert [event.loss for event in of(beside, Evaluated)] == pytest.approx(
        [event.loss for event in of(without, Evaluated)], rel=1e-6
    )
    first, second = arrays_of(without), arrays_of(beside)
    assert all(np.array_equal(np.array(first[name]), np.array(second[name])) for name in first)
    detach(tiny.model)
    after = dict(tree_flatten(tiny.model.parameters()))
    assert all(np.array_equal(array, np.array(after[name])) for name, array in base.items())


def test_two_evaluations_over_the_bound_end_the_run_and_the_best_is_one_within_it(tiny: LoadedModel) -> None:
    settings: dict[str, Any] = {"iters": 14, "eval_every": 2, "learning_rate": 1e-2, "schedule": "constant"}
    free = of(run(tiny, Adapter(rank=4), VALID, max_drift=1e3, **settings), Evaluated)
    bound = (free[2].drift + free[3].drift) / 2
    assert free[1].drift < free[2].drift < bound < free[3].drift < free[4].drift and free[4].best
    events = run(tiny, Adapter(rank=4), VALID, max_drift=bound, **settings)
    finished = of(events, Finished)[-1]
    assert finished.stopped_by == "drift" and finished.iters == 8
    assert [event.best for event in of(events, Evaluated)] == [False, True, True, False, False]
    assert [event.step for event in of(events, Saved) if event.kind == "best"] == [2, 4]
    assert finished.best_valid_loss == free[2].loss


def test_a_run_that_was_never_within_it_says_so(tiny: LoadedModel) -> None:
    events = run(tiny, Adapter(rank=4), iters=6, eval_every=2, max_drift=1e-9)
    assert of(events, Finished)[-1].stopped_by == "drift" and not [e for e in of(events, Saved) if e.kind == "best"]
    assert any("no evaluation was within train.max_drift" in note.text for note in of(events, Note))


def test_the_base_is_back_with_its_adapter_also_after_an_error(tiny: LoadedModel) -> None:
    wrappers = attach(tiny.model, Adapter(rank=4))
    with pytest.raises(ValueError, match="on the way"), without_adapter(tiny.model):
        assert not attached(tiny.model)
        raise ValueError("on the way")
    assert attached(tiny.model) == wrappers


def test_prompt_has_no_base_to_compare_with() -> None:
    with pytest.raises(RecipeError, match="virtual tokens"):
        check_start(parse_recipe({"adapter": {"method": "prompt"}, "train": {"max_drift": 0.1}}))
