"""Items made ahead in a thread: the same ones in the same order, never many too early, and no thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import count, islice

import numpy as np
import pytest

from mlx_lora.data.prefetch import DEPTH, prefetch


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 50])
def test_the_same_items_come_in_the_same_order(length: int, depth: int) -> None:
    assert list(prefetch(iter(range(length)), depth)) == list(range(length))
    assert not threads()


def test_items_that_are_none_false_or_arrays_are_items_like_others() -> None:
    items = [None, False, 0, (), np.zeros(3), np.zeros(0)]
    assert all(one is other for one, other in zip(prefetch(items), items, strict=True))


@pytest.mark.parametrize("depth", [1, DEPTH, 5])
def test_items_are_made_early_but_never_more_than_one_beyond_the_depth(depth: int) -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(40):
            made.append(number)
            yield number

    source = prefetch(items(), depth)
    assert not made and not threads(), "nothing runs before it is asked for"
    for taken, _ in enumerate(source, start=1):
        most = min(taken + depth + 1, 40)
        if taken in (1, 2, 10):
            assert until(lambda most=most: len(made) >= most - 1), "nothing is made ahead"  # type: ignore[misc]
            time.sleep(0.02)
        assert len(made) <= most
    assert made == list(range(40))


def test_items_are_made_in_one_other_thread() -> None:
    makers = set(prefetch(threading.get_ident() for _ in range(20)))
    assert len(makers) == 1 and threading.get_ident() not in makers


class Odd(BaseException):
    """Not an Exception, as KeyboardInterrupt isn't."""


@pytest.mark.parametrize("error", [ValueError, Odd])
@pytest.mark.parametrize("before", [0, 1, 6])
def test_an_error_comes_where_the_item_would_have_and_with_its_own_traceback(
    before: int, error: type[BaseException]
) -> None:
    def breaking() -> Iterator[int]:
        yield from range(before)
        raise error("row 7 is broken")

    got: list[int] = []
    with pytest.raises(error, match="row 7 is broken") as caught:
        got.extend(prefetch(breaking()))  # extend keeps what came before the error
    assert got == list(range(before))
    assert "breaking" in [entry.name for entry in caught.traceback]
    assert not threads()


def test_closing_early_stops_the_thread_even_where_nothing_ends() -> None:
    source = prefetch(count())
    assert list(islice(source, 5)) == [0, 1, 2, 3, 4]
    assert len(threads()) == 1
    source.close()
    assert not threads()
    with pytest.raises(StopIteration):
        next(source)


def test_an_error_of_the_consumer_stops_the_thread() -> None:
    source = prefetch(count())
    with pytest.raises(ZeroDivisionError):
        try:
            for number in source:
                1 / (3 - number)
        finally:
            source.close()
    assert not threads()


def test_a_source_that_is_dropped_stops_its_thread() -> None:
    source = prefetch(count())
    next(source)
    del source
    assert until(lambda: not threads())


def test_two_sources_run_side_by_side() -> None:
    assert list(zip(prefetch(range(30)), prefetch(range(30, 60)), strict=True)) == list(
        zip(range(30), range(30, 60), strict=True)
    )
    assert not threads()
