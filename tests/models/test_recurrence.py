"""Chunked recurrences: values and all gradients as position by position, packed rows as alone, little kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import gated_delta

from mlx_lora.models import recurrence
from mlx_lora.models.recurrence import chunks
from mlx_lora.models.recurrence.triangular import unit_lower_inverse
from tests.models.recurrences import KINDS, Inputs, Kind, exact

TOLERANCE = 1e-4
EVERY = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(autouse=True)
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of two chunks, so that states pass between chunks and between spans."""
    monkeypatch.setattr(chunks, "span_length", lambda _: 2 * chunks.CHUNK)


def distance(found: Any, wanted: Any) -> float:
    """Largest difference, relative to the largest value."""
    found, wanted = (np.array(x).astype(np.float64) for x in (found, wanted))
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30))


def weights(function: Callable[..., Any], inputs: Inputs, valid: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """Random weights of y and of the state, 0 where y isn't `valid`."""
    y, state = function(*inputs.values())
    mx.random.seed(1)
    of_y, of_state = mx.random.normal(y.shape), mx.random.normal(state.shape)
    if valid is not None:
        axis = 1 if y.shape[1] == valid.shape[1] else 2
        of_y = of_y * mx.expand_dims(valid, [d for d in range(1, 4) if d != axis])
    return of_y, of_state


def measured(function: Callable[..., Any], inputs: Inputs, given: tuple[mx.array, mx.array]) -> dict[str, mx.array]:
    """y times its weights' support, the state, and the gradient by every input."""

    def loss(*arrays: mx.array) -> mx.array:
        y, state = function(*arrays)
        return (y * given[0]).sum() + (state * given[1]).sum()

    y, state = function(*inputs.values())
    gradients = mx.grad(loss, argnums=list(range(len(inputs))))(*inputs.values())
    return {"y": y * (given[0] != 0), "final": state, **dict(zip(inputs, gradients, strict=True))}


def check(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    far = {key: d for key in wanted if not (d := distance(found[key], wanted[key])) <= TOLERANCE}
    assert not far


def check_exact(name: str, inputs: Inputs) -> None:
    kind = KINDS[name]
    given = weights(kind.ours, inputs)
    y, state, by = exact(name, inputs, tuple(np.array(x).astype(np.float64) for x in given))
    check(measured(kind.ours, inputs, given), {"y": y, "final": state, **{key: by[key] for key in inputs}})


@EVERY
@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
def test_values_and_gradients_are_those_of_mlx_lm(name: str, length: int) -> None:
    kind, inputs = KINDS[name], KINDS[name].inputs(length)
    given = weights(kind.ours, inputs)
    check(measured(kind.ours, inputs, given), measured(kind.theirs, inputs, given))


@EVERY
@pytest.mark.parametrize("length", [100, 1000])
def test_values_and_gradients_are_those_of_a_float64_loop(name: str, length: int) -> None:
    check_exact(name, KINDS[name].inputs(length, lines=1, keys=2, heads=2, k=8, v=4))


@EVERY
def test_chunks_of_a_gpu_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", chunks.CHUNK_GPU)
    check_exact(name, KINDS[name].inputs(150, lines=1))


@EVERY
def test_no_state_is_a_state_of_zeros(name: str) -> None:
    kind, inputs = KINDS[name], KINDS[name].inputs(70)
    inputs[kind.state] = mx.zeros_like(inputs[kind.state])
    found = kind.ours(*[None if key == kind.state else x for key, x in inputs.items()])
    assert all(distance(a, b) <= 1e-6 for a, b in zip(found, kind.ours(*inputs.values()), strict=True))


LENGTHS = (65, 1, 20, 130, 44)


def row_of(kind: Kind, inputs: Inputs, start: int, length: int, *, first: bool) -> Inputs:
    """The inputs of one packed row alone; only the first has the state."""
    here = (slice(None),) * kind.axis + (slice(start, start + length),)
    alone = {key: x[here] if key in kind.rows else x for key, x in inputs.items()}
    alone[kind.state] = inputs[kind.state] if first else mx.zeros_like(inputs[kind.state])
    return alone


@EVERY
def test_packed_rows_are_computed_as_alone(name: str) -> None:
    kind, inputs = KINDS[name], KINDS[name].inputs(sum(LENGTHS))
    segments = mx.broadcast_to(mx.array(
        [number for number, length in zip((3, 1, 2, 7, 4), LENGTHS, strict=True) for _ in range(length)]
    ), (2, sum(LENGTHS)))  # fmt: skip
    of_y, of_state = weights(kind.ours, inputs)
    found = measured(lambda *arrays: kind.ours(*arrays, segments=segments), inputs, (of_y, of_state))
    start, alone = 0, []
    for index, length in enumerate(LENGTHS):
        here = (slice(None),) * kind.axis + (slice(start, start + length),)
        last = index == len(LENGTHS) - 1
        given = (of_y[here], of_state if last else mx.zeros_like(of_state))
        alone.append(measured(kind.theirs, row_of(kind, inputs, start, length, first=not index), given))
        start += length
    wanted = {key: mx.concatenate([x[key] for x in alone], axis=kind.axis) for key in ("y", *kind.rows)}
    whole = {key: sum(x[key] for x in alone) for key in inputs if key not in (*kind.rows, kind.state)}
    check(found, {**wanted, **whole, kind.state: alone[0][kind.state], "final": alone[-1]["final"]})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "lightning"])
def test_padding_leaves_the_state_alone(name: str, side: str) -> None:
    """Rows of a padded batch, of which mlx_lm runs each alone: its Mamba loses the state before right padding."""
    kind, inputs, lengths = KINDS[name], KINDS[name].inputs(150), (150, 70)
    places = mx.arange(150)
    mask = mx.stack([places >= 150 - n if side == "left" else places < n for n in lengths])
    of_y, of_state = weights(kind.ours, inputs, mask)
    found = measured(lambda *arrays: kind.ours(*arrays, mask=mask), inputs, (of_y, of_state))
    for line, length in enumerate(lengths):
        start = 150 - length if side == "left" else 0
        batched = (*kind.rows, kind.state)
        cut = {key: x[line : line + 1] if key in batched else x for key, x in inputs.items()}
        here = (slice(None),) * kind.axis + (slice(start, start + length),)
        given = (of_y[line : line + 1][here], of_state[line : line + 1])
        alone = measured(kind.theirs, row_of(kind, cut, start, length, first=True), given)
        ours = {key: found[key][line : line + 1] for key in ("y", "final", *batched)}
        ours |= {key: ours[key][here] for key in ("y", *kind.rows)}
        check(ours, {key: alone[key] for key in ours})


GATED = pytest.mark.parametrize("name", [name for name in KINDS if name[0] in "gc"])


@GATED
def test_nearly_parallel_keys_and_full_updates_stay_exact(name: str) -> None:
    """Repeated text makes such keys. β is 0.98 here, and 1.96 with negative eigenvalues: mlx_lm's float32 loop is no
    reference for these, the float64 loop is."""
    inputs = KINDS[name].inputs(130, lines=1, keys=1, heads=2)
    inputs["k"] = inputs["k"][:, :1] + 0.003 * mx.random.normal(inputs["k"].shape)
    inputs["k"] = inputs["k"] / mx.linalg.norm(inputs["k"], axis=-1, keepdims=True)
    inputs |= {"a": inputs["a"] - 8.0, "b": mx.full(inputs["b"].shape, 4.0)}
    check_exact(name, inputs)


@pytest.mark.parametrize("name", ["gated", "channels", "mamba"])
@pytest.mark.parametrize("strength", ["everywhere", "once"])
def test_very_strong_decays_stay_exact(name: str, strength: str) -> None:
    """log α of about -20 at every position, or of -5000 at a few with weak decays around them."""
    inputs = KINDS[name].inputs(150, lines=1)
    gate = "dt" if name == "mamba" else "a"
    inputs |= {"A_log": mx.zeros_like(inputs["A_log"]), "dt_bias": mx.zeros_like(inputs["dt_bias"])}
    if strength == "everywhere":
        inputs[gate] = inputs[gate] + 20.0
    else:
        steps = mx.expand_dims(mx.arange(150) % 41 == 5, [0, *range(2, inputs[gate].ndim)])
        inputs[gate] = mx.where(steps, 5000.0 if name != "mamba" else 99.0, inputs[gate] - 3.0)
    check_exact(name, inputs)


def test_a_compiled_gradient_is_the_same() -> None:
    """Of one kind: every kernel to compile costs a second on Linux. The function runs twice, for y and for gradients:
    `mx.compile` merges what is equal."""
    kind, inputs = KINDS["gated"], KINDS["gated"].inputs(128)
    given = weights(kind.ours, inputs)

    def gradients(*arrays: mx.array) -> dict[str, mx.array]:
        return measured(kind.ours, dict(zip(inputs, arrays, strict=True)), given)

    check(mx.compile(gradients)(*inputs.values()), gradients(*inputs.values()))


@EVERY
def test_a_checkpointed_gradient_is_the_same(name: str) -> None:
    kind, inputs = KINDS[name], KINDS[name].inputs(140)
    given = weights(kind.ours, inputs)
    check(measured(mx.checkpoint(kind.ours), inputs, given), measured(kind.ours, inputs, given))


@EVERY
def test_half_precision_keeps_its_dtype_and_a_float32_state(name: str) -> None:
    kind = KINDS[name]
    inputs = {key: x.astype(mx.bfloat16) for key, x in kind.inputs(70).items()}
    (first, *_), made = inputs.values(), kind.ours(*inputs.values())
    assert [x.dtype for x in made] == [first.dtype, mx.float32]
    found = measured(kind.ours, inputs, weights(kind.ours, inputs))
    assert all(found[key].dtype == mx.bfloat16 for key in inputs)


@pytest.fixture
def real_spans(monkeypatch: pytest.MonkeyPatch, short_spans: None) -> Iterator[None]:
    monkeypatch.undo()
    yield


def peak(function: Callable[..., Any], length: int) -> int:
    """Bytes that a gradient adds, of eight heads of 64 x 64."""
    inputs = list(KINDS["gated"].inputs(length, lines=1, keys=8, heads=8, k=64, v=64).values())
    mx.eval(inputs)
    gradients = mx.grad(lambda *arrays: function(*arrays)[0].square().sum(), argnums=[0, 1, 2, 3, 4])
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradients(*inputs))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("compiled", [False, True])
def test_memory_is_a_tenth_of_the_loops(real_spans: None, compiled: bool) -> None:
    ours, theirs = KINDS["gated"].ours, KINDS["gated"].theirs
    # the loop's memory grows with its length: a quarter of it is enough to measure
    assert peak(mx.compile(ours) if compiled else ours, 1024) < 4 * peak(theirs, 256) / 10


def test_memory_grows_with_the_length(real_spans: None) -> None:
    assert peak(KINDS["gated"].ours, 4096) < 2.5 * peak(KINDS["gated"].ours, 2048)


def test_functions_find_the_segments_of_the_context() -> None:
    kind, inputs = KINDS["gated"], KINDS["gated"].inputs(70)
    segments = mx.broadcast_to(1 + (mx.arange(70) >= 30), (2, 70))
    assert recurrence.current_segments() is None
    with recurrence.resetting(segments):
        assert recurrence.current_segments() is segments
        found = kind.ours(*inputs.values())
    assert recurrence.current_segments() is None
    wanted = kind.ours(*inputs.values(), segments=segments)
    assert mx.array_equal(found[0], wanted[0]) and not mx.allclose(found[0], kind.ours(*inputs.values())[0])


STARTS = (0, 2, 3, 12, 20)


def apart(conv: nn.Conv1d, x: mx.array) -> mx.array:
    """Each of the rows that begin at STARTS by MLX's own convolution; what came before belongs to the first."""
    parts = []
    for start, end in zip(STARTS[:-1], STARTS[1:], strict=True):
        before = mx.zeros_like(x[:, :3]) if start else x[:, :3]
        parts.append(conv(mx.concatenate([before, x[:, start + 3 : end + 3]], axis=1)))
    return mx.concatenate(parts, axis=1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_and_its_gradients_stop_at_borders(bias: bool, packed: bool) -> None:
    mx.random.seed(0)
    conv, x, weight = (
        nn.Conv1d(6, 6, 4, groups=6, bias=bias),
        mx.random.normal((2, 23, 6)),
        mx.random.normal((2, 20, 6)),
    )
    numbers = mx.array([sum(place >= start for start in STARTS) for place in range(20)])
    segments = mx.broadcast_to(numbers, (2, 20)) if packed else None

    def measure(function: Callable[..., mx.array]) -> dict[str, mx.array]:
        def loss(parameters: Any, x: mx.array) -> mx.array:
            conv.update(parameters)
            return (function(conv, x) * weight).sum()

        kept = dict(conv.parameters())
        by, by_x = mx.grad(loss, argnums=[0, 1])(kept, x)
        conv.update(kept)
        return {"y": function(conv, x), "x": by_x, **by}

    wanted = measure(apart if packed else lambda conv, x: conv(x))
    check(measure(lambda conv, x: recurrence.convolved(conv, x, segments)), wanted)


def test_a_convolution_that_mixes_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="depthwise"):
        recurrence.convolved(nn.Conv1d(6, 6, 4), mx.ones((1, 5, 6)), mx.ones((1, 2), dtype=mx.int32))


@pytest.mark.parametrize("size", [16, 32, 64])
def test_the_inverse_and_its_gradient(size: int) -> None:
    mx.random.seed(0)
    a, weight = mx.random.normal((2, 3, size, size)) * 0.3, mx.random.normal((2, 3, size, size))
    inverse = np.linalg.inv(np.eye(size) + np.tril(np.array(a).astype(np.float64), -1))
    assert distance(unit_lower_inverse(a), inverse) <= TOLERANCE
    turned = inverse.swapaxes(-1, -2)
    wanted = -np.tril(turned @ np.array(weight).astype(np.float64) @ turned, -1)
    assert distance(mx.grad(lambda a: (unit_lower_inverse(a) * weight).sum())(a), wanted) <= TOLERANCE


def test_one_position_is_left_to_mlx_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(gated_delta, "gated_delta_update", lambda *_, **named: asked.append(named) or (1, 2))
    inputs = KINDS["gated"].inputs(1)
    recurrence.gated_delta_update(*inputs.values(), use_kernel=False, lower_bound=-2.0)
    assert asked == [{"use_kernel": False, "lower_bound": -2.0, "allow_neg_eigval": False}]
