"""Requests answered by a tiny model with random weights: what is enforced holds whatever it would rather say."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.models.open import OpenModel
from mlx_lora.serve.openai import ApiError, prepare
from mlx_lora.serve.openai.grammar import Grammars
from mlx_lora.serve.openai.prepare import CHAT_TOKENS
from mlx_lora.serve.service import Service, open_service
from tests.serve.openai.drive import HELLO, complete, joined, run, tool
from tests.serve.openai.schemas import random_schema, satisfies
from tests.serve.test_service import save_adapter

DIGITS = {"a": {"type": "integer", "minimum": 0, "maximum": 99}}
TOOLS = [tool(**DIGITS), tool("sub", b={"type": "boolean"})]


def text(whole: dict[str, Any], index: int = 0) -> str:
    return str(whole["choices"][index]["message"]["content"])


def schema_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema} | more}


def error(service: Service, **body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        prepare(service, {"model": service.base, "messages": HELLO} | body)
    return caught.value


def test_every_answer_satisfies_its_schema(tooled: Service) -> None:
    draw = random.Random(11)
    for seed in range(10):
        schema = random_schema(draw, 2)
        _, whole = run(tooled, {"seed": seed, "max_tokens": 1900, "response_format": schema_format(schema)})
        assert whole["choices"][0]["finish_reason"] == "stop", schema
        assert satisfies(json.loads(text(whole)), schema), (schema, text(whole))


def test_a_json_object_is_one(tooled: Service) -> None:
    bias = {str(tooled.tokenizer.encode("}")[0]): 100}
    _, whole = run(tooled, {"response_format": {"type": "json_object"}, "logit_bias": bias, "max_tokens": 500})
    assert isinstance(json.loads(text(whole)), dict)


@pytest.mark.parametrize("name", ["add", "sub"])
def test_a_tool_that_is_chosen_is_called(tooled: Service, name: str) -> None:
    choice = {"type": "function", "function": {"name": name}}
    chunks, whole = run(tooled, {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "seed": 1})
    (call,) = whole["choices"][0]["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert call["function"]["name"] == name and set(arguments) == ({"a"} if name == "add" else {"b"})
    assert joined(chunks)["message"]["tool_calls"][0]["function"] == call["function"]
    assert whole["choices"][0]["finish_reason"] == "tool_calls"


def test_a_tool_is_called_where_one_is_required(tooled: Service) -> None:
    _, whole = run(
        tooled,
        {
            "tools": TOOLS,
            "tool_choice": "required",
            "n": 2,
            "seed": 5,
            "max_tokens": 1500,
            "parallel_tool_calls": False,
        },
    )
    for choice in whole["choices"]:
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        assert {call["function"]["name"] for call in choice["message"]["tool_calls"]} <= {"add", "sub"}


def test_a_schema_beside_tools_allows_either(tooled: Service) -> None:
    fields = {"tools": TOOLS, "response_format": schema_format({"const": 7}), "parallel_tool_calls": False}
    brace = str(tooled.tokenizer.encode("7")[0])
    _, whole = run(tooled, {**fields, "logit_bias": {brace: 100}})
    assert text(whole) == "7"
    _, whole = run(tooled, {**fields, "logit_bias": {brace: -100}})
    assert whole["choices"][0]["finish_reason"] == "tool_calls"


def test_what_cant_fit_is_refused_before_it_is_encoded(tooled: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding millions of characters takes seconds, in which nobody else's prompt is encoded."""
    for name in ("prompt", "raw"):
        monkeypatch.setattr(Service, name, lambda *_, **__: pytest.fail("it was encoded"))
    long = [{"role": "user", "content": "x" * 40_000}]
    assert error(tooled, messages=long).code == "context_length_exceeded"
    assert (
        error(tooled, tools=[tool() | {"function": {"name": "add", "description": "x" * 40_000}}]).param == "messages"
    )
    for prompt in ("x" * 40_000, ["x", "x" * 40_000]):
        with pytest.raises(ApiError, match="40,000 characters, this model's context is 2,048 tokens"):
            prepare(tooled, {"model": tooled.base, "prompt": prompt}, "completion")
    with pytest.raises(ApiError, match="100000 answers are asked for"):
        prepare(tooled, {"model": tooled.base, "prompt": ["a"] * 100_000}, "completion")


def test_what_cant_be_enforced_is_refused_by_name(tooled: Service) -> None:
    unknown = schema_format({"type": "array", "uniqueItems": True})
    assert "uniqueItems" in error(tooled, response_format=unknown).message
    strict = tool(**DIGITS)
    strict["function"] |= {"strict": True, "parameters": {"not": {}}}
    assert error(tooled, tools=[strict]).param == "tools.add.parameters"
    assert error(tooled, chat_template_kwargs={"chat_template": "{{ x }}"}).param == "chat_template_kwargs"
    assert error(tooled, logit_bias={"99999": 1}).param == "logit_bias"
    assert error(tooled, messages=[{"role": "user", "content": "x" * 3000}]).code == "context_length_exceeded"


def test_tools_are_offered_without_llguidance_unless_they_are_strict(
    tooled: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Grammars, "of", Grammars)  # one that knows nothing yet
    monkeypatch.setitem(sys.modules, "llguidance", None)
    asked = prepare(tooled, {"model": tooled.base, "messages": HELLO, "tools": TOOLS})
    assert asked.requests[0].processors == () and asked.choices[0].calls
    assert error(tooled, tools=TOOLS, tool_choice="required").status == 501
    assert error(tooled, response_format={"type": "json_object"}).status == 501


def test_a_schema_of_a_tool_that_isnt_strict_may_be_more_than_can_be_enforced(tooled: Service) -> None:
    loose = tool()
    loose["function"]["parameters"] = {"type": "object", "properties": {"a": {"not": {}}}}
    asked = prepare(tooled, {"model": tooled.base, "messages": HELLO, "tools": [loose], "tool_choice": "required"})
    assert len(asked.requests[0].processors) == 1


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "robot", "content": "x"}, "messages.0.role"), ({"role": "assistant", "content": ""}, "messages.0"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content"),
        ({"role": "user", "content": 3}, "messages.0.content"), ({"role": "user", "prefix": True}, "messages.0.prefix"),
        ({"role": "assistant", "tool_calls": 3}, "messages.0.content"),
    ],
)  # fmt: skip
def test_messages_that_cant_be_read_are_refused_by_their_place(
    tooled: Service, message: dict[str, Any], param: str
) -> None:
    found = error(tooled, messages=[message])
    assert found.status == 400 and (found.param or "").startswith(param)


def test_messages_have_one_form_however_they_are_written(tooled: Service) -> None:
    def prompt(*messages: dict[str, Any]) -> str:
        asked = prepare(tooled, {"model": tooled.base, "messages": list(messages), "tools": TOOLS})
        return str(tooled.tokenizer.decode(asked.requests[0].tokens))

    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    found = prompt(
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "kind"}]},
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "1", "content": ""},
    )
    written = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert found.endswith(
        f"<|system|>be\nkind<|end|>\n<|user|>hi<|end|>\n<|assistant|>{written}<|end|>\n<|tool|><|end|>\n<|assistant|>"
    )
    assert '"name": "sub"' in found


def test_choices_have_seeds_of_their_own_whatever_else_is_answered(tooled: Service) -> None:
    asked = {"n": 3, "seed": 4, "max_tokens": 12, "temperature": 1.5, "top_k": 50, "min_p": 0.001, "top_p": 0.99}
    _, first = run(tooled, asked)
    _, again = run(tooled, asked)
    texts = [text(first, index) for index in range(3)]
    assert texts == [text(again, index) for index in range(3)] and len(set(texts)) == 3
    _, other = run(tooled, {**asked, "n": 1, "seed": 6})
    assert text(other) == texts[2]


def test_penalties_and_biases_change_what_is_said(tooled: Service) -> None:
    plain = complete(tooled, prompt="aa", max_tokens=12, temperature=0)[1]["choices"][0]["text"]
    for fields in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 5}):
        assert complete(tooled, prompt="aa", max_tokens=12, temperature=0, **fields)[1]["choices"][0]["text"] != plain
    token = tooled.tokenizer.encode("k")[0]
    biased = complete(tooled, prompt="aa", max_tokens=5, temperature=0, logit_bias={str(token): 100})
    assert biased[1]["choices"][0]["text"] == "kkkkk"


def test_completions_of_several_prompts_are_in_order(tooled: Service) -> None:
    tokens = list(tooled.tokenizer.encode("cd"))
    chunks, whole = complete(tooled, prompt=["ab", "cd"], n=2, max_tokens=5, temperature=0, logprobs=1)
    alone = complete(tooled, prompt=tokens, max_tokens=5, temperature=0, logprobs=1)[1]["choices"][0]
    texts = [choice["text"] for choice in whole["choices"]]
    told = [pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-3) for choice in whole["choices"]]
    assert told[0] == told[1].expected and alone["logprobs"]["token_logprobs"] == told[2] == told[3].expected
    assert alone["logprobs"]["token_logprobs"] != told[0]
    streamed = ["".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == i) for i in range(4)]
    assert streamed == texts
    assert whole["usage"]["prompt_tokens"] == 2 * len(tokens) and whole["usage"]["completion_tokens"] == 20
    assert len(whole["choices"][3]["logprobs"]["tokens"]) == 5


@pytest.mark.parametrize("prompt", ["", [], [[]], [[99999]], [[-1]]])
def test_prompts_that_cant_be_continued_are_refused(tooled: Service, prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        prepare(tooled, {"model": tooled.base, "prompt": prompt}, "completion")
    assert caught.value.status == 400


@pytest.fixture
def adapters(home: Path, tiny_path: Path) -> Iterator[Service]:
    """`one`, `plain` without a template, `kind` with a system line, and `foreign`, which belongs elsewhere."""
    save_adapter(home / "adapters/one", tiny_path, 1)
    save_adapter(home / "adapters/plain", tiny_path, 2, template="none")
    save_adapter(home / "adapters/kind", tiny_path, 2, recipe={"data": {"system": "be kind"}})
    save_adapter(home / "adapters/foreign", tiny_path, 3, base={"name": "elsewhere", "fingerprint": "0" * 64})
    with open_service(str(tiny_path)) as service:
        yield service


def test_the_model_is_the_base_or_an_adapter_and_nothing_else(adapters: Service, tmp_path: Path) -> None:
    service = adapters

    def tokens(model: str, *messages: dict[str, str]) -> str:
        asked = prepare(service, {"model": model, "messages": list(messages) or HELLO})
        assert asked.requests[0].adapter == (None if model == service.base else model)
        return str(service.tokenizer.decode(asked.requests[0].tokens))

    assert tokens(service.base) == tokens("one") == "<|user|>hello<|end|>\n<|assistant|>"
    assert tokens("plain") == "hello"
    assert tokens("kind") == "<|system|>be kind<|end|>\n<|user|>hello<|end|>\n<|assistant|>"
    assert "be kind" not in tokens("kind", {"role": "system", "content": "be brief"}, *HELLO)
    assert "no system" in error(service, model="plain", messages=[{"role": "system", "content": "x"}]).message
    for name in ("foreign", "two", "../one", "/etc/passwd", "mlx-community/x", str(tmp_path / "home/adapters/one")):
        found = error(service, model=name)
        assert (found.status, found.code) == (404, "model_not_found"), name
    prints = {
        prepare(service, {"model": name, "messages": HELLO}).fingerprint for name in (service.base, "one", "kind")
    }
    assert len(prints) == 3


def test_a_template_without_tools_refuses_them(adapters: Service) -> None:
    assert "shows no tools" in error(adapters, tools=TOOLS).message


def test_what_the_model_s_makers_recommend_is_read_from_its_directory(tmp_path: Path) -> None:
    assert OpenModel(tmp_path).generation == {}
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [3]}')
    assert OpenModel(tmp_path).generation["temperature"] == 0.6 and OpenModel(tmp_path).ends == [3]
    (tmp_path / "generation_config.json").write_text("[]")
    assert OpenModel(tmp_path).generation == {}


def test_defaults_follow_the_model_s_own_recommendations(adapters: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def sampling(**body: Any) -> Any:
        return prepare(adapters, {"model": adapters.base, "messages": HELLO} | body).requests[0]

    assert sampling().sampling.temperature == 1.0 and sampling().max_tokens < CHAT_TOKENS
    monkeypatch.setattr(adapters, "generation", {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95})
    assert (sampling().sampling.temperature, sampling().sampling.top_k) == (0.6, 20)
    assert (
        sampling(temperature=0.0, top_k=-1).sampling.top_k == 0 and sampling(temperature=0.0).sampling.temperature == 0
    )
    monkeypatch.setattr(adapters, "generation", {"do_sample": False, "repetition_penalty": 1.1})
    assert sampling().sampling.temperature == 0 and len(sampling().processors) == 1
    assert sampling(max_completion_tokens=7, max_tokens=9).max_tokens == 7
