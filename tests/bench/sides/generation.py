"""Tokens a second of generating: ours as `generate` does it, and mlx_lm's `generate_step` as its own command does.

Both sides read the same prompt and take the most likely token each time. `seconds` are of each token after the first;
reading the prompt is timed apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

PROMPT = list(range(1000, 1051))


def ours(*, model: str, count: int) -> dict[str, Any]:
    """`mlx-lora generate`: loaded for this device, packed weights unpacked once where that helps and fits."""
    from mlx_lora.models.load import load
    from mlx_lora.models.unpack import unpack_once
    from mlx_lora.serve.engine import Engine

    loaded = load(model)
    unpack_once(loaded)
    return timed(Engine(loaded).stream(PROMPT, max_tokens=count))


def theirs(*, model: str, count: int, float32: bool = False) -> dict[str, Any]:
    """mlx_lm as it is, or with every float parameter cast to float32."""
    from mlx_lm import utils
    from mlx_lm.generate import generate_step

    network, _ = utils.load(model)
    if float32:
        network.set_dtype(mx.float32)
        mx.eval(network.parameters())
    steps = generate_step(mx.array(PROMPT), network, max_tokens=count)
    return timed(int(token) for token, _ in steps)


def timed(tokens: Iterator[int]) -> dict[str, Any]:
    """Seconds of every token, and the tokens."""
    times, found = [time.perf_counter()], []
    for token in tokens:
        times.append(time.perf_counter())
        found.append(token)
    seconds = [end - start for start, end in zip(times[1:], times[2:], strict=False)]
    return {
        "seconds": seconds,
        "prompt_seconds": times[1] - times[0],
        "tokens": found,
        "peak_bytes": mx.get_peak_memory(),
    }
