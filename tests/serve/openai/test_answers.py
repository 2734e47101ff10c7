"""Events become chunks and objects. The answers are given: no model has to say them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mlx_lora.errors import AdapterError, Busy, MlxLoraError, NotFinite, Stopped
from mlx_lora.serve.openai import ApiError, Asked, prepare
from mlx_lora.serve.requests import Failed, Finished, Reading
from mlx_lora.serve.service import Service
from tests.serve.openai.drive import HELLO, feed, joined, tool

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOOLS = [tool(a={"type": "integer"}), tool("sub", b={"type": "boolean"})]


def asked(service: Service, **fields: Any) -> Asked:
    return prepare(service, {"model": service.base, "messages": HELLO} | fields)


def test_a_joined_stream_is_the_whole_object(tooled: Service) -> None:
    parts = ["yes", " no", "<think>", "</think>", "\n", CALL, "<tool_call>", "{", "ä€", "</tool_call>", "stop", "  "]
    draw = random.Random(5)
    for round in range(120):
        text = "".join(draw.choices(parts, k=draw.randint(0, 8)))
        fields: dict[str, Any] = {"stop": ["stop", "o y"]} if round % 3 == 0 else {}
        fields |= {"tools": TOOLS, "parallel_tool_calls": round % 4 != 1} if round % 2 else {}
        fields |= {"logprobs": True, "top_logprobs": 1, "chat_template_kwargs": {"thinking": round % 5 == 0}}
        one = asked(tooled, **fields)
        chunks = feed(tooled, one, text)
        stream, whole = joined(chunks), one.whole()["choices"][0]
        message = {key: value for key, value in whole["message"].items() if value is not None}
        stream["message"].setdefault("content", "")
        if not stream["message"]["content"] and "tool_calls" in message:
            del stream["message"]["content"]
        calls = [{k: v for k, v in call.items() if k != "index"} for call in stream["message"].pop("tool_calls", [])]
        assert calls == message.pop("tool_calls", []) and stream["message"] == message, text
        assert stream["finish_reason"] == whole["finish_reason"]
        assert stream["logprobs"] == whole["logprobs"]["content"]


def test_calls_of_tools_are_parsed_and_end_the_answer(tooled: Service) -> None:
    one = asked(tooled, tools=TOOLS)
    chunks = feed(tooled, one, f"Let me see.\n{CALL}\n{CALL.replace('add', 'sub')}")
    message = one.whole()["choices"][0]["message"]
    assert message["content"] == "Let me see."
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "add", "arguments": '{"a": 1}'}, {"name": "sub", "arguments": '{"a": 1}'},
    ]  # fmt: skip
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta["tool_calls"][0]["index"] for delta in deltas if "tool_calls" in delta] == [0, 1]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_one_call_is_enough_where_parallel_calls_are_off(tooled: Service) -> None:
    one = asked(tooled, tools=TOOLS, parallel_tool_calls=False)
    feed(tooled, one, f"{CALL}\n{CALL} and more")
    message = one.whole()["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1 and message["content"] is None


def test_a_call_that_cant_be_read_is_text_and_not_lost(tooled: Service) -> None:
    one = asked(tooled, tools=TOOLS)
    feed(tooled, one, "<tool_call>add(1)</tool_call>")
    choice = one.whole()["choices"][0]
    assert choice["message"]["content"] == "<tool_call>add(1)</tool_call>" and choice["finish_reason"] == "stop"


def test_without_tools_or_with_tool_choice_none_a_mark_is_text(tooled: Service) -> None:
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        one = asked(tooled, **fields)
        feed(tooled, one, CALL)
        assert one.whole()["choices"][0]["message"]["content"] == CALL


def test_reasoning_has_fields_of_its_own_and_is_counted(tooled: Service) -> None:
    one = asked(tooled, chat_template_kwargs={"thinking": True}, logprobs=True)
    chunks = feed(tooled, one, "so\n</think>\n\nyes")
    message = one.whole()["choices"][0]["message"]
    assert (message["reasoning"], message["reasoning_content"], message["content"]) == ("so", "so", "yes")
    first = next(chunk["choices"][0]["delta"] for chunk in chunks if "reasoning" in chunk["choices"][0]["delta"])
    assert first["reasoning"] == first["reasoning_content"]
    usage = one.whole()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] in (2, 3)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3
    assert "".join(item["token"] for item in one.whole()["choices"][0]["logprobs"]["content"]) == "yes"


def test_logprobs_have_bytes_where_a_token_is_half_a_character(tooled: Service) -> None:
    one = asked(tooled, logprobs=True, top_logprobs=2)
    feed(tooled, one, "ä!")
    content = one.whole()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for item in content for byte in item["bytes"]).decode() == "ä!"
    assert [item["logprob"] for item in content] == [-0.5] * 3 and len(content[0]["top_logprobs"]) == 2


def test_a_stop_string_ends_the_answer_and_asks_for_its_cancellation(tooled: Service) -> None:
    one = asked(tooled, stop=["STOP"], stream_options={"include_usage": True})
    chunks = feed(tooled, one, "ab STOP cd")
    choice = one.whole()["choices"][0]
    assert choice["message"]["content"] == "ab " and choice["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 7
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


@pytest.mark.parametrize(("reason", "told"), [("stop", "stop"), ("length", "length"), ("cancelled", "length")])
def test_why_an_answer_ended(tooled: Service, reason: str, told: str) -> None:
    one = asked(tooled)
    feed(tooled, one, "x", reason=reason)
    assert one.whole()["choices"][0]["finish_reason"] == told


def test_the_first_chunk_names_the_role_and_comes_while_the_prompt_is_read(tooled: Service) -> None:
    one = asked(tooled)
    (first,) = one.event(0, Reading(1, 9))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert one.event(0, Reading(9, 9)) == []
    one.event(0, Finished("stop", 9, 0, 0))
    assert one.event(0, Finished("stop", 9, 0, 0)) == [] and one.done


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Busy("too many"), 429), (Stopped("ended"), 503), (NotFinite("NaN"), 500), (AdapterError("gone"), 404),
        (MlxLoraError("too long"), 400), (RuntimeError("/secret/path"), 500), (ApiError(418, "tea", "no"), 418),
    ],
)  # fmt: skip
def test_what_a_row_failed_with_has_a_status(tooled: Service, error: BaseException, status: int) -> None:
    with pytest.raises(ApiError) as caught:
        asked(tooled).event(0, Failed(error))
    assert caught.value.status == status and "secret" not in caught.value.message
