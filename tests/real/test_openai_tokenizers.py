"""Real vocabularies and templates over random weights: grammars, calls of tools and reasoning as those models write."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.serve.openai import ApiError, prepare
from mlx_lora.serve.service import Service, open_service
from tests.conftest import write_model
from tests.real.test_real_templates import NAMES, real_tokenizers  # noqa: F401
from tests.serve.openai.drive import HELLO, feed, run, tool
from tests.serve.openai.schemas import random_schema, satisfies

pytestmark = pytest.mark.real
TOOLS = [tool(a={"type": "integer", "minimum": 0, "maximum": 99}), tool("sub", b={"type": "boolean"})]


@contextmanager
def serving(tokenizer: Any, path: Path) -> Iterator[Service]:
    """A tiny model with random weights and a real vocabulary."""
    end = tokenizer.eos_token_id
    write_model(path, vocab_size=len(tokenizer) + 64, hidden_size=32, eos_token_id=end, max_position_embeddings=4096)
    (path / "chat_template.jinja").unlink()
    for file in Path(tokenizer.name_or_path).glob("*.json"):
        if file.name != "config.json":
            shutil.copy(file, path / file.name)
    with open_service(str(path)) as service:
        yield service


@pytest.mark.parametrize("name", NAMES)
def test_grammars_hold_on_real_vocabularies(real_tokenizers: dict[str, Any], tmp_path: Path, name: str) -> None:  # noqa: F811
    with serving(real_tokenizers[name], tmp_path / name) as service:
        draw = random.Random(3)
        for seed in range(4):
            schema = random_schema(draw, 2)
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            body = {"seed": seed, "response_format": form, "logprobs": True, "enable_thinking": False}
            choice = run(service, body | {"max_tokens": 900})[1]["choices"][0]
            text = choice["message"]["content"]
            assert choice["finish_reason"] == "stop" and satisfies(json.loads(text), schema)
            said = bytes(byte for token in choice["logprobs"]["content"] for byte in token["bytes"]).decode()
            assert said.lstrip() == text.lstrip()


def test_qwen_calls_tools_and_reasons(real_tokenizers: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    with serving(real_tokenizers["qwen3"], tmp_path / "qwen3") as service:
        body = {"model": service.base, "messages": HELLO, "tools": TOOLS}
        asked = prepare(service, body)
        feed(service, asked, f"<think>\nso\n</think>\n\nWell.\n{call}\n{call}")
        message = asked.whole()["choices"][0]["message"]
        assert (message["reasoning"], message["content"], len(message["tool_calls"])) == ("so", "Well.", 2)
        forced = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": 1}
        _, whole = run(service, forced | {"chat_template_kwargs": {"enable_thinking": False}})
        assert whole["choices"][0]["finish_reason"] == "tool_calls"
        marks = [(service.tokenizer.convert_tokens_to_ids(mark),) for mark in ("<think>", "</think>", "<tool_call>")]
        (constrained,) = asked.requests[0].processors
        assert not constrained._gate.opened and [*constrained._gate.think, constrained._gate.trigger] == marks
        (closed,) = (
            prepare(service, body | {"reasoning_effort": "none", "tool_choice": "required"}).requests[0].processors
        )
        assert closed._gate.think[0] == () and not closed._gate.opened


def test_deepseek_calls_tools_although_its_template_shows_none(
    real_tokenizers: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    with serving(real_tokenizers["deepseek_v3"], tmp_path / "deepseek") as service:
        with pytest.raises(ApiError, match="doesn't show it the tool 'add'"):
            prepare(service, {"model": service.base, "messages": HELLO, "tools": TOOLS})
        messages = [{"role": "system", "content": f"Tools: {json.dumps(TOOLS)}"}, *HELLO]
        body = {"model": service.base, "messages": messages, "tools": TOOLS, "tool_choice": "required", "seed": 2}
        _, whole = run(service, body | {"max_tokens": 900})
        calls = whole["choices"][0]["message"]["tool_calls"]
        assert {call["function"]["name"] for call in calls} <= {"add", "sub"}
