"""The official client against `mlx-lora serve`: everything it asks for is answered as OpenAI answers, or refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.real.conftest import ROOT, Shell
from tests.serve.openai.schemas import random_schema, satisfies

pytestmark = pytest.mark.real
openai = pytest.importorskip("openai")

TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nYou call functions.\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    'Answer with <tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call><|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for tool_call in m.tool_calls or [] %}{% set tool_call = tool_call.function %}<tool_call>\n"
    '{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20}, "unit": {"type": "string", "enum": ["celsius", "kelvin"]},
            },
            "required": ["city", "unit"], "additionalProperties": False,
        },
    },
}  # fmt: skip
CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


@contextmanager
def server(shell: Shell, model: Path) -> Iterator[Any]:
    """A client of a server on `model`."""
    command = [sys.executable, "-m", "mlx_lora", "serve", "--model", str(model), "--port", "0", "--json"]
    environment = os.environ | {"MLX_LORA_HOME": str(shell.home)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout
            said = json.loads(process.stdout.readline())
            with openai.OpenAI(base_url=said["url"], api_key="none", max_retries=0, timeout=110) as client:
                yield client
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def client(shell: Shell, smollm2: Path) -> Iterator[Any]:
    """A client of a server on SmolLM2 with a template that shows tools, as larger models have one."""
    path = smollm2.with_name("smollm2-tools")
    shutil.copytree(smollm2, path, copy_function=os.link)
    (path / "chat_template.jinja").unlink(missing_ok=True)
    (path / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    with server(shell, path) as client:
        yield client


MODEL = "smollm2-tools"


def test_models_are_listed(client: Any) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_chat_and_its_stream_say_the_same(client: Any) -> None:
    asked = {"model": MODEL, "messages": CAPITAL, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**asked)
    assert "Paris" in whole.choices[0].message.content and whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens <= 20 and whole.system_fingerprint
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0


def test_completions_continue_a_text(client: Any) -> None:
    asked = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 5}
    whole = client.completions.create(**asked, logprobs=2)
    assert "Paris" in whole.choices[0].text and len(whole.choices[0].logprobs.tokens) == 5
    streamed = client.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


def test_tools_are_called_streamed_and_not(client: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Berlin?"}]
    asked = {
        "model": MODEL, "messages": messages, "tools": [WEATHER], "temperature": 0, "parallel_tool_calls": False,
        "max_tokens": 120,
    }  # fmt: skip
    message = client.chat.completions.create(**asked, tool_choice="required").choices[0].message
    (call,) = message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather" and arguments["unit"] in ("celsius", "kelvin")
    named = {"type": "function", "function": {"name": "get_weather"}}
    with client.chat.completions.stream(**asked, tool_choice=named) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls[0].function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
    asked["messages"] = [*messages, message.model_dump(exclude_none=True), result]
    after = client.chat.completions.create(**asked | {"tool_choice": "none", "max_tokens": 8})
    assert after.choices[0].message.tool_calls is None


def test_stop_ends_an_answer(client: Any) -> None:
    asked = {"model": MODEL, "messages": CAPITAL, "temperature": 0, "max_tokens": 20, "stop": ["ris"]}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.message.content.endswith("Pa") and choice.finish_reason == "stop"


def test_logprobs_are_those_of_the_text(client: Any) -> None:
    asked = {"model": MODEL, "messages": CAPITAL, "temperature": 0, "max_tokens": 8, "logprobs": True}
    choice = client.chat.completions.create(**asked, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    assert bytes(byte for token in content for byte in token.bytes).decode() == choice.message.content
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy


def test_choices_and_seeds(client: Any) -> None:
    asked = {"model": MODEL, "messages": CAPITAL, "temperature": 1.5, "max_tokens": 12, "n": 4, "seed": 3}
    first, again = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) > 1


def schemas_satisfied(client: Any, model: str, count: int) -> None:
    """Ask for JSON of random schemas, many at a time. An answer that is cut off fails too: its schema is bounded."""
    draw = random.Random(2026)
    schemas = [random_schema(draw, 2) for _ in range(count)]

    def answer(index: int) -> tuple[str, str]:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schemas[index], "strict": True}}
        choice = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Write some JSON."}], response_format=form,
            max_tokens=900, seed=index,
        ).choices[0]  # fmt: skip
        return choice.finish_reason, choice.message.content

    with ThreadPoolExecutor(24) as threads:
        for index, (reason, text) in enumerate(threads.map(answer, range(count))):
            assert reason == "stop", (schemas[index], text)
            assert satisfies(json.loads(text), schemas[index]), (schemas[index], text)


def test_schemas_are_satisfied(client: Any) -> None:
    schemas_satisfied(client, MODEL, 20)


def test_two_hundred_schemas_are_all_satisfied_by_the_embedded_base(shell: Shell) -> None:
    with server(shell, ROOT / "data" / "base") as client:
        schemas_satisfied(client, "base", 200)


def test_pydantic_models_come_back_parsed(client: Any) -> None:
    from typing import Literal

    from pydantic import BaseModel, Field

    class City(BaseModel):
        name: str = Field(max_length=20)
        size: Literal["small", "large"]

    found = client.chat.completions.parse(model=MODEL, messages=CAPITAL, response_format=City, max_tokens=120)
    assert isinstance(found.choices[0].message.parsed, City)


def test_errors_are_those_that_the_client_knows(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=CAPITAL)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        schema = {"type": "array", "uniqueItems": True}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        client.chat.completions.create(model=MODEL, messages=CAPITAL, response_format=form)


def test_too_many_requests_are_told_to_come_again(client: Any) -> None:
    """Sixteen choices each: more rows than may be answered and wait."""
    busy = []

    def ask(index: int) -> None:
        try:
            client.chat.completions.create(model=MODEL, messages=CAPITAL, n=16, seed=index, timeout=2)
        except openai.APITimeoutError:  # it waits, and leaves with its rows
            pass
        except openai.RateLimitError as error:
            busy.append(float(error.response.headers["retry-after"]))

    with ThreadPoolExecutor(30) as threads:
        list(threads.map(ask, range(30)))
    assert busy and min(busy) > 0
    patient = client.with_options(max_retries=20)  # rows that have left go when the pass that they are in ends
    after = patient.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, max_tokens=10)
    assert "Paris" in after.choices[0].message.content
