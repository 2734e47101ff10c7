"""Run a recurrence span by span; the backward pass recomputes each span from the state before it.

Autodiff through a loop over positions keeps several copies of the state for every position. Here only the inputs and
one state a span are kept. Spans run one after another, forward and backward, so only one span's temporaries are in
memory. The caller's `step` defines what a span computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx

Arrays = Sequence[mx.array]
Marks = Sequence[mx.array | None]
# Computes one span: (state before it, sequences, constants, marks) -> (y of the span, state after it)
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

    `sequences` (B, T, …) are cut into spans; every span gets all `constants`. Both have gradients, and so has `state`.
    `marks` (B, T) are masks and segments, without gradients; each may be None. `step` must be a pure function and the
    same object in every call. It must hold no array in its closure, because that array would get no gradient.
    """
    has_mark = tuple(mark is not None for mark in marks)
    run = _spans(step, len(sequences), len(constants), has_mark, span)
    y, *states = run(state, *sequences, *constants, *(mark for mark in marks if mark is not None))
    return y, states[-1]


@lru_cache
def _spans(step: Step, sequences: int, constants: int, has_mark: tuple[bool, ...], span: int) -> Callable[..., Any]:
    """A custom function that returns y, then the state after every span, from which the backward pass starts."""

    def inputs_of(positions: slice, inputs: Arrays, previous: Arrays) -> tuple[Arrays, Arrays, list[mx.array | None]]:
        """Sequences, constants and marks of one span, computed only after the arrays `previous`."""
        cut = [array[:, positions] for array in inputs[:sequences]]
        arrays = _depending_on(previous, [*cut, *inputs[sequences : sequences + constants]])
        marks = iter(inputs[sequences + constants :])
        cut_marks = [next(marks)[:, positions] if has else None for has in has_mark]
        return arrays[:sequences], arrays[sequences:], cut_marks

    def slices(length: int) -> list[slice]:
        return [slice(start, min(start + span, length)) for start in range(0, length, span)]

    @mx.custom_function  # type: ignore[untyped-decorator]
    def run(state: mx.array, *inputs: mx.array) -> tuple[mx.array, ...]:
        outputs: list[mx.array] = []
        states: list[mx.array] = []
        for positions in slices(inputs[0].shape[1]):
            cut, fixed, marks = inputs_of(positions, inputs, [outputs[-1], state] if outputs else [])
            y, state = step(state, cut, fixed, marks)
            outputs.append(y)
            states.append(state)
        return (_concatenated(outputs), *states)

    @run.vjp  # type: ignore[untyped-decorator]
    def run_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> tuple[mx.array, ...]:
        initial, *inputs = primals
        states = [initial, *outputs[1:-1]]  # before each span
        dy, dstate = cotangents[0], cotangents[-1]
        dsequences: list[list[mx.array]] = []
        dconstants: list[mx.array] = []
        previous = [dy, dstate]  # without this dependency, `mx.compile` would keep the forward pass's intermediates
        for positions, state in reversed(list(zip(slices(inputs[0].shape[1]), states, strict=True))):
            cut, fixed, marks = inputs_of(positions, inputs, previous)
            (state,) = _depending_on(previous, [state])

            def recompute(state: mx.array, *arrays: mx.array, marks: Any = marks) -> tuple[mx.array, mx.array]:
                return step(state, arrays[:sequences], arrays[sequences:], marks)

            _, (dstate, *dinputs) = mx.vjp(recompute, [state, *cut, *fixed], [dy[:, positions], dstate])
            dsequences.append(dinputs[:sequences])
            dfixed = dinputs[sequences:]
            dconstants = [a + b for a, b in zip(dconstants, dfixed, strict=True)] if dconstants else dfixed
            previous = [dstate, *dinputs[:sequences], *dconstants]
        concatenated = [_concatenated(list(spans)) for spans in zip(*reversed(dsequences), strict=True)]
        mark_arrays = inputs[sequences + constants :]
        zeros = (mx.broadcast_to(mx.zeros((), mark.dtype), mark.shape) for mark in mark_arrays)
        return (dstate, *concatenated, *dconstants, *zeros)

    return run  # type: ignore[no-any-return]


def _depending_on(previous: Arrays, arrays: Arrays) -> list[mx.array]:
    """`arrays`, computed only after the `previous` ones."""
    return list(mx.depends(list(arrays), list(previous))) if previous else list(arrays)


def _concatenated(spans: list[mx.array]) -> mx.array:
    """Spans, concatenated along the positions."""
    return spans[0] if len(spans) == 1 else mx.concatenate(spans, axis=1)
