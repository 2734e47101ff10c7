"""The training loop on a tiny model: what is summed, what is kept, what stops it, and that a seed decides it all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.data import batch
from mlx_lora.data.batch import Batch, collate, epoch_steps, steps_per_epoch
from mlx_lora.data.rows import Row
from mlx_lora.errors import TrainingError
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.train import optim, session, step
from mlx_lora.train.events import Checkpoint, Evaluated, Finished, Interrupted, Saved, Step
from mlx_lora.train.objectives.likelihood import Loss, as_arrays
from mlx_lora.train.trainer import train
from tests.fixed import fixed

# Of events: what differs between two runs of the same.
MEASURED = {"tokens_per_second", "peak_memory", "peak_memory_bytes", "seconds", "arrays"}


def make_rows(count: int, *, seed: int = 0, longest: int = 24) -> list[Row]:
    """Rows of random lengths whose second half carries loss."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(generator.integers(6, longest))
        tokens = generator.integers(1, 60, length).astype(np.int32)
        rows.append(Row(tokens, np.array([0.0] * (length // 2) + [1.0] * (length - length // 2), np.float32)))
    return rows


def run(loaded: LoadedModel, rows: list[Row], valid: list[Row], seed: int = 0, **settings: Any) -> list[Any]:
    """Train a fresh adapter and return the events."""
    adapter = settings.pop("adapter", Adapter(rank=4))
    stop = settings.pop("should_stop", lambda: False)
    attach(loaded.model, adapter, seed=seed)
    chosen = fixed(**{"batch_size": 4, "learning_rate": 1e-2, "warmup": 0.0} | settings)
    return list(train(loaded.model, rows, valid, chosen, seed=seed, trunk=take_apart(loaded.model), should_stop=stop))


def of(events: list[Any], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def arrays_of(events: list[Any], kind: str = "last") -> dict[str, mx.array]:
    return dict(next(event.arrays for event in events if isinstance(event, Saved) and event.kind == kind))


def test_loss_falls_and_the_base_stays(tiny: LoadedModel) -> None:
    before = {name: np.array(array) for name, array in tree_flatten(tiny.model.parameters())}
    events = run(tiny, make_rows(40), make_rows(8, seed=1), epochs=4)
    finished = events[-1]
    assert finished.train_loss < of(events, Step)[0].loss - 0.3
    after = dict(tree_flatten(tiny.model.parameters()))
    for name, array in before.items():
        current = after.get(name, after.get(_inside(name)))
        assert np.array_equal(array, np.array(current)), name


def _inside(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module}.linear.{leaf}"


def test_same_seed_same_bytes_and_another_seed_other_bytes(tiny: LoadedModel) -> None:
    adapter = Adapter(rank=4, dropout=0.1)
    rows, valid = make_rows(20), make_rows(4, seed=1)
    one, same, other = (run(tiny, rows, valid, seed=seed, iters=6, adapter=adapter) for seed in (3, 3, 4))
    assert [event.loss for event in of(one, Step)] == [event.loss for event in of(same, Step)]
    for name, array in arrays_of(one).items():
        np.testing.assert_array_equal(array, arrays_of(same)[name], err_msg=name)
    assert not all(mx.array_equal(array, arrays_of(other)[name]) for name, array in arrays_of(one).items())


def test_evaluating_more_often_changes_nothing_about_training(tiny: LoadedModel) -> None:
    """A validation subset drawn from the RNG that orders training would."""
    adapter = Adapter(rank=4, dropout=0.1)
    rows, valid = make_rows(20), make_rows(6, seed=1)
    runs = [arrays_of(run(tiny, rows, valid, iters=6, eval_every=every, adapter=adapter)) for every in (None, 1)]
    assert all(mx.array_equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_accumulated_gradients_weigh_every_token_the_same(tiny: LoadedModel) -> None:
    """Averaging the means of micro-batches would weigh the tokens of short rows more."""
    rows = make_rows(8)
    whole = run(tiny, rows, [], iters=1, batch_size=8, optimizer="sgd", max_grad_norm=None)
    parts = run(tiny, rows, [], iters=1, batch_size=2, grad_accumulation=4, optimizer="sgd", max_grad_norm=None)
    for name, array in arrays_of(whole).items():
        np.testing.assert_allclose(array, arrays_of(parts)[name], atol=1e-6, err_msg=name)
    assert of(whole, Step)[0].loss == pytest.approx(of(parts, Step)[0].loss, rel=1e-5)


def test_one_sgd_step_equals_finite_differences(tiny: LoadedModel) -> None:
    rows = make_rows(4)
    wrappers = attach(tiny.model, Adapter(rank=2))
    path, wrapper = next(iter(wrappers.items()))
    wrapper.lora_b = 0.1 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(1))
    loss_sum = Loss(take_apart(tiny.model))
    arrays = as_arrays(collate(rows))
    _, gradients = nn.value_and_grad(tiny.model, loss_sum)(arrays)
    gradient = dict(tree_flatten(gradients))[f"{path}.lora_a"]
    original = wrapper.lora_a
    direction = mx.random.normal(original.shape, key=mx.random.key(2))
    direction = direction / mx.sqrt(mx.square(direction).sum())
    values = []
    for move in (0.05, -0.05):
        wrapper.lora_a = original + move * direction
        values.append(loss_sum(arrays).item())
    assert (values[0] - values[1]) / 0.1 == pytest.approx((gradient * direction).sum().item(), rel=2e-2, abs=2e-4)


def test_the_last_partial_step_is_trained(tiny: LoadedModel) -> None:
    rows = make_rows(11)
    events = run(tiny, rows, [], epochs=1)
    assert events[-1].iters == steps_per_epoch(11, batch_size=4, grad_accumulation=1) == 3
    assert events[-1].trained_tokens == sum(row.trained for row in rows)
    assert events[-1].stopped_by == "epochs"


def test_validation_smaller_than_a_batch_is_evaluated_whole(tiny: LoadedModel) -> None:
    valid = make_rows(3, seed=1)
    events = run(tiny, make_rows(8), valid, iters=2, eval_every=1)
    evaluations = of(events, Evaluated)
    assert [event.step for event in evaluations] == [0, 1, 2]
    attach(tiny.model, Adapter(rank=4))
    total = sum(Loss(take_apart(tiny.model))(as_arrays(collate([row]))).item() for row in valid)
    assert evaluations[0].loss == pytest.approx(total / sum(row.trained for row in valid), rel=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tiny: LoadedModel) -> None:
    rows = make_rows(8)
    poisoned = Row(rows[0].tokens, np.where(rows[0].weights > 0, np.inf, 0.0).astype(np.float32))
    events = run(tiny, [poisoned, *rows[1:]], [], epochs=1)
    assert [event.skipped for event in of(events, Step)].count(True) == 1
    assert events[-1].skipped_steps == 1
    assert all(mx.all(mx.isfinite(array)).item() for array in arrays_of(events).values())
    assert np.isfinite(events[-1].train_loss)


def test_three_steps_not_finite_in_a_row_end_the_run_with_what_was_learned(tiny: LoadedModel) -> None:
    rows = [Row(row.tokens, np.where(row.weights > 0, np.inf, 0).astype(np.float32)) for row in make_rows(40)]
    events = run(tiny, rows, [], epochs=1)
    assert events[-1].stopped_by == "nonfinite" and events[-1].iters == 3 and events[-1].train_loss is None
    assert all(mx.all(mx.isfinite(array)).item() for array in arrays_of(events).values())


@pytest.mark.real
def test_accumulating_costs_no_activations(tiny: LoadedModel) -> None:
    """All micro-batches in one graph would keep the activations of all of them."""
    row = Row(np.arange(200, dtype=np.int32) % 60, np.array([0.0] * 190 + [1.0] * 10, np.float32))
    rows = [row] * 16
    peaks = [
        run(tiny, rows, [], iters=1, batch_size=1, grad_accumulation=count)[-1].peak_memory_bytes for count in (1, 8)
    ]
    assert peaks[1] < 1.6 * peaks[0], peaks


def test_graphs_of_old_shapes_are_dropped(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "MOST_SHAPES", 2)
    compiled: list[int] = []
    original = step.Stepper._compile
    monkeypatch.setattr(step.Stepper, "_compile", lambda self: compiled.append(1) or original(self))
    rows = [
        Row(np.arange(n, dtype=np.int32) % 60, np.array([0.0] + [1.0] * (n - 1), np.float32)) for n in range(9, 90, 8)
    ]
    events = run(tiny, rows, [], epochs=1, batch_size=1)
    assert len(compiled) >= 4 and events[-1].iters == len(rows)


def test_patience_stops_and_the_best_is_kept(tiny: LoadedModel) -> None:
    valid = make_rows(6, seed=9)
    events = run(tiny, make_rows(8), valid, iters=60, eval_every=1, patience=3, learning_rate=0.5, optimizer="sgd")
    finished = events[-1]
    assert finished.stopped_by == "patience"
    assert finished.best_valid_loss == min(event.loss for event in of(events, Evaluated) if event.step)
    assert finished.iters < 60


def test_asked_to_stop_it_saves_what_was_learned(tiny: LoadedModel) -> None:
    """Not the adapter of step 0, whose loss is the only one measured so far."""
    asked = iter([False, False, True])  # the one validation batch, before the first step, before the second
    events = run(tiny, make_rows(40), make_rows(4), epochs=1, should_stop=lambda: next(asked))
    assert [type(event) for event in events] == [Evaluated, Step, Checkpoint, Interrupted, Saved, Finished]
    assert events[-1].valid_loss is None
    assert any(mx.any(array != 0).item() for name, array in arrays_of(events).items() if name.endswith("lora_b"))
    assert events[-1].stopped_by == "interrupted" and events[-1].iters == 1


def test_asked_to_stop_before_the_first_step_there_is_nothing_to_save(tiny: LoadedModel) -> None:
    events = run(tiny, make_rows(40), make_rows(4), epochs=1, should_stop=lambda: True)
    assert [type(event) for event in events] == [Interrupted, Finished]
    assert events[-1].stopped_by == "interrupted" and events[-1].iters == 0


def test_dropout_applies_in_training_only(tiny: LoadedModel) -> None:
    """A model that is never switched to training mode would train without dropout."""
    rows, valid = make_rows(8), make_rows(4, seed=1)
    plain = run(tiny, rows, valid, iters=3)
    dropped = run(tiny, rows, valid, iters=3, adapter=Adapter(rank=4, dropout=0.5))
    assert of(plain, Evaluated)[0].loss == of(dropped, Evaluated)[0].loss
    assert of(plain, Step)[2].loss != of(dropped, Step)[2].loss
    assert not tiny.model.training


def test_clipping_bounds_the_update(tiny: LoadedModel) -> None:
    start = {
        f"{path}.{name}": array
        for path, wrapper in attach(tiny.model, Adapter(rank=4)).items()
        for name, array in wrapper.adapter_arrays().items()
    }
    settings = {"iters": 1, "optimizer": "sgd", "schedule": "constant", "learning_rate": 1.0}
    events = run(tiny, make_rows(8), [], max_grad_norm=0.01, **settings)
    assert of(events, Step)[0].gradient_norm > 0.01
    moved = sum(mx.square(array - start[name]).sum().item() for name, array in arrays_of(events).items())
    assert moved**0.5 == pytest.approx(0.01, rel=1e-3)


def test_nothing_trainable_is_an_error(tiny: LoadedModel) -> None:
    with pytest.raises(TrainingError, match="nothing is trainable"):
        list(train(tiny.model, make_rows(4), [], fixed()))


def test_counts_of_positions_and_padding(tiny: LoadedModel) -> None:
    rows = make_rows(16)
    finished = run(tiny, rows, [], epochs=1)[-1]
    real = sum(len(row) - 1 for row in rows)
    assert finished.computed_tokens * (1 - finished.padding_fraction) == pytest.approx(real)
    assert finished.trainable_parameters == sum(
        array.size for _, array in tree_flatten(tiny.model.trainable_parameters())
    )


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "lion", "adafactor", "muon"])
def test_every_optimizer_learns(tiny: LoadedModel, optimizer: str) -> None:
    rate = {"sgd": 0.2, "lion": 1e-3, "muon": 2e-2}.get(optimizer, 1e-2)
    events = run(tiny, make_rows(16), make_rows(16), epochs=6, optimizer=optimizer, learning_rate=rate)
    evaluations = of(events, Evaluated)
    assert evaluations[-1].loss < evaluations[0].loss - 0.1


def ahead_of_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatch each step before the figures of the last one are read, as on a GPU."""
    monkeypatch.setattr(session, "device", SimpleNamespace(on_gpu=lambda: True))


def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Trained tokens of every step from now on, in the order in which they are dispatched."""
    tokens: list[int] = []
    original = step.Stepper.dispatch

    def noted(self: step.Stepper, batches: Any, trained: int, **named: Any) -> step.Pending:
        tokens.append(trained)
        return original(self, batches, trained, **named)

    monkeypatch.setattr(step.Stepper, "dispatch", noted)
    return tokens


def figures(events: list[Any]) -> list[str]:
    """What events say, but for times, memory and arrays; as text, so that NaN equals itself."""
    return [
        f"{type(event).__name__} "
        + ", ".join(f"{key}={value}" for key, value in said(event).items() if key not in MEASURED)
        for event in events
    ]


def said(event: Any) -> dict[str, Any]:
    return {**vars(event), **getattr(event, "progress", {}), "progress": None}


@pytest.mark.parametrize("overlapped", [False, True])
def test_steps_are_reported_once_in_order_each_with_its_own_figures(
    tiny: LoadedModel, overlapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a step with a rate of nothing is that of its rows, so another step's would show."""
    if overlapped:
        ahead_of_figures(monkeypatch)
    tokens = dispatched(monkeypatch)
    rows = make_rows(23)
    events = run(tiny, rows, [], epochs=2, batch_size=3, learning_rate=1e-12)
    steps = of(events, Step)
    assert [event.step for event in steps] == list(range(1, 17)) and {event.steps for event in steps} == {16}
    assert [event.tokens for event in steps] == tokens
    loss = Loss(take_apart(tiny.model))
    lengths = [len(row) for row in rows]
    plans = [
        plan
        for epoch in range(2)
        for plan in epoch_steps(lengths, batch_size=3, grad_accumulation=1, seed=0, epoch=epoch)
    ]
    for event, plan in zip(steps, plans, strict=True):
        batches = [collate(rows, lines) for lines in plan]
        total = sum(loss(as_arrays(one)).item() for one in batches)
        assert event.tokens == sum(one.trained for one in batches)
        assert event.loss == pytest.approx(total / event.tokens, rel=1e-5)
    assert len({round(event.loss, 6) for event in steps}) > 12


def test_learning_rates_are_those_of_their_steps(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = fixed(iters=6, warmup=0.34, learning_rate=1e-2)
    rate = optim.schedule(chosen, 6)
    expected = [pytest.approx(rate(mx.array(number)).item(), rel=1e-6) for number in range(6)]
    settings = chosen.model_dump(include={"iters", "warmup", "learning_rate"})
    assert [event.learning_rate for event in of(run(tiny, make_rows(8), [], **settings), Step)] == expected
    ahead_of_figures(monkeypatch)
    assert [event.learning_rate for event in of(run(tiny, make_rows(8), [], **settings), Step)] == expected


def test_dispatching_ahead_changes_neither_events_nor_bytes(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, valid = make_rows(18), make_rows(4, seed=1)
    rows[5] = Row(rows[5].tokens, np.where(rows[5].weights > 0, np.inf, 0.0).astype(np.float32))
    settings = {"iters": 9, "eval_every": 4, "save_every": 3, "adapter": Adapter(rank=4, dropout=0.1)}
    waited = run(tiny, rows, valid, **settings)
    ahead_of_figures(monkeypatch)
    overlapped = run(tiny, rows, valid, **settings)
    assert figures(waited) == figures(overlapped)
    assert any(event.skipped for event in of(waited, Step))
    for kind in (Saved, Checkpoint):
        for one, other in zip(of(waited, kind), of(overlapped, kind), strict=True):
            assert all(mx.array_equal(array, other.arrays[name]) for name, array in one.arrays.items()), kind


def test_dispatched_ahead_a_step_is_read_after_the_next_is_on_its_way(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead_of_figures(monkeypatch)
    tokens = dispatched(monkeypatch)
    attach(tiny.model, Adapter(rank=4))
    chosen = fixed(iters=5, batch_size=4)
    seen = []
    for event in train(tiny.model, make_rows(20), [], chosen, trunk=take_apart(tiny.model)):
        if isinstance(event, Step):
            seen.append((event.step, len(tokens)))
    assert seen == [(1, 2), (2, 3), (3, 4), (4, 5), (5, 5)]


def test_dispatched_ahead_three_steps_not_finite_still_end_the_run_at_the_third(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead_of_figures(monkeypatch)
    tokens = dispatched(monkeypatch)
    rows = [Row(row.tokens, np.where(row.weights > 0, np.inf, 0).astype(np.float32)) for row in make_rows(40)]
    events = run(tiny, rows, [], epochs=1)
    assert events[-1].stopped_by == "nonfinite" and events[-1].iters == len(tokens) == 3
    assert [event.skipped for event in of(events, Step)] == [True] * 3


def test_dispatched_ahead_an_interruption_reports_the_step_on_its_way(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead_of_figures(monkeypatch)
    tokens = dispatched(monkeypatch)
    asked = iter([False, False, False, True])  # the one validation batch, before the first three steps
    events = run(tiny, make_rows(40), make_rows(4), epochs=1, should_stop=lambda: next(asked))
    assert [type(event) for event in events] == [Evaluated, Step, Step, Checkpoint, Interrupted, Saved, Finished]
    assert [event.step for event in events[1:5]] == [1, 2, 2, 2] and events[-1].iters == len(tokens) == 2
    assert events[-1].trained_tokens == sum(tokens)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_small_budget_of_positions_changes_neither_steps_nor_result(
    tiny: LoadedModel, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(20)
    settings = {"epochs": 1, "batch_size": 6, "optimizer": optimizer, "learning_rate": 1e-3, "eval_every": 2}
    whole = run(tiny, rows, make_rows(6, seed=1), **settings)
    micros: list[int] = []
    original = session.as_arrays

    def noted(one: Batch, *states: Any) -> Any:
        micros.append(len(one.lines))
        return original(one, *states)

    monkeypatch.setattr(session, "as_arrays", noted)
    monkeypatch.setattr(batch, "MOST_POSITIONS", 48)
    parts = run(tiny, rows, make_rows(6, seed=1), **settings)
    assert max(micros) < 6 and len(micros) > 8, "the budget has to cut steps"
    assert len(of(whole, Step)) == len(of(parts, Step)) == 4
    for one, other in zip(of(whole, Step), of(parts, Step), strict=True):
        assert (one.tokens, one.loss) == (other.tokens, pytest.approx(other.loss, rel=1e-5))
    for one, other in zip(of(whole, Evaluated), of(parts, Evaluated), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
    for name, array in arrays_of(whole).items():
        np.testing.assert_allclose(array, arrays_of(parts)[name], atol=1e-5, err_msg=name)
