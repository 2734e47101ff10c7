"""What a request may say, and what is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_lora.serve.openai import ApiError
from mlx_lora.serve.openai.bodies import ChatBody, CompletionBody, read
from tests.serve.openai.drive import HELLO, tool

CHAT = {"model": "m", "messages": HELLO}

# name: (fields, what the error names, a word of its message)
REFUSED: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "no model": ({"model": None}, "model", "required"),
    "no messages": ({"messages": []}, "messages", "at least 1"),
    "unknown": ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    "of another server": ({"adapters": "/etc"}, "adapters", "name one as model"),
    "functions": ({"functions": [{}]}, "functions", "use tools"),
    "audio": ({"modalities": ["text", "audio"]}, "modalities", "isn't supported"),
    "verbosity": ({"verbosity": "high"}, "verbosity", "isn't supported"),
    "hot": ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    "not a number": ({"temperature": float("nan")}, "temperature", ""),
    "text for a number": ({"max_tokens": "5"}, "max_tokens", "integer"),
    "no tokens": ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    "many choices": ({"n": 17}, "n", "less than or equal to 16"),
    "empty stop": ({"stop": [""]}, "stop", "at least 1"),
    "top without logprobs": ({"top_logprobs": 2}, None, "logprobs: true"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format", "needs a schema"),
    "grammar": ({"response_format": {"type": "grammar"}}, "response_format", "json_object"),
    "tool twice": ({"tools": [tool(), tool()]}, None, "'add' twice"),
    "tool by a foreign name": ({"tools": [tool("a b")]}, "tools.0.function.name", "pattern"),
    "choice of nothing": ({"tool_choice": "required"}, None, "there are no tools"),
    "choice of another": (
        {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, None, "'sub'",
    ),
    "bias": ({"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cant_be_done_is_refused_by_name(name: str) -> None:
    fields, param, words = REFUSED[name]
    with pytest.raises(ApiError) as caught:
        read(ChatBody, CHAT | fields)
    assert caught.value.status == 400 and words in caught.value.message
    assert param is None or (caught.value.param or "").startswith(param)
    assert set(caught.value.body()["error"]) == {"message", "type", "param", "code"}


def test_what_changes_nothing_is_ignored_and_null_is_absent() -> None:
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "seed": None, "stop": None}
    nothing = {"modalities": ["text"], "verbosity": "medium", "function_call": "none", "functions": []}
    body = read(ChatBody, CHAT | harmless | nothing | {"temperature": 0})
    assert (
        body == read(ChatBody, CHAT | {"temperature": 0})
        and body.stop == []
        and read(ChatBody, CHAT | {"stop": "a"}).stop == ["a"]
    )
    assert read(CompletionBody, {"model": "m", "prompt": "x", "echo": False, "best_of": 1, "suffix": None}).n == 1


def test_a_body_that_is_no_object_is_refused() -> None:
    for body in (None, [], "x", 3):
        with pytest.raises(ApiError, match="not a JSON object"):
            read(ChatBody, body)


def test_prompts_of_completions_are_texts_or_tokens() -> None:
    def prompts(prompt: Any) -> list[Any]:
        return read(CompletionBody, {"model": "m", "prompt": prompt}).prompts

    assert prompts("a") == ["a"] and prompts(["a", "b"]) == ["a", "b"]
    assert prompts([1, 2]) == [[1, 2]] and prompts([[1], [2, 3]]) == [[1], [2, 3]]
    with pytest.raises(ApiError):
        prompts([1, "a"])
