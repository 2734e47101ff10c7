"""Messages in, text out, on one base: each adapter is asked as it was trained."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_lora.adapters.attach import build
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError
from mlx_lora.models.load import load_stored
from mlx_lora.serve.answer import prompt_tokens
from mlx_lora.serve.requests import Finished, Request
from mlx_lora.serve.scheduler import Limits
from mlx_lora.serve.service import Service, open_service
from mlx_lora.store import adapter as store
from mlx_lora.store import registry

QUESTION = [{"role": "user", "content": "say 3 twice"}]


def save_adapter(path: Path, model: Path, seed: int, **manifest: object) -> None:
    """A random adapter over the base at `model`."""
    loaded, config = load_stored(model), Adapter(rank=2)
    wrappers = build(loaded.model, config, seed=seed)
    for index, wrapper in enumerate(wrappers.values()):
        wrapper.lora_b = mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(10 * seed + index))
    described = {"method": "lora", "adapter": config.model_dump(), "modules": list(wrappers)} | {
        "scales": {path: wrapper.scale for path, wrapper in wrappers.items()},
        "base": registry.describe_base(loaded), "template": "chat",
    }  # fmt: skip
    store.save(path, wrappers, store.Manifest.model_validate(described | manifest), 3)


@pytest.fixture
def service(home: Path, tiny_path: Path) -> Iterator[Service]:
    """The tiny base with `one`, `plain` (trained without a template) and `foreign`, which belongs elsewhere."""
    save_adapter(home / "adapters/one", tiny_path, 1)
    save_adapter(home / "adapters/plain", tiny_path, 2, template="none")
    save_adapter(home / "adapters/foreign", tiny_path, 3, base={"name": "elsewhere", "fingerprint": "0" * 64})
    with open_service(str(tiny_path)) as service:
        yield service


def test_adapters_that_fit_are_listed_and_the_others_say_why(service: Service) -> None:
    assert service.names() == ["one", "plain"]
    assert "belongs to another base" in str(service.fault("foreign"))
    with pytest.raises(AdapterError, match="no adapter 'two'"):
        service.trained("two")


def test_each_adapter_is_asked_as_it_was_trained_and_the_base_by_its_own_template(service: Service) -> None:
    chat = prompt_tokens(service.tokenizer, QUESTION)
    assert list(service.prompt(QUESTION, "one").tokens) == chat
    assert list(service.prompt(QUESTION, "plain").tokens) == list(service.raw("say 3 twice").tokens) != chat
    assert list(service.prompt(QUESTION).tokens) == chat


def test_answers_of_several_adapters_come_as_text(service: Service) -> None:
    replies = [service.ask(service.prompt(QUESTION, name), name, max_tokens=6) for name in (None, "one", "plain")]
    texts = [reply.whole() for reply in replies]
    again = service.ask(service.prompt(QUESTION, "one"), "one", max_tokens=6)
    assert texts[1] == again.whole() != texts[0]
    assert again.finished is not None and again.finished.cached_tokens > 0
    assert again.tokens == again.finished.generated_tokens and again.first is not None


def test_a_stop_string_ends_the_answer(service: Service) -> None:
    whole = service.ask(service.prompt(QUESTION, "one"), "one", max_tokens=12).whole()
    stop = whole[4:6]
    reply = service.ask(service.prompt(QUESTION, "one"), "one", max_tokens=12, stop=[stop])
    assert reply.whole() == whole[: whole.index(stop)]
    assert reply.finished is not None and reply.finished.reason == "stop"


def test_an_answer_that_nobody_reads_on_is_cancelled(service: Service) -> None:
    reply = service.ask(service.prompt(QUESTION, "one"), "one", max_tokens=400)
    for _ in reply:
        break
    assert service.ask(service.prompt(QUESTION), max_tokens=2).whole() is not None
    while service.scheduler.status().running:
        pass
    assert service.scheduler.status().generated_tokens < 400


def test_a_row_whose_adapter_was_loaded_while_all_places_were_taken_begins_then(home: Path, tiny_path: Path) -> None:
    save_adapter(home / "adapters/one", tiny_path, 1)
    with open_service(str(tiny_path), limits=Limits(rows=1)) as service:
        asked = [Request(service.prompt(QUESTION).tokens, name, max_tokens=150) for name in ("one", None)]
        answers = [service.scheduler.submit(request) for request in asked]
        for answer in reversed(answers):
            while not isinstance(answer.next(timeout=20), Finished):
                pass


def test_an_adapter_that_was_replaced_is_asked_in_its_new_way(service: Service, home: Path, tiny_path: Path) -> None:
    before = service.prompt(QUESTION, "one")
    shutil.rmtree(home / "adapters/one")
    save_adapter(home / "adapters/one", tiny_path, 1, template="none")
    assert service.prompt(QUESTION, "one") == service.raw("say 3 twice") != before


def test_an_adapter_outside_the_home_has_its_path_for_a_name(tmp_path: Path, tiny_path: Path) -> None:
    save_adapter(tmp_path / "mine", tiny_path, 1)
    with open_service(str(tiny_path), [str(tmp_path / "mine")]) as service:
        (label,) = service.names()
        assert label == str(tmp_path / "mine")
        assert service.ask(service.prompt(QUESTION, label), label, max_tokens=3).whole() is not None
        assert service.scheduler.status().adapters == (label,)
