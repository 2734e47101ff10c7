"""A row that has no room in memory waits, or is refused, and a machine about to swap loses one row, not all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_lora.errors import NoMemory
from mlx_lora.machine import limits
from mlx_lora.models.load import LoadedModel, load
from mlx_lora.serve import room
from mlx_lora.serve.prompt_cache import PromptCache
from mlx_lora.serve.requests import Answer, Failed, Finished, Request, Token
from mlx_lora.serve.room import Room
from mlx_lora.serve.running import Row
from mlx_lora.serve.scheduler import Scheduler
from tests.serve.requests import prompt
from tests.serve.test_scheduler import wait_for

ROW = 2 * 3 * 2 * 16 * 4 * 256  # keys and values: layers, heads, head size, bytes, tokens


class Machine:
    free = 1 << 30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose free bytes the test sets."""
    found = Machine()
    monkeypatch.setattr(limits, "free_bytes", lambda: found.free)
    monkeypatch.setattr(room, "LOOK", 0.0)
    return found


@pytest.fixture
def scheduler(tiny_path: Path) -> Iterator[Scheduler]:
    with Scheduler(lambda: load(tiny_path)) as running:
        yield running


def test_a_row_without_room_is_refused_where_nothing_runs(scheduler: Scheduler, machine: Machine) -> None:
    machine.free = ROW - 1
    with pytest.raises(NoMemory, match="5 tokens and their answer take"):
        scheduler.submit(Request(prompt(5), max_tokens=4)).tokens()
    machine.free = ROW
    assert len(scheduler.submit(Request(prompt(5), max_tokens=4)).tokens()) == 4
    with pytest.raises(NoMemory):
        scheduler.submit(Request(prompt(300), max_tokens=4)).tokens()


def test_a_row_without_room_waits_for_those_that_run(scheduler: Scheduler, machine: Machine) -> None:
    first = scheduler.submit(Request(prompt(5), max_tokens=100_000))
    assert not isinstance(first.next(timeout=20), Failed)
    machine.free = ROW - 1
    second = scheduler.submit(Request(prompt(6), max_tokens=4))
    for _ in range(5):
        while not isinstance(first.next(timeout=20), Token):
            pass
    assert scheduler.status().waiting == 1
    machine.free = 1 << 30
    assert len(second.tokens()) == 4
    first.cancel()


def test_rows_that_wait_look_at_the_machine_now_and_then(
    tiny_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    found = room.Room(load(tiny_path).model, PromptCache(0))
    monkeypatch.setattr(limits, "free_bytes", lambda: looks.append(1) or 0)
    rows = [Row(Request(prompt(5)), print, prompt=[1] * 5, most=4) for _ in range(50)]
    monkeypatch.setattr(room, "LOOK", 60.0)
    assert not any(found.admits(row, rows[:1]) for row in rows[1:])
    assert len(looks) == 2, "before and after prompts were let go"
    with pytest.raises(NoMemory):
        found.admits(rows[0], [])


def test_a_row_that_waits_for_memory_is_not_passed_by_smaller_ones(scheduler: Scheduler, machine: Machine) -> None:
    first = scheduler.submit(Request(prompt(5), max_tokens=100_000))
    while not isinstance(first.next(timeout=20), Token):
        pass
    machine.free = 2 * ROW - 1
    large, small = (scheduler.submit(Request(prompt(length), max_tokens=4)) for length in (300, 6))
    for _ in range(5):
        while not isinstance(first.next(timeout=20), Token):
            pass
    assert scheduler.status().waiting == 2
    machine.free = 1 << 30
    assert len(large.tokens()) == len(small.tokens()) == 4
    first.cancel()


def test_rows_that_have_just_begun_count_with_what_they_will_take(tiny: LoadedModel, machine: Machine) -> None:
    found, tokens = Room(tiny.model, PromptCache(0)), list(prompt(5))
    new, begun = (Row(Request(tuple(tokens)), lambda event: None, prompt=tokens, most=4) for _ in range(2))
    machine.free = 2 * ROW - 1
    assert found.admits(new, []) and not found.admits(new, [begun])
    begun.read = 5
    assert found.admits(new, [begun])


def test_before_the_machine_swaps_prompts_go_first_and_then_the_last_row(
    scheduler: Scheduler, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler.submit(Request(prompt(9), max_tokens=3)).tokens()
    assert scheduler.status().prompt_cache_bytes > 0
    answers = [scheduler.submit(Request(prompt(5, seed), max_tokens=200)) for seed in range(2)]
    for answer in answers:
        while not isinstance(answer.next(timeout=20), Token):
            pass

    def about_to_swap() -> int:  # until the second row is gone
        return -1 if scheduler.status().running + scheduler.status().waiting == 2 else 1 << 30

    monkeypatch.setattr(limits, "free_bytes", about_to_swap)
    events = [last_of(answer) for answer in answers]
    assert isinstance(events[0], Finished) and events[0].generated_tokens == 200
    assert isinstance(events[1], NoMemory) and "about to swap" in str(events[1])
    wait_for(lambda: scheduler.status().running == 0)


def last_of(answer: Answer) -> object:
    """The last event, or the error."""
    try:
        return list(answer)[-1]
    except NoMemory as error:
        return error
