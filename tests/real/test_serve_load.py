"""Two thousand requests from 32 clients, a third cut off, while adapters come, change and go: no wrong answer.

The server and its clients share a process over loopback, on the base that comes with the package.
"""

from __future__ import annotations

import gc
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest

from mlx_lora import paths
from mlx_lora.adapters.attach import put
from mlx_lora.models.load import LoadedModel, load
from mlx_lora.serve.requests import Request, Token
from mlx_lora.serve.text import TextStream
from mlx_lora.serve.worker import Worker
from mlx_lora.store import adapter as store
from tests.serve.http.conftest import Running, chunks, running
from tests.serve.requests import TIE, by_itself
from tests.serve.test_service import save_adapter

pytestmark = pytest.mark.real

REQUESTS, CLIENTS, TOKENS = 2000, 32, 12
STEADY = [f"steady{index}" for index in range(7)]
CHANGING, SEEDS = "changing", (101, 102, 103)
WORDS = [
    "How many orders are in Tallinn?",
    "Call Junas Baker on 8 February",
    "List every city",
    "hello",
    "x",
    "Ticket 85",
]


@dataclass(frozen=True)
class Expected:
    """A text, and where in it another one is as likely."""

    text: str
    ties: tuple[int, ...]

    def matches(self, found: str) -> bool:
        """Whether `found` is this text, or parts from it at a tie."""
        if found == self.text:
            return True
        pairs = enumerate(zip(found, self.text, strict=False))
        apart = next((index for index, (one, other) in pairs if one != other), min(len(found), len(self.text)))
        return any(abs(apart - tie) <= 4 for tie in self.ties)


def expected(loaded: LoadedModel, path: Path | None, server: Running, text: str, name: str | None) -> Expected:
    """What the model gives by itself, without any batch."""
    prompt = server.service.prompt([{"role": "user", "content": text}], name)
    wrappers = store.wrappers_for(loaded.model, store.read(path)) if path else {}
    request = Request(prompt.tokens, max_tokens=TOKENS)
    tokens = by_itself(loaded.model, wrappers, request, loaded.tokenizer.eos_token_ids)
    put(loaded.model, wrappers)
    logits = loaded.model(mx.array([[*prompt.tokens, *tokens]]))[0, len(prompt.tokens) - 1 :]
    best = mx.sort(logits, axis=-1)[:, -2:]
    gaps: list[float] = (best[:, 1] - best[:, 0]).tolist()  # type: ignore[assignment]
    put(loaded.model, {})
    stream, whole, ties = TextStream(loaded.tokenizer), "", []
    for token, gap in zip([*tokens, None], gaps, strict=True):
        if gap <= TIE:
            ties.append(len(whole))
        piece = stream.push(Token(token)) if token is not None else stream.finish()
        whole += piece.text if piece else ""
    return Expected(whole, tuple(ties))


class Load:
    """What clients ask, and what they found. `wrong` are texts and statuses that nobody should get."""

    def __init__(self, server: Running, answers: dict[tuple[str, str], list[Expected]]):
        self.server, self.answers = server, answers
        self.statuses: Counter[int] = Counter()
        self.wrong: list[Any] = []
        self.cut = 0
        self._left = REQUESTS
        self._lock = threading.Lock()

    def client(self, seed: int) -> None:
        """Ask until all have been asked; a busy server is asked again."""
        chance = random.Random(seed)
        with httpx.Client(base_url=f"http://127.0.0.1:{self.server.port}", timeout=60, trust_env=False) as client:
            while self._take():
                name, text = chance.choice([*STEADY, CHANGING, CHANGING, "base"]), chance.choice(WORDS)
                form = chance.choice(["whole", "stream", "cut"])
                while self._ask(client, name, text, form, chance) == 429:
                    time.sleep(0.02)

    def _take(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left >= 0

    def _ask(self, client: httpx.Client, name: str, text: str, form: str, chance: random.Random) -> int:
        body = {"model": name, "messages": [{"role": "user", "content": text}], "max_tokens": TOKENS, "temperature": 0}
        try:
            with client.stream("POST", "/v1/chat/completions", json=body | {"stream": form != "whole"}) as response:
                found = self._read(response, form, chance) if response.status_code == 200 else None
                detail = "" if found is not None or response.status_code == 200 else response.read().decode()
        except Exception as error:
            found, response, detail = None, httpx.Response(599), repr(error)
        status = response.status_code
        with self._lock:
            self.statuses[status] += 1
            self.cut += form == "cut" and status == 200
            allowed = {200, 429, 503} | ({404} if name == CHANGING else set())
            right = found is None or any(one.matches(found) for one in self.answers[name, text])
            if status not in allowed or not right:
                self.wrong.append((status, name, text, found, detail))
        return status

    def _read(self, response: httpx.Response, form: str, chance: random.Random) -> str | None:
        if form == "whole":
            return str(response.read() and response.json()["choices"][0]["message"]["content"])
        parts, text = chunks(response), ""
        for number, part in enumerate(parts):
            if "error" in part:
                raise ValueError(part)
            text += part["choices"][0]["delta"].get("content") or ""
            if form == "cut" and number >= chance.randint(0, 4):
                return None
        return text


def change(home: Path, base: Path, end: threading.Event) -> None:
    """Add, replace and remove an adapter, again and again."""
    place, number = home / "adapters" / CHANGING, 0
    while not end.wait(0.3):
        number += 1
        new = home / f"made-{number}"
        save_adapter(new, base, SEEDS[number % len(SEEDS)])
        if place.exists():
            shutil.rmtree(place)
        if number % 4:
            new.rename(place)


@pytest.fixture(scope="module")
def base() -> Path:
    return paths.bundled("data/base")


@pytest.fixture
def server(home: Path, base: Path) -> Iterator[Running]:
    for seed, name in enumerate(STEADY):
        save_adapter(home / "adapters" / name, base, seed)
    save_adapter(home / "adapters" / CHANGING, base, SEEDS[0])
    with running(base, rows=16, waiting=8) as found:
        yield found


def expectations(server: Running, home: Path, base: Path) -> dict[tuple[str, str], list[Expected]]:
    loaded = load(base)
    places = {name: [home / "adapters" / name] for name in STEADY}
    places[CHANGING] = []
    for seed in SEEDS:
        save_adapter(home / "versions" / str(seed), base, seed)
        places[CHANGING].append(home / "versions" / str(seed))
    found = {
        (name, text): [expected(loaded, path, server, text, name) for path in paths_]
        for name, paths_ in places.items()
        for text in WORDS
    }
    return found | {("base", text): [expected(loaded, None, server, text, None)] for text in WORDS}


def memory(server: Running) -> int:
    """Bytes of arrays once nothing runs, without what is kept of prompts."""
    while (status := server.service.scheduler.status()).running or status.waiting:
        time.sleep(0.01)
    server.service.scheduler.ask(lambda worker: worker.prompts.shrink(0))
    server.service.scheduler.ask(lambda worker: mx.clear_cache())
    gc.collect()  # models of tests that ran before in this process
    return mx.get_active_memory()


def test_load(server: Running, home: Path, base: Path) -> None:
    answers = expectations(server, home, base)
    assert len({one.text for found in answers.values() for one in found}) > len(answers), (
        "texts don't tell adapters apart"
    )
    load = Load(server, answers)
    for name in [*STEADY, CHANGING]:
        assert server.chat(name, max_tokens=2).status_code == 200
    before = memory(server)
    ended = threading.Event()
    changing = threading.Thread(target=change, args=(home, base, ended))
    clients = [threading.Thread(target=load.client, args=(seed,)) for seed in range(CLIENTS)]
    start = time.monotonic()
    for thread in [changing, *clients]:
        thread.start()
    for thread in clients:
        thread.join()
    seconds = time.monotonic() - start
    ended.set()
    changing.join()
    after = memory(server)
    status = server.service.scheduler.status()
    print(f"\n{REQUESTS} requests in {seconds:.0f} s, by status {dict(load.statuses)}, {load.cut} cut off; "
          f"memory {before} -> {after} ({after / before - 1:+.2%}); {status.passes} passes")  # fmt: skip
    assert load.wrong == []
    assert load.statuses[200] + load.statuses[404] + load.statuses[503] == REQUESTS
    assert load.cut > REQUESTS / 5 and load.statuses[429] and load.statuses[404]
    assert abs(after / before - 1) <= 0.02
    assert server.client.get("/health").status_code == 200


def test_every_client_hears_of_the_death_of_the_thread(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise SystemExit("killed on purpose")

    ends: list[tuple[float, str]] = []

    def client(stream: bool) -> None:
        body = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 900, "stream": stream}
        # the token that ends an answer never comes
        body |= {"logit_bias": {str(end): -100 for end in server.service.tokenizer.eos_token_ids}}
        answer = httpx.post(
            f"http://127.0.0.1:{server.port}/v1/chat/completions", json=body, timeout=60, trust_env=False
        )
        ends.append((time.monotonic(), answer.text))

    clients = [threading.Thread(target=client, args=(bool(index % 2),)) for index in range(24)]
    for thread in clients:
        thread.start()
    while (status := server.service.scheduler.status()).running + status.waiting < 24:
        time.sleep(0.01)
    start = time.monotonic()
    monkeypatch.setattr(Worker, "turn", killed)
    for thread in clients:
        thread.join(30)
    assert len(ends) == 24 and all("the thread that generates has ended" in text for _, text in ends)
    print(f"\nthe last of 24 clients heard of it after {max(at for at, _ in ends) - start:.2f} s")
    assert max(at for at, _ in ends) - start < 5
    health = server.client.get("/health")
    assert health.status_code == 503 and "ended" in health.json()["reason"]
