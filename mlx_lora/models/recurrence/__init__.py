"""Exact chunked forms of recurrences and short convolutions, in plain MLX operations, for mlx-lm's layers to call.

Each function has the signature of mlx-lm's. For the backward pass it keeps its inputs and one state every few chunks;
mlx-lm's loop keeps copies of the state for every position.
"""

from mlx_lora.models.recurrence.convolution import CausalConv1d, convolved, is_short
from mlx_lora.models.recurrence.gated_delta import gated_delta_update
from mlx_lora.models.recurrence.linear_attention import recurrent_gla
from mlx_lora.models.recurrence.resets import current_segments, resetting
from mlx_lora.models.recurrence.ssm import ssm_update

__all__ = [
    "CausalConv1d",
    "convolved",
    "current_segments",
    "gated_delta_update",
    "is_short",
    "recurrent_gla",
    "resetting",
    "ssm_update",
]
