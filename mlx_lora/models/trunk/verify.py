"""Verify which parts of `trunk/` give the same values and gradients as the whole model, on a few tokens.

Every part of `trunk/` makes an assumption about the model's code. It is true for most architectures, not for all. No
list of architectures decides: the unmodified model runs once while each layer's inputs are recorded, and each part is
compared with that run. Layers of the same shape behave alike, so one layer of each kind is compared, in values and in
gradients of all its inputs and trained parameters. A model of 30 layers costs little more than two forward passes of
a few tokens. A part that differs isn't used, and a note gives the reason; callers decide how to train without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.errors import ModelError
from mlx_lora.models.architectures import OWN_LOOPS, TRUNKS
from mlx_lora.models.finite import all_finite
from mlx_lora.models.trunk import lean as lean_module
from mlx_lora.models.trunk.last_layer import columns_of, columns_of_layer
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.lean import lean
from mlx_lora.models.trunk.recompute import recomputed
from mlx_lora.models.trunk.segments import row_caches
from mlx_lora.models.trunk.tolerance import agree
from mlx_lora.models.trunk.trial import (
    STARTS,
    Call,
    Function,
    Trial,
    borrows,
    kinds,
    outcome,
    recording,
    training,
    trial_of,
    trial_run,
    trial_tokens,
)
from mlx_lora.models.trunk.trunk import Trunk

# Positions whose hidden states the head is tested with, and number of columns that the last layer is tested with.
ROWS, COLUMNS = (8, 0, 3), 3


@dataclass
class Verified:
    """What works for a model.

    `without`: parts of `lean` that must not be used. `recompute`: layers may be recomputed in the backward pass.
    `columns`: the last layer may run only for some columns. `notes` tell users what isn't used, and why.
    """

    without: frozenset[str] = frozenset()
    recompute: bool = True
    columns: bool = True
    notes: list[str] = field(default_factory=list)


def take_apart(model: nn.Module) -> Trunk:
    """The trunk of `model`, verified on a few tokens against the whole model.

    The head gets some positions in another order, so a head that uses neighbouring positions, or the tokens, fails.
    """
    tokens, calls = trial_tokens(), dict[int, Call]()
    with training(model):
        candidates = list(_candidates(model))
        with recording([*getattr(model, "layers", []), *(candidate.module for candidate in candidates)], calls):
            whole = model(tokens)
        served = _served(model, tokens)
        shares_keys = served is not None and not agree("head", [(whole, served)])
        if served is not None and shares_keys:
            whole = served
        for trunk in candidates:
            trunk.shares_keys = shares_keys
            trunk.vocabulary = whole.shape[-1]
            try:
                hidden = _states(trunk, tokens, calls)
                logits = trunk.head(hidden[0][mx.array(ROWS)])
            except Exception:  # an architecture whose trunk or head takes other arguments
                continue
            expected = whole[0][mx.array(ROWS)]
            if logits.shape == expected.shape and agree("head", [(logits, expected)]):
                if trunk.shares_keys or not getattr(model, "layers", None):
                    return trunk
                trunk.trial = trial_of(trunk, tokens, hidden, calls)
                return trunk
    # NaN agrees with nothing, so a model whose logits aren't finite always ends here
    finite = all_finite(whole[0][mx.array(ROWS)])
    return Trunk(model, vocabulary=whole.shape[-1], shares_keys=shares_keys, finite=finite)


def _served(model: nn.Module, tokens: mx.array) -> mx.array | None:
    """Logits with caches, as in serving, if the model has fewer caches than layers: then layers may share keys."""
    if (count := len(getattr(model, "layers", []))) and (caches := row_caches(model)) and len(caches) < count:
        with suppress(Exception):  # a model that needs caches of its own kind
            return model(tokens, cache=caches)  # type: ignore[no-any-return]
    return None


def _states(trunk: Trunk, tokens: mx.array, calls: dict[int, Call]) -> mx.array:
    """The trunk's hidden states: the recorded ones if the model passed it only the tokens, else those of a new run."""
    call = calls.get(id(trunk.module))
    if (
        not trunk.shares_keys
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
    """Which parts of `lean` work for this model, and if wanted also gradient checkpointing and the cut last layer.

    Raises ModelError if the model's own layers have no gradient on this device, because of a kernel without one.
    """
    verified, name = Verified(recompute=recompute, columns=columns and trunk.apart), _name(trunk.model)
    with training(trunk.model):
        trial, trunk.trial = trial_run(trunk), None
        compared = _differentiable(trial, name)
        verified.without = _differing_parts(compared)
        if verified.without:
            parts = " and ".join(sorted(verified.without))
            verified.notes.append(
                f"{name} runs {parts} in mlx-lm's own code, which needs more memory: the lean form gives other numbers"
            )
        if recompute and (reason := _not_recomputed(trunk, compared, verified.without)):
            verified.recompute = False
            verified.notes.append(f"layers of {name} aren't computed again in the backward pass: {reason}")
        if verified.columns and (reason := _not_cut(trunk, trial, verified.without)):
            verified.columns = False
            verified.notes.append(f"the last layer isn't cut for {name}: {reason}")
    if any(type(module).__name__ in OWN_LOOPS for module in trunk.model.modules()):
        verified.notes.append(
            f"{name} runs its recurrence in mlx-lm's loop over positions, which is slow and needs much memory"
        )
    return verified


def verify_start(trunk: Trunk, start: int) -> mx.array | str:
    """Example states that enter layer `start`, for their shape and dtype; or why layers can't run from states alone.

    Layers that take more than hidden states from below, such as shared keys or a part of the embeddings, can't. Needs
    the model in evaluation mode: with dropout, the two compared runs would draw different masks.
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
    if states.shape[:2] != tokens.shape or output.shape != whole.shape or not agree("start", [(output, whole)]):
        return f"the layers from {start} on take more than hidden states: with those alone the output differs"
    return states


Compared = list[tuple[Call, list[mx.array]]]


def _differentiable(trial: Trial, name: str) -> Compared:
    """One call of each kind of layer, with the outputs and gradients of the unmodified layer."""
    compared = []
    for call in kinds(trial.calls):
        try:
            compared.append((call, outcome(call, call.layer)))
            mx.eval(compared[-1][1])
        except Exception as error:
            layer = type(call.layer).__name__
            raise ModelError(f"{name} can't be trained here: its {layer} has no gradient ({error})") from error
    return compared


def _differing_parts(compared: Compared) -> frozenset[str]:
    """The parts of `lean` that change a layer's outputs or gradients."""
    if not _lean_differs(compared, frozenset()):
        return frozenset()
    parts = lean_module.PARTS
    return frozenset(part for part in parts if _lean_differs(compared, parts - {part}))


def _lean_differs(compared: Compared, without: frozenset[str]) -> str | None:
    def changed(call: Call, stack: ExitStack) -> Function:
        stack.enter_context(lean([call.layer], without=without))
        return call.layer

    return _layers_differ("lean", compared, changed)


def _not_recomputed(trunk: Trunk, compared: Compared, without: frozenset[str]) -> str | None:
    if compared[0][0].layer is trunk.module:
        return "the model runs the parts of its layers itself"
    if any(borrows(call, trunk.model) for call, _ in compared if not call.frozen):
        return "they use trained arrays of other modules"

    def changed(call: Call, stack: ExitStack) -> Function:
        stack.enter_context(lean([call.layer], without=without))
        stack.enter_context(recomputed([call.layer]))
        return call.layer

    return _layers_differ("recompute", [(call, expected) for call, expected in compared if not call.frozen], changed)


def _layers_differ(part: str, compared: Compared, changed: Callable[[Call, ExitStack], Function]) -> str | None:
    """Why the `changed` layers don't give the expected outputs and gradients for some kind of layer, or None."""
    for call, expected in compared:
        try:
            with ExitStack() as stack:
                actual = outcome(call, changed(call, stack))
                mx.eval(actual)
        except Exception as error:
            return f"{type(call.layer).__name__} can't be run this way: {error} ({type(error).__name__})"
        if not agree(part, list(zip(actual, expected, strict=True)), of=call.layer):
            return f"values or gradients of {type(call.layer).__name__} differ"
    return None


def _not_cut(trunk: Trunk, trial: Trial, without: frozenset[str]) -> str | None:
    """Why the last layer can't run for some columns only, or None; compared with the whole trunk."""
    last = layers_of(trunk.model)[-1]
    call = next((call for call in trial.calls if call.layer is last), None)
    if call is None:
        return "the model runs the parts of its layers itself"
    columns = mx.array(STARTS)[:, None] + mx.arange(COLUMNS)
    try:
        with lean([last], without=without):
            columns_of(trunk, trial.tokens, columns)  # checks that it runs without an error; nothing is evaluated
            states = trunk.above(columns_of_layer(last, call.by_name(), columns), len(layers_of(trunk.model)))
            if not agree("last layer", [(states, _take_columns(trial.hidden, columns))]):
                return "its columns alone give other states"
            cut = outcome(call, lambda *a, **n: columns_of_layer(last, Call(last, a, n, None).by_name(), columns))
            whole = outcome(call, lambda *a, **n: _take_columns(last(*a, **n), columns))
            if not agree("last layer", list(zip(cut, whole, strict=True)), of=last):
                return "its columns alone give other gradients"
    except ModelError as error:
        return error.message
    except Exception as error:  # a layer that caches something else, or takes other arguments
        return f"it keeps or takes something else than keys and values ({type(error).__name__})"
    return None


def _take_columns(hidden: mx.array, columns: mx.array) -> mx.array:
    return mx.take_along_axis(hidden, columns[..., None], axis=1)


def _name(model: nn.Module) -> str:
    return str(getattr(model, "model_type", None) or type(model).__module__.rpartition(".")[2])
