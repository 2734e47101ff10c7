"""What a scheduler may take, and what it does: plain values that may cross threads."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_lora.serve.ways import Way


@dataclass(frozen=True)
class Limits:
    """`rows` are answered at once and `waiting` may wait; bytes of prompt caches and of adapters in memory."""

    rows: int = 32
    waiting: int = 256
    prompt_cache_bytes: int = 1 << 30
    adapter_bytes: int = 2 << 30


@dataclass(frozen=True)
class Options:
    """`lookup` drafts tokens of a row by itself where that is faster (`serve.lookup`).

    `kv_bits` are those of keys and values, None for the model's own (`serve.quantized`). With `any_length`, prompts and
    answers may be longer than the model's context. With `throughput`, prompts that are read together have a chunk each:
    all of them are done sooner, and who waits for a token waits longer.
    """

    lookup: bool = True
    kv_bits: int | None = None
    any_length: bool = False
    throughput: bool = False


DEFAULT = Options()


@dataclass(frozen=True)
class Status:
    """What a scheduler does. `quiet_seconds` since the thread last did something, 0 while there is nothing to do.

    `stuck` after it was given up; `slowest_seconds` is the longest that it took from one pass to the next.
    `drafted_tokens` were proposed by prompt lookup, `held_tokens` of them were right; `no_lookup` is why none are.
    """

    alive: bool
    running: int
    waiting: int
    quiet_seconds: float
    stuck: bool = False
    slowest_seconds: float = 0.0
    passes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prompt_cache_bytes: int = 0
    prompt_cache_hits: int = 0
    prompt_cache_misses: int = 0
    adapter_bytes: int = 0
    adapters: tuple[str, ...] = ()
    alone: tuple[tuple[str, str], ...] = ()
    way: Way | None = None
    drafted_tokens: int = 0
    held_tokens: int = 0
    no_lookup: str | None = None
