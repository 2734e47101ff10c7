"""Which ways of running a model in parts give what the whole model gives: values and gradients, on a few tokens.

Every part of `trunk/` rests on an assumption about the model's code that most architectures keep and some don't. So
nothing is looked up by name: the model runs once as it is, with what enters each layer noted, and each part is then
held against it. Layers of the same shape behave alike, so one of each kind is compared, in values and in gradients of
all that it takes and trains; a model of 30 layers costs little more than two forward passes of a few tokens. What
doesn't hold is left out, with a reason for people; nothing here decides what is done without it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.errors import MlxLoraError, ModelError
from mlx_lora.models.architectures import OWN_LOOPS, TRUNKS
from mlx_lora.models.trunk import lean as lean_module
from mlx_lora.models.trunk.last import columns_of, columns_of_layer
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.lean import lean
from mlx_lora.models.trunk.recompute import recomputed
from mlx_lora.models.trunk.segments import caches, keeps_state, row_caches
from mlx_lora.models.trunk.trial import (
    STARTS,
    Call,
    Function,
    Trial,
    borrows,
    kinds,
    noting,
    outcome,
    training,
    trial_of,
    trial_tokens,
    tried,
)
from mlx_lora.models.trunk.trunk import Trunk

# Largest distance from the whole model, relative to the norm of what is compared: in float32, and in half precision,
# where another shape of batch rounds differently and can send a token to another expert. A part that doesn't hold
# moves values or gradients by tens of percent. What is split off runs the same operations on the same numbers.
TOLERANCES = {
    "head": (1e-3, 1e-2),
    "lean": (1e-4, 5e-2),
    "recompute": (1e-4, 5e-2),
    "last layer": (1e-4, 5e-2),
    "start": (1e-5, 1e-5),
    "packing": (1e-3, 5e-2),
}
# Gradients that are this small a part of the largest one are rounding.
SMALL = 1e-2
# Rows of the hidden states that the head is tried on, and columns of each line that the last layer is run for.
ROWS, COLUMNS = (8, 0, 3), 3
# Lengths of the rows packed into two lines of WIDTH positions: the rest is padding.
PACKED = ((5, 12, 8), (9, 14))
WIDTH = 26
# Positions up to which float32 rotary angles stay well inside the tolerance.
EXACT_POSITIONS = 8192


@dataclass
class Verified:
    """What holds for a model: the parts of `lean` to leave `without`, layers that may be computed again, columns.

    `notes` say in plain words what was left out.
    """

    without: frozenset[str] = frozenset()
    recompute: bool = True
    columns: bool = True
    notes: list[str] = field(default_factory=list)


def take_apart(model: nn.Module) -> Trunk:
    """The trunk of `model`, verified on a few tokens against the whole model.

    The head gets some rows in another order: one that looks at neighbouring positions, or at the tokens, shows.
    """
    tokens, calls = trial_tokens(), dict[int, Call]()
    with training(model):
        candidates = list(_candidates(model))
        with noting([*getattr(model, "layers", []), *(candidate.module for candidate in candidates)], calls):
            whole = model(tokens)
        served = _served(model, tokens)
        hands_keys_on = served is not None and not _hold("head", [(whole, served)])
        if served is not None and hands_keys_on:
            whole = served
        for trunk in candidates:
            trunk.hands_keys_on = hands_keys_on
            trunk.vocabulary = whole.shape[-1]
            try:
                hidden = _states(trunk, tokens, calls)
                logits = trunk.head(hidden[0][mx.array(ROWS)])
            except Exception:  # an architecture whose trunk or head takes something else
                continue
            expected = whole[0][mx.array(ROWS)]
            if logits.shape == expected.shape and _hold("head", [(logits, expected)]):
                if trunk.hands_keys_on or not getattr(model, "layers", None):
                    return trunk
                trunk.trial = trial_of(trunk, tokens, hidden, calls)
                return trunk
    return Trunk(model, vocabulary=whole.shape[-1], hands_keys_on=hands_keys_on)


def _served(model: nn.Module, tokens: mx.array) -> mx.array | None:
    """Logits with a cache, as the model is served, where some of its layers share a cache and might use it so."""
    if (count := len(getattr(model, "layers", []))) and (kept := row_caches(model)) and len(kept) < count:
        with suppress(Exception):  # a model whose caches are its own affair
            return model(tokens, cache=kept)  # type: ignore[no-any-return]
    return None


def _states(trunk: Trunk, tokens: mx.array, calls: dict[int, Call]) -> mx.array:
    """The trunk's hidden states: those noted, where the model called it with nothing but the tokens."""
    call = calls.get(id(trunk.module))
    if (
        not trunk.hands_keys_on
        and call is not None
        and all(value is None for value in [*call.arguments[1:], *call.named.values()])
    ):
        return call.output  # type: ignore[no-any-return]
    return trunk.run(tokens)


def _candidates(model: nn.Module) -> Iterator[Trunk]:
    language = "language_model" if "language_model" in model else None
    outer = model[language] if language else model
    for name in TRUNKS:
        if isinstance(outer.get(name), nn.Module):
            yield Trunk(model, name, language)


def verify(trunk: Trunk, *, recompute: bool, columns: bool) -> Verified:
    """What of `lean`, and where wanted of gradient checkpointing and the cut last layer, holds for this model.

    Raises ModelError where the model's own layers have no gradient on this device, as with kernels that lack one.
    """
    verified, name = Verified(recompute=recompute, columns=columns and trunk.apart), _name(trunk.model)
    with training(trunk.model):
        trial, trunk.trial = tried(trunk), None
        compared = _differentiable(trial, name)
        verified.without = _without(compared)
        if verified.without:
            parts = " and ".join(sorted(verified.without))
            verified.notes.append(f"{parts} of {name} run as mlx-lm has them: lean ones differ, and these keep more")
        if recompute and (reason := _not_recomputed(trunk, compared, verified.without)):
            verified.recompute = False
            verified.notes.append(f"layers of {name} aren't computed again in the backward pass: {reason}")
        if verified.columns and (reason := _not_cut(trunk, trial, verified.without)):
            verified.columns = False
            verified.notes.append(f"the last layer isn't cut for {name}: {reason}")
    if any(type(module).__name__ in OWN_LOOPS for module in trunk.model.modules()):
        verified.notes.append(
            f"{name} runs its state position by position, as mlx-lm has it: slow, and large in memory"
        )
    return verified


def verify_start(trunk: Trunk, start: int) -> mx.array | str:
    """States that enter layer `start`, of which only shape and dtype say something, or why they alone don't do.

    Layers that take more than hidden states from below, such as shared keys or a part of the embeddings, can't be cut
    off. Needs the model in evaluation mode: with dropout the two sides draw different masks.
    """
    count = len(layers_of(trunk.model))
    if not trunk.apart:
        return "the model can't be taken apart"
    if not 0 < start < count:
        return f"the model's {count} layers can't be cut at layer {start}"
    tokens = mx.stack([mx.arange(1, 10), mx.arange(9, 0, -1)])
    whole = trunk.run(tokens)
    try:
        states = trunk.entering(tokens, start)
        output = trunk.run(states, start=start)
    except ModelError as error:
        return error.message
    except Exception as error:  # layers that return or take more than one array
        return f"the layers from {start} on take more than hidden states ({type(error).__name__})"
    if states.shape[:2] != tokens.shape or output.shape != whole.shape or not _hold("start", [(output, whole)]):
        return f"the layers from {start} on take more than hidden states: with those alone the output differs"
    return states


def packing_refused(trunk: Trunk, *, length: int = WIDTH, without: frozenset[str] = frozenset()) -> str | None:
    """Why rows can't be packed for this model, or None when they can: verified numerically, as they are trained.

    `length` is that of the packed rows to come. The trial is short, but it sits at the end of those positions: some
    models scale attention or rotary frequencies by the absolute position once it is large.
    """
    layers = layers_of(trunk.model)
    first = max(length - WIDTH, 0)
    with training(trunk.model), lean(layers, without=without):
        try:
            if _isolated(trunk, layers, first):
                return None
        except MlxLoraError as error:
            return error.message
        except Exception as error:  # an architecture that wants more of a cache than a mask, or takes none
            return f"it can't be run on packed rows: {error} ({type(error).__name__})"
    state = ": its layers keep a state that runs across rows" if keeps_state(trunk.model) else ""
    return f"packed rows don't give the states of the rows alone{state}"


# ---- comparisons

Compared = list[tuple[Call, list[mx.array]]]


def _differentiable(trial: Trial, name: str) -> Compared:
    """A call of each kind of layer, with the values and gradients that the layer itself has."""
    compared = []
    for call in kinds(trial.calls):
        try:
            compared.append((call, outcome(call, call.layer)))
            mx.eval(compared[-1][1])
        except Exception as error:
            layer = type(call.layer).__name__
            raise ModelError(f"{name} can't be trained here: its {layer} has no gradient ({error})") from error
    return compared


def _without(compared: Compared) -> frozenset[str]:
    """The parts of `lean` that don't give what the layers give by themselves."""
    if not _lean_differs(compared, frozenset()):
        return frozenset()
    every = lean_module.PARTS
    return frozenset(part for part in every if _lean_differs(compared, every - {part}))


def _lean_differs(compared: Compared, without: frozenset[str]) -> str | None:
    def changed(call: Call, stack: ExitStack) -> Function:
        stack.enter_context(lean([call.layer], without=without))
        return call.layer

    return _layers_differ("lean", compared, changed)


def _not_recomputed(trunk: Trunk, compared: Compared, without: frozenset[str]) -> str | None:
    if compared[0][0].layer is trunk.module:
        return "the model runs their parts itself"
    if any(borrows(call, trunk.model) for call, _ in compared if not call.frozen):
        return "they compute with what is trained in others"

    def changed(call: Call, stack: ExitStack) -> Function:
        stack.enter_context(lean([call.layer], without=without))
        stack.enter_context(recomputed([call.layer]))
        return call.layer

    return _layers_differ("recompute", [(call, found) for call, found in compared if not call.frozen], changed)


def _layers_differ(part: str, compared: Compared, changed: Callable[[Call, ExitStack], Function]) -> str | None:
    """Why a change of the layers doesn't hold for one of their kinds, or None."""
    for call, expected in compared:
        try:
            with ExitStack() as stack:
                found = outcome(call, changed(call, stack))
                mx.eval(found)
        except Exception as error:
            return f"{type(call.layer).__name__} can't be run so: {error} ({type(error).__name__})"
        if not _hold(part, list(zip(found, expected, strict=True)), of=call.layer):
            return f"values or gradients of {type(call.layer).__name__} differ"
    return None


def _not_cut(trunk: Trunk, trial: Trial, without: frozenset[str]) -> str | None:
    """Why the last layer can't be run for some columns alone, or None: it is compared with the whole trunk."""
    last = layers_of(trunk.model)[-1]
    call = next((call for call in trial.calls if call.layer is last), None)
    if call is None:
        return "the model runs its parts itself"
    columns = mx.array(STARTS)[:, None] + mx.arange(COLUMNS)
    try:
        with lean([last], without=without):
            columns_of(trunk, trial.tokens, columns)  # only that it can be run: nothing is evaluated
            found = trunk.above(columns_of_layer(last, call.by_name(), columns), len(layers_of(trunk.model)))
            if not _hold("last layer", [(found, _at(trial.hidden, columns))]):
                return "its columns alone are other states"
            cut = outcome(call, lambda *a, **n: columns_of_layer(last, Call(last, a, n, None).by_name(), columns))
            whole = outcome(call, lambda *a, **n: _at(last(*a, **n), columns))
            if not _hold("last layer", list(zip(cut, whole, strict=True)), of=last):
                return "its columns alone have other gradients"
    except ModelError as error:
        return error.message
    except Exception as error:  # a layer that keeps something else, or takes something else
        return f"it keeps or takes something else than keys and values ({type(error).__name__})"
    return None


def _at(hidden: mx.array, columns: mx.array) -> mx.array:
    return mx.take_along_axis(hidden, columns[..., None], axis=1)


def _isolated(trunk: Trunk, layers: list[nn.Module], first: int) -> bool:
    """Whether the trial's rows, packed from position `first` on, have the states and gradients that each has alone."""
    lines, rows = _packed_rows()
    tokens = (mx.arange(lines.size) * 7 % 31 + 1).reshape(lines.shape)
    together, apart = dict[int, Call](), dict[int, Call]()
    with noting(layers, together):
        packed = trunk.run_with(tokens, caches(trunk.model, lines, first=first, carried=trunk.hands_keys_on))
    with noting(layers, apart):  # padding behind a row reaches nothing in it
        alone = trunk.run(_gathered(tokens, rows))
    times = max(1.0, first / EXACT_POSITIONS)
    real = (rows >= 0)[..., None]
    if not _hold("packing", [(_gathered(packed, rows) * real, alone * real)], times=times):
        return False
    for call in kinds([together[id(layer)] for layer in layers if id(layer) in together]):
        if isinstance(call.output, mx.array) and call.output.shape[:2] == lines.shape:
            if not _hold("packing", _packed_outcomes(call, apart[id(call.layer)], rows), times=times, of=call.layer):
                return False
    return True


def _packed_rows() -> tuple[mx.array, mx.array]:
    """Segment ids (lines, WIDTH), and for each row alone its flat positions there, (rows, longest), -1 for padding."""
    ends = [list(accumulate(row)) for row in PACKED]
    ids = [[1 + bisect_right(line, place) if place < line[-1] else 0 for place in range(WIDTH)] for line in ends]
    longest = max(max(row) for row in PACKED)
    places = [
        [line * WIDTH + end - length + place if place < length else -1 for place in range(longest)]
        for line, row in enumerate(PACKED)
        for end, length in zip(ends[line], row, strict=True)
    ]
    return mx.array(ids), mx.array(places)


def _gathered(packed: mx.array, rows: mx.array) -> mx.array:
    """(lines, WIDTH, …) as the rows alone, (rows, longest, …)."""
    return packed.reshape(-1, *packed.shape[2:])[mx.maximum(rows, 0)]


def _packed_outcomes(together: Call, apart: Call, rows: mx.array) -> list[tuple[mx.array, mx.array]]:
    """What a layer makes of packed rows and of the same rows alone, and the gradients of what enters and is trained."""
    real, trained = (rows >= 0)[..., None], together.layer.trainable_parameters()
    place, x = next(
        (place, value)
        for place, value in _by_place(together).items()
        if isinstance(value, mx.array) and value.ndim == 3 and mx.issubdtype(value.dtype, mx.floating)
    )

    def by(call: Call, shaped: Function, made: Function) -> list[mx.array]:
        def summed(x: mx.array, trained: Any) -> mx.array:
            call.layer.update(trained)
            given = {**_by_place(call), place: shaped(x)}
            arguments = [given.pop(index) for index in range(len(call.arguments))]
            output = made(call.layer(*arguments, **given)) * real
            return (output * mx.cos(mx.arange(output.size)).reshape(output.shape)).sum()

        try:
            value, (of_x, of_trained) = mx.value_and_grad(summed, argnums=(0, 1))(x.astype(mx.float32), trained)
        finally:
            call.layer.update(trained)
        return [value[None], of_x, *(array for _, array in tree_flatten(of_trained))]

    packed = by(together, lambda x: x, lambda output: _gathered(output, rows))
    alone = by(apart, lambda x: _gathered(x, rows), lambda output: output)
    return list(zip(packed[1:], alone[1:], strict=True))


def _by_place(call: Call) -> dict[Any, Any]:
    """A call's arguments by their numbers and names."""
    return {**dict(enumerate(call.arguments)), **call.named}


def _hold(
    part: str, pairs: Sequence[tuple[mx.array, mx.array]], *, times: float = 1.0, of: nn.Module | None = None
) -> bool:
    """Whether the first array of each pair equals the second within the part's tolerance, that of half precision where
    some of them are, or the arrays of the layer that they are `of`."""
    if any(ours.shape != theirs.shape for ours, theirs in pairs):
        return False
    arrays = [theirs for _, theirs in pairs] + [array for _, array in tree_flatten(of.parameters() if of else {})]
    half = any(array.dtype in (mx.float16, mx.bfloat16) for array in arrays)
    tolerance = TOLERANCES[part][half] * times
    norms = mx.stack([mx.linalg.norm(theirs.astype(mx.float32)) for _, theirs in pairs])
    away = [mx.linalg.norm(ours.astype(mx.float32) - theirs.astype(mx.float32)) for ours, theirs in pairs]
    allowed = mx.maximum(norms, SMALL * norms.max())
    return bool((mx.stack(away) <= tolerance * allowed).all().item())  # not so for NaN


def _name(model: nn.Module) -> str:
    return str(getattr(model, "model_type", None) or type(model).__module__.rpartition(".")[2])
