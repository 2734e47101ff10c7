"""Bodies that no client should send: each is answered, or refused as the client's fault."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from mlx_lora.errors import AdapterError
from mlx_lora.serve.openai import ApiError, api_error, prepare
from mlx_lora.serve.service import Service
from tests.serve.openai.drive import HELLO, tool

STRANGE: list[Any] = [
    None, True, False, 0, -1, 1e308, 10**30, "", "x", "\ud800", "\x00", "a" * 5000, [], {}, [[]], [None], [{}],
    {"a": {}},
    {"type": "object"}, {"type": ["string", 3]}, {"$ref": "#/x"}, {"role": "user"}, {"type": "text"}, {"": ""},
    {"type": "function", "function": {}}, {"function": 3}, [{"type": "text", "text": 3}], float("nan"),
]  # fmt: skip
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
SCHEMA = {"properties": {"a": {"enum": [1]}}}
BODY: dict[str, Any] = {
    "messages": [
        *HELLO, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "user", "content": [{"type": "text", "text": "go on"}]},
    ],
    "tools": [tool(a={"type": "integer"})], "tool_choice": "auto", "temperature": 0.5, "n": 2, "stop": ["a"],
    "logit_bias": {"1": 1}, "chat_template_kwargs": {"thinking": True}, "stream_options": {"include_usage": True},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, "max_tokens": 5,
    "reasoning_effort": "low", "logprobs": True, "top_logprobs": 1, "metadata": {}, "presence_penalty": 1, "seed": 1,
}  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value, as a container and a key."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def test_strange_values_anywhere_are_answered_or_refused(tooled: Service) -> None:
    draw, refused = random.Random(8), 0
    for _ in range(100):
        body = copy.deepcopy(BODY) | {"model": tooled.base}
        for _ in range(draw.randint(1, 2)):
            where, key = draw.choice(places(body))
            where[key] = copy.deepcopy(draw.choice(STRANGE))
        try:
            prepare(tooled, body)
        except ApiError as error:
            refused += 1
            assert error.status in (400, 404), (error.message, body)
            assert len(error.message) < 1000
    assert 50 < refused < 100


def test_strange_completions_are_answered_or_refused(tooled: Service) -> None:
    for value in [*STRANGE, [1, "a"], [[1], "a"], [[True]], [-1], [10**9], [1.5]]:
        for kept in ({"prompt": value}, {"prompt": "a", "logprobs": value}, {"prompt": [1], "model": value}):
            try:
                prepare(tooled, {"model": tooled.base} | kept, "completion")
            except ApiError as error:
                assert error.status in (400, 404), kept


def test_errors_name_files_and_not_where_they_are() -> None:
    for text, told in (
        ("/Users/Nora K/.mlx-lora/adapters/sql/a.safetensors: not readable", "a.safetensors: not readable"),
        ("no file at ~/Documents/secret plans/x.json", "no file at x.json"),
        ("needs 3/4 of it, or and/or/not; 1 / 2", "needs 3/4 of it, or and/or/not; 1 / 2"),
    ):
        assert api_error(AdapterError(text)).message == told


def test_a_message_without_text_is_checked_as_any_other(tooled: Service) -> None:
    for role in ("user", "tool", "system"):
        for content in ("", " ", None, []):
            message = {"role": role, "content": content}
            prepare(tooled, {"model": tooled.base, "messages": [message]})
            for calls in (5, "x", [3], {"a": 1}):
                with pytest.raises(ApiError, match="tool_calls"):
                    prepare(tooled, {"model": tooled.base, "messages": [message | {"tool_calls": calls}]})
