"""What must hold before the first step of training: something to train, rows to learn, and a model that computes."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.data.rows import Row, largest_token, trained
from mlx_lora.errors import TrainingError
from mlx_lora.models import finite, token_ids
from mlx_lora.models.trunk.trial import trial_tokens
from mlx_lora.models.trunk.trunk import Trunk


def check_rows(model: nn.Module, rows: Sequence[Row], valid: Sequence[Row]) -> None:
    """Raise TrainingError where nothing is trainable, or there are no rows, or rows without a token to learn."""
    if not tree_flatten(model.trainable_parameters()):
        raise TrainingError("nothing is trainable", hint="attach an adapter first")
    if not rows or not (trained(rows).all() and trained(valid).all()):
        raise TrainingError("there are no rows, or rows without a token to learn", hint="leave such rows out")


def check_model(trunk: Trunk, rows: Sequence[Row]) -> None:
    """Raise TrainingError for a model that has no embedding for a token of `rows`, or whose logits aren't finite.

    Text that `data.encode` has read is checked already, with file and line; rows may come from elsewhere. For the
    logits nothing is computed here: `take_apart` has looked at them.
    """
    if (largest := largest_token(rows)) >= trunk.vocabulary:
        raise TrainingError(
            f"a row has token id {largest}, the model's embedding has {trunk.vocabulary} rows", hint=token_ids.HINT
        )
    if not trunk.finite:
        fault = finite.error(trunk.model, trial_tokens())
        raise TrainingError(fault.message, hint=fault.hint)
