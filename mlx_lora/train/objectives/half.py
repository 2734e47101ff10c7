"""Gradients of a sum over many positions in float16, whose largest number is 65504 and whose smallest is 6e-8.

A GPU computes in the dtype that the model is stored in. Inside a micro-batch the sum over positions is formed there:
each gradient of a matrix is one product over all positions, whose result is rounded to the model's dtype. Between
micro-batches and processes sums are float32 (`train.step`).
"""

from __future__ import annotations

import math

import mlx.core as mx


def gradient_scale(dtype: mx.Dtype, positions: int) -> float:
    """The power of two that a sum of losses over `positions` is multiplied by before its backward pass in `dtype`.

    The gradients are divided by it in float32, which is exact. It is 2^-⌈log₂(positions) / 2⌉ in float16, about
    1 / √positions, and 1 in other dtypes, whose exponents reach as far as float32's.

    Two things can go wrong in float16. Unscaled, a gradient that is g on average overflows as a sum from g = 65504 / N
    on: at N = 8192 positions that is 8, which the large activations of real models reach. Scaled to a mean, by 1 / N,
    what one position adds falls below float16's smallest numbers. The root is between the two. At 8192 positions
    (2^-7) a sum overflows from an average of 1024 on, and what one position adds is lost below 4e-6. Measured on the
    embedded base beside float32, gradients are 0.5 % off unscaled and at 2^-7, 0.6 % at 2^-10, and 1.1 % at 2^-13;
    of activations as small as 2^-7, over 256 positions, 0.2 % unscaled, 1 % by the root and 39 % as a mean.
    A gradient that overflows all the same isn't finite, and its step changes nothing.
    """
    return 2.0 ** -math.ceil(math.log2(max(positions, 1)) / 2) if dtype == mx.float16 else 1.0
