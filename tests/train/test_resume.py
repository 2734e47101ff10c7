"""A run that goes on from a checkpoint ends in the bytes of one that was never stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.data import batch
from mlx_lora.errors import TrainingError
from mlx_lora.machine import device
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.store.run import checkpoint_folders
from mlx_lora.train import checkpoint
from mlx_lora.train.budget.choose import Lengths, Plan, Way, plan
from mlx_lora.train.budget.costs import costs
from mlx_lora.train.checkpoint import EACH, Progress, Stored
from mlx_lora.train.events import Checkpoint, Evaluated, Event, Finished, Note, Saved, Step
from mlx_lora.train.trainer import train
from tests.fixed import fixed
from tests.train.test_trainer import make_rows, of

STEPS = 8
ROWS, VALID = make_rows(14), make_rows(4, seed=1)
CASES: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam"},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd"},
    "lion": {"optimizer": "lion", "learning_rate": 1e-3},
    "adafactor": {"optimizer": "adafactor"},
    "muon": {"optimizer": "muon"},
    "accumulation": {"batch_size": 2, "grad_accumulation": 2},
    "checkpointing": {"grad_checkpoint": "on"},
    "packing": {"packing": True},
    "prefix": {"cache_prefix": "on", "dropout": 0.1, "layers": 1},
    "prefix, packing": {"cache_prefix": "on", "packing": True, "layers": 1},
    "loraplus": {"loraplus_ratio": 16},
    "adalora": {"adapter": {"method": "adalora", "target_rank": 1, "prune_every": 2, "prune_until": 0.7}},
    "pissa": {"adapter": {"init": "pissa"}},
}

BY_DEFAULT = ("adam", "accumulation", "prefix, packing", "adalora")


def events_of(loaded: LoadedModel, *, resume: Checkpoint | None = None, **case: Any) -> Iterator[Event]:
    """A run with dropout that evaluates and saves at every step."""
    dropout, layers = case.pop("dropout", 0.1), case.pop("layers", "all")
    adapter = Adapter(rank=4, dropout=dropout, layers=layers, **case.pop("adapter", {}))
    packing, should_stop = case.pop("packing", False), case.pop("should_stop", lambda: False)
    made = case.pop("plan", None)
    chosen = {"batch_size": 4, "learning_rate": 1e-2, "warmup": 0.3, "iters": STEPS, "eval_every": 2, "save_every": 1}
    attach(loaded.model, adapter, seed=5)
    return train(
        loaded.model, ROWS, VALID, fixed(**chosen | case), seed=5, trunk=take_apart(loaded.model), packing=packing,
        plan=made, resume=resume, should_stop=should_stop,
    )  # fmt: skip


def assert_same_end(one: list[Event], other: list[Event]) -> None:
    for kind in ("best", "last"):
        first, second = ([e for e in of(events, Saved) if e.kind == kind][-1:] for events in (one, other))
        if kind == "best" and not second:  # it was found before the checkpoint
            continue
        assert first[0].step == second[0].step
        for name, array in first[0].arrays.items():
            np.testing.assert_array_equal(array, second[0].arrays[name], err_msg=f"{kind} {name}")
    later = {event.step: event.loss for event in of(other, Step | Evaluated)}  # type: ignore[arg-type]
    assert {event.step: event.loss for event in of(one, Step | Evaluated) if event.step in later} == later  # type: ignore[arg-type]
    measured = {"seconds", "tokens_per_second", "peak_memory_bytes", "largest_micro_batch"}  # of one process each
    ends = [{k: v for k, v in vars(of(events, Finished)[0]).items() if k not in measured} for events in (one, other)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.real) for name in CASES]
)
def test_every_checkpoint_leads_to_the_same_bytes(tiny: LoadedModel, tmp_path: Path, name: str) -> None:
    whole = list(events_of(tiny, **CASES[name]))
    saved = of(whole, Checkpoint)
    assert [event.step for event in saved] == list(range(1, STEPS))
    for made in (saved[1], saved[4]):  # in the first epoch, and in the second
        checkpoint.write(tmp_path, made, best={}, made_of={}, metrics_bytes=0)
        read = checkpoint.newest(tmp_path).checkpoint
        assert_same_end(whole, list(events_of(tiny, resume=read, **CASES[name])))


def test_an_interrupted_run_goes_on_where_it_was(tiny: LoadedModel) -> None:
    whole = list(events_of(tiny))
    taken: list[Event] = []
    # so that the evaluation after the step is cut off
    stops = lambda: any(event.step == 4 for event in of(taken, Step))  # noqa: E731
    for event in events_of(tiny, should_stop=stops, save_every=None):
        taken.append(event)
    (made,) = of(taken, Checkpoint)
    assert made.step == 4 and of(taken, Finished)[0].stopped_by == "interrupted"
    assert [event.step for event in of(taken, Evaluated)] == [0, 2]
    rest = list(events_of(tiny, resume=made))
    assert [event.step for event in of(rest, Evaluated)] == [4, 6, 8]
    assert_same_end(whole, rest)


def test_without_save_every_the_clock_decides(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not of(list(events_of(tiny, save_every="auto")), Checkpoint)
    monkeypatch.setattr("mlx_lora.train.saving.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("mlx_lora.train.saving.MOST_SHARE", 1.0)
    assert len(of(list(events_of(tiny, save_every="auto")), Checkpoint)) == STEPS - 1
    assert not of(list(events_of(tiny, save_every=None)), Checkpoint)


def plan_of(loaded: LoadedModel, limit: int, **case: Any) -> Plan:
    """The plan of a run of `events_of` within `limit` bytes."""
    settings = fixed(**{"batch_size": 4, "iters": STEPS} | case)
    attach(loaded.model, Adapter(rank=4, dropout=0.1), seed=5)
    lengths = Lengths([len(row) for row in ROWS], max(row.trained for row in ROWS))
    return plan(costs(loaded.model, settings, dtype=mx.float32, gpu=False), lengths, settings, limit)


def test_what_a_run_chose_by_itself_is_kept(tiny: LoadedModel) -> None:
    """Free memory is another one after a restart, and each choice may change the last bit."""
    tight, wide = plan_of(tiny, 1), plan_of(tiny, 1 << 40)
    assert tight.recompute and not wide.recompute and tight.most_positions < wide.most_positions
    tight = replace(tight, limit_bytes=1 << 40)  # or it would stop the run
    whole = list(events_of(tiny, grad_checkpoint="auto", plan=tight))
    made = of(whole, Checkpoint)[0]
    assert made.progress["recomputes"] is True and made.progress["most_positions"] == tight.most_positions
    assert made.progress["keeps_prefix"] is False
    rest = list(events_of(tiny, grad_checkpoint="auto", plan=wide, resume=made))
    assert_same_end(whole, rest)


def test_over_the_limit_a_run_saves_and_stops(tiny: LoadedModel) -> None:
    """On a GPU, whose next step is on its way by then, behind that one."""
    made = replace(plan_of(tiny, 1 << 40), limit_bytes=1)
    taken = list(events_of(tiny, plan=made, save_every=None))
    steps = [1, 2] if device.on_gpu() else [1]
    assert [event.step for event in of(taken, Step)] == steps and of(taken, Finished)[0].stopped_by == "memory"
    assert "over the limit of 1 B" in of(taken, Note)[-1].text
    (saved,) = of(taken, Checkpoint)
    assert_same_end(list(events_of(tiny)), list(events_of(tiny, resume=saved)))


def test_after_a_memory_stop_the_run_goes_on_in_the_next_smaller_way(tiny: LoadedModel) -> None:
    """Stopped at its first step, a run used to be planned again as it was, and to stop there again."""
    made = replace(plan_of(tiny, 1 << 40), limit_bytes=1)
    (saved,) = of(list(events_of(tiny, plan=made, save_every=None, grad_checkpoint="auto")), Checkpoint)
    stopped = Way(*saved.progress["too_large"])
    assert stopped == made.way
    attach(tiny.model, Adapter(rank=4, dropout=0.1), seed=5)
    settings = fixed(batch_size=4, iters=STEPS)
    lengths = Lengths([len(row) for row in ROWS], max(row.trained for row in ROWS))
    counted = costs(tiny.model, settings, dtype=mx.float32, gpu=False)
    smaller = plan(counted, lengths, settings, 1 << 40, smaller_than=stopped)
    assert smaller.way != stopped and smaller.peak_memory_bytes < made.peak_memory_bytes
    rest = list(events_of(tiny, plan=smaller, resume=saved, grad_checkpoint="auto"))
    assert of(rest, Finished)[0].iters == STEPS


def test_an_overruled_run_isn_t_stopped_by_its_limit(tiny: LoadedModel) -> None:
    made = replace(plan_of(tiny, 1 << 40), limit_bytes=1, overruled=True)
    assert of(list(events_of(tiny, plan=made)), Finished)[0].stopped_by == "iters"


def test_a_batch_over_the_limit_is_split_with_the_same_gradient(tiny: LoadedModel) -> None:
    limit = plan_of(tiny, 1, batch_size=14).peak_memory_bytes + 4096
    unsplit, split_up = plan_of(tiny, 1 << 40), plan_of(tiny, limit)
    assert split_up.fits and split_up.micro.positions < unsplit.micro.positions
    sgd = {"optimizer": "sgd", "iters": 1, "batch_size": 14, "max_grad_norm": None, "dropout": 0.0, "warmup": 0.0}
    moved = [of(list(events_of(tiny, plan=one, **sgd)), Saved)[-1].arrays for one in (unsplit, split_up)]
    start = {name: array for name, array in moved[0].items()}
    for name, array in start.items():
        np.testing.assert_allclose(array, moved[1][name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_data_state_is_a_counter(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were trained on before the checkpoint aren't laid into batches again."""
    made = of(list(events_of(tiny)), Checkpoint)[5]
    collated = []
    original = batch.collate
    monkeypatch.setattr("mlx_lora.train.session.collate", lambda *a, **k: collated.append(a) or original(*a, **k))
    rest = list(events_of(tiny, resume=made))
    assert len(of(rest, Step)) == len(collated) == STEPS - 6


def test_another_adapter_is_refused(tiny: LoadedModel) -> None:
    made = of(list(events_of(tiny)), Checkpoint)[0]
    for case in ({"optimizer": "sgd"}, {"layers": 1}):
        with pytest.raises(TrainingError, match="other arrays"):
            list(events_of(tiny, resume=made, **case))


def example(step: int = 3) -> Checkpoint:
    arrays = {"adapter.x": mx.arange(6.0).reshape(2, 3) / 7, "random": mx.array([1, 2], mx.uint32)}
    return Checkpoint(step, arrays, {**checkpoint.Progress(step=step).as_dict(), "recent": [[0.1 + 0.2, 3]]})


def test_a_checkpoint_reads_back_exactly(tmp_path: Path) -> None:
    made = example()
    checkpoint.write(tmp_path, made, best={"x": mx.ones((1,))}, made_of={"a.b": [1, "x"]}, metrics_bytes=12)
    stored = checkpoint.newest(tmp_path)
    for name, array in made.arrays.items():
        assert stored.checkpoint.arrays[name].dtype == array.dtype and mx.array_equal(
            stored.checkpoint.arrays[name], array
        )
    assert list(stored.best) == ["x"] and stored.metrics_bytes == 12
    assert stored.progress.recent[0] == (0.1 + 0.2, 3) and stored.progress.step == 3
    assert stored.differences({"a.b": [1, "x"]}) == []
    assert stored.differences({"a.b": [1, "y"], "c": 1}) == ["a.b was [1, 'x'], is [1, 'y']", "c was None, is 1"]


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10):
        checkpoint.write(tmp_path, example(step), best={}, made_of={}, metrics_bytes=0)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


@pytest.mark.parametrize("damage", ["weights", "state", "version", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        checkpoint.write(tmp_path, example(step), best={}, made_of={}, metrics_bytes=0)
    folder = tmp_path / "checkpoint-2"
    weights, state = folder / checkpoint.WEIGHTS, folder / checkpoint.STATE
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    elif damage == "state":
        state.write_text(state.read_text()[:-9])
    elif damage == "version":
        values = json.loads(state.read_text())
        state.write_text(json.dumps({**values, "progress": {**values["progress"], "unknown": 1}}))
        with pytest.raises(TrainingError, match="another version"):
            _ = checkpoint.newest(tmp_path).progress
        return
    else:
        weights.unlink()
    assert checkpoint.newest(tmp_path).checkpoint.step == 1


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no checkpoint to go on from"):
        checkpoint.newest(tmp_path)
    checkpoint.write(tmp_path, example(), best={}, made_of={}, metrics_bytes=0)
    (tmp_path / "checkpoint-3" / checkpoint.STATE).unlink()
    with pytest.raises(TrainingError, match="no checkpoint can be read"):
        checkpoint.newest(tmp_path)


def test_the_counters_of_a_group_s_checkpoint_are_read_before_its_processes_meet(tiny: LoadedModel) -> None:
    """Which way a run was run is asked for before it is known how many processes go on with it."""
    (first, *_) = of(list(events_of(tiny, save_every=2)), Checkpoint)
    of_group = replace(first, progress=first.progress | {EACH: [{"recomputes": False}, {"recomputes": False}]})
    assert Stored(of_group, {}, {}, 0).progress == Progress.read(first.progress)
