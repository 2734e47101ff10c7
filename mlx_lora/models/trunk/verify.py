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
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.errors import ModelError
from mlx_lora.models.trunk import lean as lean_module
from mlx_lora.models.trunk.last import columns_of, columns_of_layer
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.lean import lean
from mlx_lora.models.trunk.recompute import recomputed
from mlx_lora.models.trunk.segments import caches, keeps_state
from mlx_lora.models.trunk.trial import LENGTH, STARTS, Call, Function, kinds, outcome, recorded, training
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
# Columns of each line that the last layer is run for.
COLUMNS = 3
# Lengths of the rows packed into two lines of WIDTH positions: the rest is padding.
PACKED = ((5, 12, 8), (9, 14))
WIDTH = 26
# Positions up to which float32 rotary angles stay well inside the tolerance.
EXACT_POSITIONS = 8192

# Names that mlx-lm's models give the part before the output head.
TRUNKS = ("model", "backbone", "transformer")


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

    The head gets the rows in another order: one that looks at neighbouring positions, or at the tokens, shows.
    """
    tokens = mx.arange(1, 10)[None]
    order = mx.arange(9)[::-1]
    whole = model(tokens)
    for candidate in _candidates(model, whole.shape[-1]):
        try:
            logits = candidate.head(candidate.run(tokens)[0][order])
        except Exception:  # an architecture whose trunk or head takes something else
            continue
        if logits.shape == whole[0].shape and _hold("head", [(logits, whole[0][order])]):
            return candidate
    return Trunk(model, vocabulary=whole.shape[-1])


def _candidates(model: nn.Module, vocabulary: int) -> Iterator[Trunk]:
    language = "language_model" if "language_model" in model else None
    outer = model[language] if language else model
    for name in TRUNKS:
        if isinstance(outer.get(name), nn.Module):
            yield Trunk(model, name, language, vocabulary)


def verify(trunk: Trunk, *, recompute: bool, columns: bool) -> Verified:
    """What of `lean`, and where wanted of gradient checkpointing and the cut last layer, holds for this model.

    Raises ModelError where the model's own layers have no gradient on this device, as with kernels that lack one.
    """
    verified, name = Verified(recompute=recompute, columns=columns and trunk.apart), _name(trunk.model)
    with training(trunk.model):
        hidden, calls = recorded(trunk)
        _check_gradients(calls, name)
        verified.without = _without(calls)
        if verified.without:
            parts = " and ".join(sorted(verified.without))
            verified.notes.append(f"{parts} of {name} run as mlx-lm has them: lean ones differ, and these keep more")
        if recompute and (reason := _not_recomputed(trunk, calls, verified.without)):
            verified.recompute = False
            verified.notes.append(f"layers of {name} aren't computed again in the backward pass: {reason}")
        if verified.columns and (reason := _not_cut(trunk, hidden, calls, verified.without)):
            verified.columns = False
            verified.notes.append(f"the last layer isn't cut for {name}: {reason}")
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


def packing_refused(model: nn.Module, *, length: int = WIDTH, without: frozenset[str] = frozenset()) -> str | None:
    """Why rows can't be packed for this model, or None when they can: verified numerically, as they are trained.

    `length` is that of the packed rows to come. The trial is short, but it sits at the end of those positions: some
    models scale attention or rotary frequencies by the absolute position once it is large.
    """
    with training(model):
        try:
            with lean(layers_of(model), without=without):
                if _isolated(model, max(length - WIDTH, 0)):
                    return None
        except ModelError as error:
            return error.message
        except Exception as error:  # an architecture that wants more of a cache than a mask, or takes none
            return f"it can't be run on packed rows: {error} ({type(error).__name__})"
    state = ": its layers keep a state that runs across rows" if keeps_state(model) else ""
    return f"packed rows don't give the logits of the rows alone{state}"


# ---- comparisons


def _check_gradients(calls: list[Call], name: str) -> None:
    for call in kinds(calls):
        try:
            mx.eval(outcome(call, call.layer))
        except Exception as error:
            raise ModelError(
                f"{name} can't be trained on this device: its {type(call.layer).__name__} has no gradient ({error})"
            ) from None


def _without(calls: list[Call]) -> frozenset[str]:
    """The parts of `lean` that don't give what the layers give by themselves."""
    if not _lean_differs(calls, frozenset()):
        return frozenset()
    every = lean_module.PARTS
    return frozenset(part for part in every if _lean_differs(calls, every - {part}))


def _lean_differs(calls: list[Call], without: frozenset[str]) -> str | None:
    def changed(call: Call, stack: ExitStack) -> Function:
        stack.enter_context(lean([call.layer], without=without))
        return call.layer

    return _layers_differ("lean", calls, changed)


def _not_recomputed(trunk: Trunk, calls: list[Call], without: frozenset[str]) -> str | None:
    if calls[0].layer is trunk.module:
        return "the model runs their parts itself"

    def changed(call: Call, stack: ExitStack) -> Function:
        stack.enter_context(lean([call.layer], without=without))
        stack.enter_context(recomputed([call.layer]))
        return call.layer

    return _layers_differ("recompute", calls, changed)


def _layers_differ(part: str, calls: list[Call], changed: Callable[[Call, ExitStack], Function]) -> str | None:
    """Why a change of the layers doesn't hold for one of their kinds, or None."""
    for call in kinds(calls):
        expected = outcome(call, call.layer)
        try:
            with ExitStack() as stack:
                found = outcome(call, changed(call, stack))
                mx.eval(found)
        except Exception as error:
            return f"{type(call.layer).__name__} can't be run so: {error} ({type(error).__name__})"
        if not _hold(part, list(zip(found, expected, strict=True))):
            return f"values or gradients of {type(call.layer).__name__} differ"
    return None


def _not_cut(trunk: Trunk, hidden: mx.array, calls: list[Call], without: frozenset[str]) -> str | None:
    """Why the last layer can't be run for some columns alone, or None: it is compared with the whole trunk."""
    last = layers_of(trunk.model)[-1]
    call = next((call for call in calls if call.layer is last), None)
    if call is None:
        return "the model runs its parts itself"
    columns = mx.array(STARTS)[:, None] + mx.arange(COLUMNS)
    try:
        with lean([last], without=without):
            columns_of(trunk, mx.zeros((len(STARTS), LENGTH), mx.int32), columns)  # only that it can be run
            found = trunk.above(columns_of_layer(last, call.by_name(), columns), len(layers_of(trunk.model)))
            if not _hold("last layer", [(found, _at(hidden, columns))]):
                return "its columns alone are other states"
            cut = outcome(call, lambda *a, **n: columns_of_layer(last, Call(last, a, n, None).by_name(), columns))
            whole = outcome(call, lambda *a, **n: _at(last(*a, **n), columns))
            if not _hold("last layer", list(zip(cut, whole, strict=True))):
                return "its columns alone have other gradients"
    except ModelError as error:
        return error.message
    except Exception as error:  # a layer that keeps something else, or takes something else
        return f"it keeps or takes something else than keys and values ({type(error).__name__})"
    return None


def _at(hidden: mx.array, columns: mx.array) -> mx.array:
    return mx.take_along_axis(hidden, columns[..., None], axis=1)


def _isolated(model: nn.Module, first: int) -> bool:
    """Whether the trial's rows, packed from position `first` on, have the logits that each has alone."""
    tokens = (mx.arange(len(PACKED) * WIDTH) * 7 % 31 + 1).reshape(len(PACKED), WIDTH)
    ends = [list(accumulate(row)) for row in PACKED]
    ids = [[1 + bisect_right(line, place) if place < line[-1] else 0 for place in range(WIDTH)] for line in ends]
    packed = model(tokens, cache=caches(model, mx.array(ids), first=first))
    pairs = []
    for line, row in enumerate(PACKED):
        for end, length in zip(ends[line], row, strict=True):
            alone = model(tokens[line : line + 1, end - length : end])[0]
            pairs.append((packed[line, end - length : end], alone))
    return _hold("packing", pairs, times=max(1.0, first / EXACT_POSITIONS))


def _hold(part: str, pairs: Sequence[tuple[mx.array, mx.array]], *, times: float = 1.0) -> bool:
    """Whether the first array of each pair equals the second within the part's tolerance."""
    if any(ours.shape != theirs.shape for ours, theirs in pairs):
        return False
    half = any(theirs.dtype in (mx.float16, mx.bfloat16) for _, theirs in pairs)
    tolerance = TOLERANCES[part][half] * times
    norms = mx.stack([mx.linalg.norm(theirs.astype(mx.float32)) for _, theirs in pairs])
    away = [mx.linalg.norm(ours.astype(mx.float32) - theirs.astype(mx.float32)) for ours, theirs in pairs]
    allowed = mx.maximum(norms, SMALL * norms.max())
    return bool((mx.stack(away) <= tolerance * allowed).all().item())  # not so for NaN


def _name(model: nn.Module) -> str:
    return str(getattr(model, "model_type", None) or type(model).__module__.rpartition(".")[2])
