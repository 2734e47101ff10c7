"""The tokens of a prompt go through the model in chunks, so that signals and progress wait for one chunk at most.

A signal is seen between two passes only. One pass over thousands of tokens takes minutes on a CPU, and its attention
needs memory for all of them at once. What a chunk holds follows from the model's size and the device, so that the same
prompt has the same chunks in every run. Only where one takes too long, because keys are many or the machine is busy,
the next ones are smaller: then the last bits of the result may differ from another run's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.machine import blas, device
from mlx_lora.quant.quantize import parameter_count

# Floating point operations of a chunk: about half a second on a laptop's GPU, on two cores with OpenBLAS or Accelerate,
# and with MLX's reference BLAS.
ON_GPU, ON_CPU, WITHOUT_BLAS = 2e12, 5e10, 1.5e9
# Tokens of a chunk. A CPU spends more on attention over a long prompt than on the weights.
LEAST, MOST, MOST_ON_CPU = 16, 2048, 128
# Seconds: a chunk that takes longer halves the next ones, one that takes a quarter of it doubles them again.
TOO_LONG = 1.0

OnPrompt = Callable[[int, int], None]


def prefill(
    model: nn.Module, tokens: Sequence[int], cache: list[Any], on_prompt: OnPrompt, *, most: int, total: int
) -> None:
    """Run `tokens` through the model and keep their keys and values in `cache`, at most `most` tokens at a time.

    `on_prompt(done, total)` is called before every chunk.
    """
    done, size = 0, most
    while done < len(tokens):
        on_prompt(done, total)
        start = time.perf_counter()
        chunk = tokens[done : done + size]
        model(mx.array([chunk]), cache=cache)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
        done += len(chunk)
        size = next_size(size, time.perf_counter() - start, most)


def next_size(size: int, seconds: float, most: int) -> int:
    """Tokens of the chunk after one of `size` that took `seconds`."""
    if seconds > TOO_LONG:
        return max(size // 2, min(LEAST, most))
    return min(size * 2, most) if seconds < TOO_LONG / 4 else size


def chunk_size(model: nn.Module) -> int:
    """Tokens of a chunk for this model on this device, a power of two."""
    operations, most = ON_GPU, MOST
    if not device.on_gpu():
        slow = sys.platform.startswith("linux") and not blas.blas_loaded()
        operations, most = WITHOUT_BLAS if slow else ON_CPU, MOST_ON_CPU
    tokens = int(operations / (2 * max(parameter_count(model), 1)))
    return 1 << (min(max(tokens, LEAST), most).bit_length() - 1)
