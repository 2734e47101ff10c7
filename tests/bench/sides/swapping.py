"""Swaps in a chat on SmolLM2, with adapters of rank 16 on all linears that join, and one DoRA that runs alone.

Each is a `/use` as a person types it, timed around the command: the home's directory is looked at, the manifest
compared, the scheduler asked. A first token follows on a prompt that no cache knows, with a swap before it and without.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from tests.bench.sides.mixing import PROMPT, RANK

ALONE = "dora"


def run(*, model: str, adapters: int = 16, swaps: int = 200, first: int = 12) -> dict[str, Any]:
    """Milliseconds of `/use`: of the first one of each adapter, of later ones, and to a first token; medians."""
    from mlx_lora import ui
    from mlx_lora.serve.chat import Chat
    from mlx_lora.serve.service import open_service

    ui.silence()
    with tempfile.TemporaryDirectory(prefix="mlx-lora-bench-") as folder:
        os.environ["MLX_LORA_HOME"] = folder
        names = _stored(Path(folder), model, adapters)
        with open_service(model) as service:
            chat = Chat(service)
            loading = [_use(chat, name) for name in names]
            alone = dict(service.scheduler.status().alone)
            assert set(alone) == {ALONE}, alone
            taken = _swaps(chat, names, swaps)
            return {
                "swap_ms": median(value for values in taken.values() for value in values),
                "joined_ms": median(value for name, values in taken.items() if name != ALONE for value in values),
                "alone_ms": median(taken[ALONE]),
                "slowest_ms": max(value for values in taken.values() for value in values),
                "first_use_ms": median(loading),
                "first_token_ms": _first_tokens(chat, names, first),
                "adapters": len(names), "swaps": swaps, "adapter_bytes": service.scheduler.status().adapter_bytes,
            }  # fmt: skip


def _stored(home: Path, model: str, count: int) -> list[str]:
    """Adapters in a home; what is in them takes the same time."""
    from mlx_lora.adapters.attach import build
    from mlx_lora.config import Adapter
    from mlx_lora.models.load import load_stored
    from mlx_lora.store import adapter as store
    from mlx_lora.store import registry

    loaded = load_stored(model)
    base, names = registry.describe_base(loaded), [*(f"task-{index}" for index in range(count)), ALONE]
    for seed, name in enumerate(names):
        settings = Adapter(method="dora" if name == ALONE else "lora", rank=RANK, targets="all-linear")
        wrappers = build(loaded.model, settings, seed=seed)
        for index, wrapper in enumerate(wrappers.values()):
            wrapper.lora_b = 0.01 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(1000 * seed + index))
        manifest = store.Manifest(
            method=settings.method, adapter=settings.model_dump(), modules=list(wrappers), base=base, template="chat",
            scales={path: wrapper.scale for path, wrapper in wrappers.items()},
        )  # fmt: skip
        store.save(home / "adapters" / name, wrappers, manifest, len(loaded.model.layers))
    return names


def _use(chat: Any, name: str) -> float:
    """Milliseconds of a swap."""
    start = time.perf_counter()
    chat.commands.run(f"/use {name}")
    return 1000 * (time.perf_counter() - start)


def _swaps(chat: Any, names: list[str], count: int) -> dict[str, list[float]]:
    """Milliseconds of swaps by adapter, in an order without rule, every second one to the adapter that runs alone."""
    draw, taken = random.Random(0), {name: list[float]() for name in names}
    for index in range(count):
        name = ALONE if index % 2 else draw.choice(names[:-1])
        taken[name].append(_use(chat, name))
    return taken


def _first_tokens(chat: Any, names: list[str], count: int) -> dict[str, float]:
    """Milliseconds to a first token, medians: with the adapter used last, after a swap, after one to the adapter alone.

    A swap is part of its time.
    """
    found: dict[str, list[float]] = {"same": [], "swapped": [], "alone": []}
    for index in range(count + 1):
        _first_token(chat, names[0], 3 * index)
        same = _first_token(chat, names[0], 3 * index + 1)
        swapped = _first_token(chat, names[1 + index % (len(names) - 2)], 3 * index + 2)
        alone = _first_token(chat, ALONE, 3 * index + 2)
        if index:  # the first round compiles and allocates
            for kind, value in (("same", same), ("swapped", swapped), ("alone", alone)):
                found[kind].append(value)
    return {kind: median(values) for kind, values in found.items()}


def _first_token(chat: Any, name: str, number: int) -> float:
    from mlx_lora.serve.service import Prompt

    prompt = Prompt(tuple(1000 + 40 * number + place for place in range(PROMPT)))
    start = time.perf_counter()
    chat.commands.run(f"/use {name}")
    chat.service.ask(prompt, chat.adapter, max_tokens=1).whole()
    return 1000 * (time.perf_counter() - start)
