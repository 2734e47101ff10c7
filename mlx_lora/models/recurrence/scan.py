"""A recurrence run span by span, whose backward pass computes each span again from the state that entered it.

Autodiff through a loop over positions keeps a few copies of the state for each of them. Here the inputs and one state
a span are kept. Spans run one after another, forward and backward, so that the temporaries of one span are alive at a
time; this file doesn't know what a span computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx

Arrays = Sequence[mx.array]
Marks = Sequence[mx.array | None]
# (state, sequences, constants, marks) of one span -> (y of the span, state after it)
Step = Callable[[mx.array, Arrays, Arrays, Marks], tuple[mx.array, mx.array]]


def scan(
    step: Step,
    state: mx.array,
    sequences: Arrays,
    constants: Arrays = (),
    marks: Marks = (),
    *,
    span: int,
) -> tuple[mx.array, mx.array]:
    """y (B, T, …) and the final state of `step` over spans of `span` positions.

    `sequences` (B, T, …) are cut into spans, `constants` are handed to every one: gradients flow to both and to
    `state`. `marks` (B, T) are masks and segments, which have no gradient; one may be None. `step` must be a pure
    function, the same object every time, that holds no array in its closure: an array there would get no gradient.
    """
    present = tuple(mark is not None for mark in marks)
    run = _spans(step, len(sequences), len(constants), present, span)
    y, *states = run(state, *sequences, *constants, *(mark for mark in marks if mark is not None))
    return y, states[-1]


@lru_cache
def _spans(step: Step, sequences: int, constants: int, present: tuple[bool, ...], span: int) -> Callable[..., Any]:
    """The custom function: y, then the state after every span, which the backward pass starts from."""

    def parts(inputs: Arrays, here: slice, after: Arrays) -> tuple[list[mx.array], Arrays, list[mx.array | None]]:
        """Sequences, constants and marks of one span, there once the arrays of `after` are."""
        cut = [array[:, here] for array in inputs[:sequences]]
        given = _after([*cut, *inputs[sequences : sequences + constants]], after)
        marks = iter(inputs[sequences + constants :])
        return given[:sequences], given[sequences:], [next(marks)[:, here] if there else None for there in present]

    def slices(length: int) -> list[slice]:
        return [slice(start, min(start + span, length)) for start in range(0, length, span)]

    @mx.custom_function  # type: ignore[untyped-decorator]
    def run(state: mx.array, *inputs: mx.array) -> tuple[mx.array, ...]:
        made: list[mx.array] = []
        states: list[mx.array] = []
        for here in slices(inputs[0].shape[1]):
            found, fixed, marks = parts(inputs, here, [made[-1], state] if made else [])
            y, state = step(state, found, fixed, marks)
            made.append(y)
            states.append(state)
        return (_joined(made), *states)

    @run.vjp  # type: ignore[untyped-decorator]
    def run_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> tuple[mx.array, ...]:
        first, *inputs = primals
        starts = [first, *outputs[1:-1]]
        by_y, by_state = cotangents[0], cotangents[-1]
        by_sequences: list[list[mx.array]] = []
        by_constants: list[mx.array] = []
        after = [by_y, by_state]  # or a compiled graph would keep what the forward pass has computed
        for here, start in reversed(list(zip(slices(inputs[0].shape[1]), starts, strict=True))):
            found, fixed, marks = parts(inputs, here, after)
            (start,) = _after([start], after)

            def again(state: mx.array, *arrays: mx.array, marks: Any = marks) -> tuple[mx.array, mx.array]:
                return step(state, arrays[:sequences], arrays[sequences:], marks)

            _, (by_state, *by_inputs) = mx.vjp(again, [start, *found, *fixed], [by_y[:, here], by_state])
            by_sequences.append(by_inputs[:sequences])
            sums = by_inputs[sequences:]
            by_constants = [a + b for a, b in zip(by_constants, sums, strict=True)] if by_constants else sums
            after = [by_state, *by_inputs[:sequences], *by_constants]
        joined = [_joined(list(made)) for made in zip(*reversed(by_sequences), strict=True)]
        marked = inputs[sequences + constants :]
        frozen = (mx.broadcast_to(mx.zeros((), mark.dtype), mark.shape) for mark in marked)
        return (by_state, *joined, *by_constants, *frozen)

    return run  # type: ignore[no-any-return]


def _after(arrays: Arrays, earlier: Arrays) -> list[mx.array]:
    """The arrays, there once the `earlier` ones are."""
    return list(mx.depends(list(arrays), list(earlier))) if earlier else list(arrays)


def _joined(parts: list[mx.array]) -> mx.array:
    """Spans behind one another."""
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
