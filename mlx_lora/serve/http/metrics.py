"""What the server does, as text that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import mlx.core as mx

from mlx_lora.serve.scheduler import Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def as_text(status: Status, requests: Mapping[tuple[str, int], int]) -> str:
    """Counters and gauges. `requests` are those that have ended, by route and HTTP status (0: the client went away)."""
    ended = [(f'{{route="{route}",status="{code}"}}', count) for (route, code), count in sorted(requests.items())]
    lines = _metric("requests_total", "counter", "HTTP requests that have ended", ended)
    for name, kind, help, value in (
        ("prompt_tokens_total", "counter", "Tokens of prompts", status.prompt_tokens),
        ("cached_tokens_total", "counter", "Tokens of prompts that were in the prompt cache", status.cached_tokens),
        ("generated_tokens_total", "counter", "Tokens of answers that have ended", status.generated_tokens),
        ("passes_total", "counter", "Forward passes", status.passes),
        ("rows_running", "gauge", "Answers that are being made", status.running),
        ("rows_waiting", "gauge", "Answers that wait", status.waiting),
        ("prompt_cache_bytes", "gauge", "Bytes of prompt caches", status.prompt_cache_bytes),
        ("prompt_cache_hits_total", "counter", "Prompts whose beginning was in the cache", status.prompt_cache_hits),
        ("prompt_cache_misses_total", "counter", "Prompts that were read whole", status.prompt_cache_misses),
        ("adapters_loaded", "gauge", "Adapters in memory", len(status.adapters)),
        ("adapter_bytes", "gauge", "Bytes of adapters in memory", status.adapter_bytes),
        ("active_memory_bytes", "gauge", "Bytes that MLX's arrays take", mx.get_active_memory()),
        ("quiet_seconds", "gauge", "Seconds since the last pass while rows are open", status.quiet_seconds),
        ("generating", "gauge", "1 while the thread that generates works", int(status.alive and not status.stuck)),
    ):
        lines += _metric(name, kind, help, [("", value)])
    return "".join(lines)


def _metric(name: str, kind: str, help: str, values: Iterable[tuple[str, float]]) -> list[str]:
    name = f"mlx_lora_{name}"
    return [
        f"# HELP {name} {help}\n",
        f"# TYPE {name} {kind}\n",
        *(f"{name}{labels} {_number(n)}\n" for labels, n in values),
    ]


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"
