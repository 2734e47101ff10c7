"""Logits that aren't finite: noticed while tokens are sampled, and an error that says where they come from.

Damaged weights, a wrong setting of config.json (as `rope_theta: 0`) or an overflow in half precision make NaN of every
logit. Whatever is sampled from NaN is always the same token, so without a check an answer is that token over and over.

`marking` costs three operations of one number for each sampled token, on the device: the chosen token's log-probability
is looked up, tested, and the token replaced by NOT_FINITE where it isn't finite. The host reads the token anyway and
finds the mark in it, so no step waits for another one. Only once something was found does `error` run the model again,
to say which part is to blame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.errors import NotFinite
from mlx_lora.models.trunk.flatten import flattened
from mlx_lora.models.trunk.trial import Call, recording, trial_tokens

# Stands for a token whose log-probability isn't finite; as an index of the step that is already on its way, MLX takes
# it for the last row.
NOT_FINITE = -1
# Lines and positions that the model is run on again, to find the first layer.
LINES, POSITIONS = 8, 64

Sampler = Callable[[mx.array], mx.array]


def marking(sampler: Sampler) -> Sampler:
    """`sampler`, log-probabilities (B, V) to tokens (B,), with NOT_FINITE for tokens whose own isn't finite; int32.

    Where any logit is NaN or infinite, the sum over all of them is, and so is every log-probability.
    """

    def sample(log_probabilities: mx.array) -> mx.array:
        tokens = sampler(log_probabilities)
        chosen = mx.take_along_axis(log_probabilities, tokens[:, None], axis=-1)[:, 0]
        return mx.where(mx.isfinite(chosen), tokens.astype(mx.int32), NOT_FINITE)

    return sample


def all_finite(logits: mx.array) -> bool:
    """Whether `logits` (…, V) give probabilities: an infinite negative one does, NaN and infinity don't."""
    return bool(mx.isfinite(mx.logsumexp(logits.astype(mx.float32), axis=-1)).all().item())


@contextmanager
def explaining(model: nn.Module) -> Iterator[None]:
    """Turn a FloatingPointError, raised for factors that aren't finite, into NotFinite.

    Where the model's own logits aren't finite either, the error names the part of the model at fault.
    """
    try:
        yield
    except FloatingPointError as problem:
        if all_finite(model(trial_tokens())):
            raise NotFinite(
                str(problem), hint="adapter.init=default begins without the weights and the activations"
            ) from problem
        raise error(model, trial_tokens()) from problem


def error(model: nn.Module, tokens: mx.array) -> NotFinite:
    """What to raise for a model whose logits of `tokens` (B, T) aren't finite: it names the first part at fault."""
    for path, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            return NotFinite(
                f"the model's logits aren't finite: {path} holds NaN or infinity",
                hint="the weights are damaged: fetch the model again, or train the adapter again if it is part of one",
            )
    return NotFinite(
        f"the model's logits aren't finite: {_first_part(model, tokens[:LINES, :POSITIONS])}",
        hint="its weights are finite, so a setting of config.json is likely to be wrong, as rope_theta; "
        "where it computes in float16, a value may be too large for it",
    )


def _first_part(model: nn.Module, tokens: mx.array) -> str:
    """The first part of `model` whose output isn't finite, in words."""
    layers, calls = list(getattr(model, "layers", None) or []), dict[int, Call]()
    with recording(layers, calls):
        logits = model(tokens)
    noted = [(index, layer, calls[id(layer)]) for index, layer in enumerate(layers) if id(layer) in calls]
    if noted and not _finite(noted[0][2].arguments):
        return "the embedding's output isn't"
    for index, layer, call in noted:
        if not _finite(call.output):
            return f"layer {index} ({type(layer).__name__}) is the first whose output isn't"
    if all_finite(logits):
        return f"not on the first {tokens.shape[1]} tokens, but later"
    return "every layer's output is, the output head's isn't"


def _finite(tree: object) -> bool:
    """Whether the numbers of every array in `tree` are finite; masks hold infinities and are none of the outputs."""
    arrays = [array for array in flattened(tree)[0][:1] if mx.issubdtype(array.dtype, mx.floating)]
    return all(mx.isfinite(array).all().item() for array in arrays)
