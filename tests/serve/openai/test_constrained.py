"""Grammars: what is enforced, what is refused, and that a row may begin again anywhere."""

from __future__ import annotations

import json
import time
from typing import Any

import mlx.core as mx
import pytest

from mlx_lora.errors import MlxLoraError
from mlx_lora.serve.openai import ApiError
from mlx_lora.serve.openai.constrained import Constrained, Gate, find
from mlx_lora.serve.openai.grammar import KEPT, Grammars, json_rule
from mlx_lora.serve.service import Service

SCHEMA = {
    "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"], "additionalProperties": False,
}  # fmt: skip
VOCABULARY = 300  # the model's is larger than the tokenizer's
END = 256


def processor(service: Service, prompt: int = 2, **gate: Any) -> Constrained:
    grammars = Grammars.of(service.tokenizer)
    matcher = grammars.compiled(f"start: {json_rule(SCHEMA, 'x')}\n", "x")
    return Constrained(matcher, prompt, Gate(**gate), {END})


def tokens(service: Service, text: str) -> list[int]:
    return list(service.tokenizer.encode(text, add_special_tokens=False))


def allowed(one: Constrained, row: list[int]) -> list[int]:
    """The tokens that may follow a row."""
    found = one(mx.array(row, mx.int32), mx.zeros((1, VOCABULARY)))
    assert found.shape == (1, VOCABULARY)
    return [index for index, value in enumerate(found[0].tolist()) if value == 0]  # type: ignore[arg-type,union-attr]


def test_only_what_the_schema_allows_may_follow(tooled: Service) -> None:
    one, prompt = processor(tooled), [1, 2]
    assert allowed(one, prompt) == tokens(tooled, "{")
    row = prompt + tokens(tooled, '{"a":')
    assert set(allowed(one, row)) == set(tokens(tooled, " \n0123456789"))
    row += tokens(tooled, '12,"b":"x"}')
    assert allowed(one, row) == [END]
    assert len(allowed(one, [*row, END])) == VOCABULARY  # the row has ended; its last pass isn't looked at
    assert len(allowed(one, [*row, END, *tokens(tooled, "and")])) == VOCABULARY  # nor what a draft goes on with


def test_the_mask_follows_from_the_tokens_alone(tooled: Service) -> None:
    one, other = processor(tooled), processor(tooled)
    rows = ['{"a":1', '{"a":12', "{", '{"a":9,"b', '{"a":9,"b":"y', '{"a":4', ""]
    for text in rows:
        row = [1, 2, *tokens(tooled, text)]
        assert allowed(one, row) == allowed(other.copy(), row), text
    virtual = [-1, -2, -3, 1, 2, *tokens(tooled, '{"a":1')]
    assert allowed(processor(tooled), virtual) == allowed(one, [1, 2, *tokens(tooled, '{"a":1')])


def test_a_grammar_begins_after_reasoning(tooled: Service) -> None:
    think = tuple(map(tuple, (tokens(tooled, "<think>"), tokens(tooled, "</think>"))))
    opened = processor(tooled, opened=True, think=think)
    row = [1, 2, *tokens(tooled, "so {")]
    assert len(allowed(opened, row)) == VOCABULARY
    assert allowed(opened, row + tokens(tooled, "</think>")) == tokens(tooled, "{")
    may = processor(tooled, think=think)
    assert set(allowed(may, [1, 2])) == {*tokens(tooled, "{"), think[0][0]}
    assert len(allowed(may, [1, 2, *think[0]])) == VOCABULARY
    assert allowed(may, [1, 2, *think[0], *think[1]]) == tokens(tooled, "{")


def test_a_grammar_that_is_triggered_lets_text_come_before(tooled: Service) -> None:
    one = processor(tooled, trigger=tuple(tokens(tooled, '{"a"')))
    assert len(allowed(one, [1, 2, *tokens(tooled, 'text {"b"')])) == VOCABULARY
    assert len(allowed(one, [1, 2, *tokens(tooled, 'text {"a"')])) == 3  # a colon, or white space before it


def test_tokens_that_the_grammar_forbids_are_an_error_of_the_row(tooled: Service) -> None:
    with pytest.raises(MlxLoraError, match="the grammar can't go on"):
        allowed(processor(tooled), [1, 2, *tokens(tooled, "[")])


def test_tokens_are_found_in_their_order() -> None:
    assert find([1, 2, 1, 3], (1, 3), 0) == 2 and find([1, 2], (1,), 1) is None
    assert find([1, 2, 3], (3, 4), 0) is None and find([], (1,), 0) is None


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def _product() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(9):
        schema = {"allOf": [schema, {"anyOf": [schema, {"type": "string"}]}]}
    return schema


BOMBS: dict[str, Any] = {
    "bytes": {"enum": ["x" * (1 << 16)]},
    "depth": _nested(40),
    "values": {"enum": list(range(9000))},
    "product": _product(),
    "remainders": {"type": "integer", "multipleOf": 999_983},
    "tiny remainders": {"type": "number", "multipleOf": 1e-9},
    "not enforced": {"type": "array", "uniqueItems": True},
    "not": {"not": {"type": "integer"}},
    "conditions": {"if": {"type": "integer"}, "then": {"minimum": 3}},
    "elsewhere": {"$ref": "https://example.com/schema"},
    "impossible": {"type": "integer", "minimum": 5, "maximum": 3},
    "endless": {"$ref": "#"},
    "look-ahead": {"type": "string", "pattern": "^(?=a)a"},
    "unknown format": {"type": "string", "format": "hieroglyph"},
    "lenient": {"type": "object", "properties": {"a": {"x-guidance": {"lenient": True}}}},
    "false": False,
}


@pytest.mark.parametrize("name", BOMBS)
def test_schemas_that_cant_be_enforced_are_refused_within_a_second(tooled: Service, name: str) -> None:
    Grammars.of(tooled.tokenizer).prepare()
    start = time.monotonic()
    with pytest.raises(ApiError) as caught:
        Grammars.of(tooled.tokenizer).compiled(
            f"start: {json_rule(BOMBS[name], 'response_format')}\n", "response_format"
        )
    assert caught.value.status == 400 and caught.value.param == "response_format"
    assert time.monotonic() - start < 1 and len(caught.value.message) < 600


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(((a|b|c){1,100}){1,100}){1,100}"}, {"type": "string", "maxLength": 10**9},
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**6}, {"type": "object", "minProperties": 1000},
        {"type": "object", "properties": {f"k{index}": {"type": "integer"} for index in range(1500)}},
        {"type": "string", "pattern": "^(.*a.{40}|.*b.{40}|.*c.{50})*$"}, {"type": "integer", "multipleOf": 1000},
    ],
    ids=lambda schema: json.dumps(schema)[:40],
)  # fmt: skip
def test_large_schemas_that_can_be_enforced_cost_little_for_each_token(tooled: Service, schema: Any) -> None:
    matcher = Grammars.of(tooled.tokenizer).compiled(f"start: {json_rule(schema, 'x')}\n", "x")
    one, row = Constrained(matcher, 1, Gate(), {END}), [1]
    start = time.monotonic()
    for step in range(60):
        try:
            found = allowed(one, row)
        except MlxLoraError:  # llguidance gave up within its own limits: the row ends, and no other
            break
        row.append(found[(7 * step) % len(found)])
        if row[-1] == END:
            break
    assert time.monotonic() - start < 2


def test_a_vocabulary_is_prepared_once_and_grammars_are_kept(tooled: Service) -> None:
    grammars = Grammars.of(tooled.tokenizer)
    assert grammars is Grammars.of(tooled.tokenizer) and grammars.vocabulary is grammars.vocabulary
    for index in range(40):
        grammars.compiled(f'start: "only here {index % 35}"\n', "x")
    assert len(grammars._compiled) == KEPT and 'start: "only here 4"\n' in grammars._compiled


def test_without_llguidance_there_is_a_hint(tooled: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ApiError, match="mlx-lora\\[serve\\]") as caught:
        Grammars(tooled.tokenizer).prepare()
    assert caught.value.status == 501
