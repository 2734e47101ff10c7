"""Adapters come into memory when they are first asked for, stay within the bytes, and change while requests run."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_lora import paths
from mlx_lora.adapters.attach import Wrappers
from mlx_lora.adapters.stacks import Stack
from mlx_lora.errors import AdapterError
from mlx_lora.models.load import LoadedModel, load
from mlx_lora.serve.requests import Request, Token
from mlx_lora.serve.residence import Residence
from mlx_lora.serve.scheduler import Limits, Scheduler
from mlx_lora.store import adapter as store
from mlx_lora.store import registry
from mlx_lora.store.adapter import Manifest
from tests.serve.requests import by_itself, prompt, random_adapter

ASKED = prompt(8)


def stored(loaded: LoadedModel, name: str, seed: int, *, force: bool = False, **settings: Any) -> Wrappers:
    """An adapter in the home; what is read back is rounded, and returned."""
    settings = {"rank": 4, **settings}
    wrappers = random_adapter(loaded.model, seed, **settings)
    manifest = Manifest(
        method=settings.get("method", "lora"),
        adapter={"method": "lora", **settings},
        modules=list(wrappers),
        scales={path: wrapper.scale for path, wrapper in wrappers.items()},
        base=registry.describe_base(loaded),
    )
    out = paths.room("adapters", name)
    out.parent.mkdir(parents=True, exist_ok=True)
    store.save(out, wrappers, manifest, len(loaded.model.layers), force=force)
    return store.wrappers_for(loaded.model, store.read(out))


def own(loaded: LoadedModel, wrappers: Wrappers, count: int = 6) -> list[int]:
    return by_itself(loaded.model, wrappers, Request(ASKED, max_tokens=count), loaded.tokenizer.eos_token_ids)


@pytest.fixture
def running(tiny_path: Path) -> Iterator[Scheduler]:
    with Scheduler(lambda: load(tiny_path)) as scheduler:
        yield scheduler


def ask(running: Scheduler, name: str | None, count: int = 6) -> list[int]:
    return running.submit(Request(ASKED, name, max_tokens=count)).tokens()


def test_a_new_adapter_is_there_at_once_and_a_removed_one_is_not(running: Scheduler, tiny: LoadedModel) -> None:
    with pytest.raises(AdapterError, match="no adapter 'first'"):
        ask(running, "first")
    first = stored(tiny, "first", 1)
    assert ask(running, "first") == own(tiny, first) != own(tiny, {})
    dora = stored(tiny, "dora", 2, method="dora")
    assert ask(running, "dora") == own(tiny, dora)
    assert set(running.status().adapters) == {"first", "dora"} and dict(running.status().alone).keys() == {"dora"}
    for name in ("first", "dora"):
        registry.remove(name)
        with pytest.raises(AdapterError, match=f"no adapter {name!r}"):
            ask(running, name)
    assert not running.status().adapters and not running.status().adapter_bytes
    assert ask(running, None) == own(tiny, {})


def test_a_replaced_adapter_answers_new_requests_and_rows_that_run_keep_theirs(
    running: Scheduler, tiny: LoadedModel
) -> None:
    old = stored(tiny, "it", 1)
    slow = running.submit(Request(ASKED, "it", max_tokens=60))
    first = slow.next(timeout=20)
    while not isinstance(first, Token):
        first = slow.next(timeout=20)
    new = stored(tiny, "it", 2, force=True)
    assert ask(running, "it") == own(tiny, new) != own(tiny, old)
    registry.remove("it")
    rest = [first.token, *(event.token for event in slow if isinstance(event, Token))]
    assert rest == own(tiny, old, 60)
    with pytest.raises(AdapterError):
        ask(running, "it")
    assert not running.status().adapter_bytes


def test_a_damaged_adapter_and_one_of_another_base_fail_alone(running: Scheduler, tiny: LoadedModel) -> None:
    stored(tiny, "good", 1)
    stored(tiny, "damaged", 2)
    weights = paths.room("adapters", "damaged") / store.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-8])
    good = running.submit(Request(ASKED, "good", max_tokens=40))
    with pytest.raises(AdapterError):
        ask(running, "damaged")
    manifest = paths.room("adapters", "good").parent / "foreign"
    shutil.copytree(paths.room("adapters", "good"), manifest)
    text = (manifest / store.MANIFEST).read_text()
    (manifest / store.MANIFEST).write_text(text.replace(registry.describe_base(tiny).fingerprint, "f" * 64))
    with pytest.raises(AdapterError, match="belongs to another base"):
        ask(running, "foreign")
    assert len(good.tokens()) == 40 and running.status().adapters == ("good",)


def test_the_adapter_used_longest_ago_is_dropped_and_loaded_again(tiny: LoadedModel, tiny_path: Path) -> None:
    wrappers = {name: stored(tiny, name, seed) for seed, name in enumerate("abcdef", 1)}
    factors = sum(array.nbytes for wrapper in wrappers["a"].values() for array in wrapper.adapter_arrays().values())
    limit = 4 * factors  # three adapters and slot 0
    with Scheduler(lambda: load(tiny_path), limits=Limits(adapter_bytes=limit)) as running:
        for name in "abcadeafcb":
            assert ask(running, name) == own(tiny, wrappers[name]), name
            assert running.status().adapter_bytes <= limit and len(running.status().adapters) <= 3
        assert running.status().adapters == ("f", "c", "b")


def test_an_adapter_that_a_row_has_is_never_dropped(tiny: LoadedModel, tiny_path: Path) -> None:
    wrappers = {name: stored(tiny, name, seed) for seed, name in enumerate("abc", 1)}
    with Scheduler(lambda: load(tiny_path), limits=Limits(adapter_bytes=1)) as running:
        answers = {name: running.submit(Request(ASKED, name, max_tokens=40)) for name in "abc"}
        for name, answer in answers.items():
            assert answer.tokens() == own(tiny, wrappers[name], 40)
        assert ask(running, "a") == own(tiny, wrappers["a"])
        assert not running.status().adapters, "over the limit nothing stays that no row has"


def test_loading_happens_between_passes_and_leaves_running_rows_their_pace(
    running: Scheduler, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of loading is made longer than the share of a turn that loading has."""
    stored(tiny, "it", 1, targets="all-linear")
    put, order = Stack.put, []

    def slow(stack: Stack, *arguments: Any) -> None:
        order.append("module")
        time.sleep(0.011)
        put(stack, *arguments)

    monkeypatch.setattr(Stack, "put", slow)
    beside = running.submit(Request(ASKED, max_tokens=100_000), lambda event: order.append(type(event).__name__))
    while "Token" not in order:
        time.sleep(0.001)
    begin = len(order)
    assert len(ask(running, "it")) == 6
    between = order[begin : len(order) - order[::-1].index("module")]
    assert between.count("module") == 21 and between.count("Token") >= 18
    beside.cancel()


def test_loading_and_unloading_on_purpose(running: Scheduler, tiny: LoadedModel) -> None:
    wrappers = stored(tiny, "it", 1)
    running.load("it", timeout=20)
    assert running.status().adapters == ("it",)
    running.unload("it", timeout=20)
    running.unload("it", timeout=20)
    assert not running.status().adapters
    assert ask(running, "it") == own(tiny, wrappers)
    with pytest.raises(AdapterError, match="no adapter 'nothing'"):
        running.load("nothing", timeout=20)


def test_adapters_change_while_many_requests_run(tiny: LoadedModel, tiny_path: Path) -> None:
    """Whatever version a request gets, its whole answer is that version's."""
    versions = [stored(tiny, "it", seed, force=True) for seed in (1, 2, 3)]
    possible = [own(tiny, wrappers, 12) for wrappers in versions]
    assert len({tuple(tokens) for tokens in possible}) == 3
    with Scheduler(lambda: load(tiny_path), limits=Limits(rows=6, adapter_bytes=1)) as running:
        found: list[list[int]] = []

        def client() -> None:
            for _ in range(6):
                found.append(ask(running, "it", 12))

        threads = [threading.Thread(target=client) for _ in range(4)]
        for thread in threads:
            thread.start()
        for seed in (2, 1, 3, 2, 1, 3):
            stored(tiny, "it", seed, force=True)
        for thread in threads:
            thread.join(60)
        assert len(found) == 24 and all(tokens in possible for tokens in found)
        assert ask(running, "it", 12) == possible[2]


def test_an_end_of_its_own_ends_an_adapter_s_answers(tiny: LoadedModel) -> None:
    residence = Residence(tiny, limit=1 << 30)
    residence.give("it", random_adapter(tiny.model, 1, rank=4), end=65)
    held = residence.lease("it")
    assert held is not None
    assert held.ends == {65} and held.alone is None and residence.mixed.keys == {held.key}
    residence.give("other", random_adapter(tiny.model, 1, rank=4))
    other = residence.lease("other")
    assert other is not None and other.ends == frozenset()
