"""What a grammar of calls allows, the reader of that format reads: for every format that has a grammar."""

from __future__ import annotations

import json
import random
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_lora.models.tool_calls import SHAPES, ToolFormat, tool_format
from mlx_lora.serve.openai import ApiError
from mlx_lora.serve.openai.bodies import Function
from mlx_lora.serve.openai.grammar import Grammars
from mlx_lora.serve.openai.split import Splitter
from mlx_lora.serve.openai.tool_rules import call_rules
from mlx_lora.serve.service import Service
from tests.serve.openai.drive import tool

# Words of a chat template by which a format is known.
TEMPLATES = {
    "json_tools": "<tool_call> tool_call.name", "qwen3_coder": "<tool_call>\n<function=",
    "kimi_k2": "<|tool_calls_section_begin|>", "mistral": "[TOOL_CALLS][ARGS]", "mistral list": "[TOOL_CALLS]",
    "llama": 'tools {"name": x, "parameters": y}', "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁sep｜>",
}  # fmt: skip
TOOLS = [
    tool("add", a={"type": "integer", "minimum": 0, "maximum": 99}, unit={"type": "string", "enum": ["km", "mi"]}),
    tool("sub-2", b={"type": "boolean"}),
    tool("none"),
]
FUNCTIONS = [Function.model_validate(one["function"]) for one in TOOLS]


def found(name: str) -> ToolFormat:
    form = tool_format(SimpleNamespace(get_vocab=dict), TEMPLATES[name])
    assert form is not None and form.shape is SHAPES[name]
    return form


def said(form: ToolFormat, text: str) -> list[tuple[str, Any]]:
    splitter = Splitter(None, (form.start, form.end))
    parts = [*splitter.push(text), *splitter.finish()]
    assert not [part for part in parts if part.kind == "content"], text
    calls = [call for part in parts if part.kind == "call" for call in form.read(part.text, TOOLS)]
    return [(call.name, json.loads(call.arguments)) for call in calls]


def matcher(service: Service, form: ToolFormat, functions: list[Function], *, several: bool = True) -> Any:
    grammars = Grammars.of(service.tokenizer)
    assert form.shape
    lines = call_rules(functions, form.shape, grammars, several=several)
    return grammars.compiled("\n".join(["start: calls", *lines, ""]), "tools")


@pytest.mark.parametrize("name", SHAPES)
def test_what_the_grammar_allows_the_reader_reads(tooled: Service, name: str) -> None:
    form, draw = found(name), random.Random(name)
    for _ in range(12):
        one, tokens = matcher(tooled, form, FUNCTIONS), list[int]()
        while not one.is_stopped() and len(tokens) < 1500 and not (one.is_accepting() and draw.random() < 0.5):
            bits = np.unpackbits(np.frombuffer(one.compute_bitmask(), np.uint8), bitorder="little")
            tokens.append(draw.choice([int(token) for token in np.nonzero(bits)[0] if token != 256]))
            assert one.consume_token(tokens[-1])
        calls = said(form, tooled.tokenizer.decode(tokens))
        assert calls
        for called, arguments in calls:
            expected = {"add": {"a", "unit"}, "sub-2": {"b"}, "none": set()}[called]
            assert set(arguments) == expected
            assert called != "add" or (0 <= arguments["a"] <= 99 and arguments["unit"] in ("km", "mi"))
            assert called != "sub-2" or isinstance(arguments["b"], bool)


@pytest.mark.parametrize("name", SHAPES)
def test_several_calls_only_where_they_may_come(tooled: Service, name: str) -> None:
    form = found(name)
    assert form.shape
    call = form.shape.call.replace("$NAME", "none").replace("$NUMBER", "0")
    call = call.replace("$ARGUMENTS", "" if form.shape.field else "{}")
    two = f"{form.shape.before}{call}{form.shape.between}{call}{form.shape.after}"
    tokens = tooled.tokenizer.encode(two, add_special_tokens=False)
    taken = matcher(tooled, form, FUNCTIONS).try_consume_tokens(tokens)
    assert (taken == len(tokens)) == form.shape.many
    assert matcher(tooled, form, FUNCTIONS, several=False).try_consume_tokens(tokens) < len(tokens)


def test_texts_are_written_as_they_are_where_the_format_has_fields(tooled: Service) -> None:
    form = found("qwen3_coder")
    properties = {"text": {"type": "string"}, "more": {"type": "array", "items": {"$ref": "#/$defs/n"}}}
    parameters = {"properties": properties, "required": ["text"], "$defs": {"n": {"type": "integer"}}}
    functions = [Function(name="say", parameters=parameters)]
    text = '<tool_call>\n<function=say>\n<parameter=text>\nA "b"\n</p> {\n</parameter>\n'
    end = "</function>\n</tool_call>"
    for more in ("", "<parameter=more>\n[1, 2]\n</parameter>\n"):
        one = matcher(tooled, form, functions)
        assert one.consume_tokens(tooled.tokenizer.encode(text + more + end, add_special_tokens=False)), more
        assert one.is_accepting()
    wrong = text + '<parameter=more>\n["1"'
    tokens = tooled.tokenizer.encode(wrong, add_special_tokens=False)
    assert matcher(tooled, form, functions).try_consume_tokens(tokens) < len(tokens)
    strict = Function(name="say", strict=True, parameters={"properties": {"text": {"type": "string", "maxLength": 3}}})
    with pytest.raises(ApiError, match="can't be enforced with strict"):
        matcher(tooled, form, [strict])


def test_many_tools_are_checked_once_and_bounded(tooled: Service) -> None:
    form, grammars = found("json_tools"), Grammars.of(tooled.tokenizer)
    assert form.shape
    many = [Function(name=f"f{index}", parameters={"properties": {f"p{index}": {}}}) for index in range(128)]
    call_rules(many, form.shape, grammars, several=True)
    start = time.monotonic()
    call_rules(many, form.shape, grammars, several=True)
    assert time.monotonic() - start < 0.5
    large = [Function(name=f"f{index}", parameters={"description": "x" * 60_000}) for index in range(5)]
    with pytest.raises(ApiError, match="all tools"):
        call_rules(large, form.shape, grammars, several=True)


def test_a_format_is_known_by_the_template_alone() -> None:
    assert tool_format(SimpleNamespace(get_vocab=dict), "{{ messages }}") is None
    glm = tool_format(SimpleNamespace(get_vocab=dict), "<tool_call><arg_key>")
    assert glm is not None and glm.name == "glm47" and glm.shape is None


def test_what_isnt_a_call_is_a_value_error() -> None:
    for name in SHAPES:
        with pytest.raises(ValueError, match="not a call"):
            found(name).read("hello", TOOLS)
