"""The part of a grammar that says how tools are called: the shape of a model's calls, with the schemas of the tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mlx_lora.models.tool_calls import ARGUMENTS, KEY, NAME, NUMBER, VALUE, Shape
from mlx_lora.serve.openai.bodies import Function
from mlx_lora.serve.openai.errors import ApiError, refused
from mlx_lora.serve.openai.grammar import Grammars, json_rule

# Calls of one answer that a grammar allows.
MOST_CALLS = 16
# Bytes of the schemas of all tools together.
MOST_TOOL_BYTES = 1 << 18
# What JSON values of these types are read from.
AS_JSON = ("integer", "number", "boolean", "null", "object", "array")
# Keywords of a text that only annotate it.
TEXT_KEYS = {"type", "description", "title", "default", "examples", "enum"}


def call_rules(tools: Sequence[Function], shape: Shape, grammars: Grammars, *, several: bool) -> list[str]:
    """The rules of `calls`: one or several, each of one of the tools. Raises ApiError for what can't be enforced."""
    if sum(len(json.dumps(tool.parameters)) for tool in tools) > MOST_TOOL_BYTES:
        raise refused("tools", f"the schemas of all tools have more than {MOST_TOOL_BYTES:,} bytes")
    literal = grammars.literal
    more = f"{{0,{MOST_CALLS - 1}}}" if several and shape.many else "{0}"
    repeated = f" ({literal(shape.between)} call){more}" if shape.between else f" call{more}"
    parts = [literal(shape.before), f"call{'' if more == '{0}' else repeated}", literal(shape.after)]
    lines = [f"calls: {_row(parts)}", f"call: {' | '.join(f'call{index}' for index in range(len(tools)))}"]
    for index, tool in enumerate(tools):
        before, _, after = shape.call.replace(NAME, tool.name).partition(ARGUMENTS)
        start, number, middle = before.partition(NUMBER)
        arguments, rules = (
            _fields(tool, shape, grammars, f"args{index}") if shape.field else _object(tool, grammars, f"args{index}")
        )
        head = [literal(start), "/[0-9]{1,2}/" if number else "", literal(middle)]
        lines += [f"call{index}: {_row([*head, arguments, literal(after)])}", *rules]
    return lines


def _row(parts: Sequence[str]) -> str:
    return " ".join(part for part in parts if part)


def _param(tool: Function) -> str:
    return f"tools.{tool.name}.parameters"


def _object(tool: Function, grammars: Grammars, name: str) -> tuple[str, list[str]]:
    """Arguments as one JSON object; any object where the tool isn't strict and its schema can't be enforced."""
    try:
        rule = json_rule({"type": "object", **tool.parameters}, _param(tool))
        grammars.check(rule, _param(tool))
    except ApiError as error:
        if tool.strict or error.status == 501:
            raise
        rule = json_rule({"type": "object"}, _param(tool))
    return name, [f"{name}: {rule}"]


def _fields(tool: Function, shape: Shape, grammars: Grammars, name: str) -> tuple[str, list[str]]:
    """Arguments one after another, in the order of the schema; those that aren't required may be left out."""
    properties, required = tool.parameters.get("properties") or {}, tool.parameters.get("required") or []
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise refused(_param(tool), "properties must be an object, and required a list")
    row, lines = [], []
    for index, (key, schema) in enumerate(properties.items()):
        before, _, after = shape.field.replace(KEY, key).partition(VALUE)
        field = f"{name}_{index}"
        row.append(field if key in required else f"{field}?")
        value, lasts, rules = _value(tool, schema, grammars, f"{field}_value", after)
        lines += [
            f"{field}: {_row([grammars.literal(before), value, '' if lasts else grammars.literal(after)])}",
            *rules,
        ]
    return _row(row), lines


def _value(tool: Function, schema: Any, grammars: Grammars, name: str, after: str) -> tuple[str, bool, list[str]]:
    """The rule of an argument's value, whether it holds what comes `after`, and its lines."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind in AS_JSON:
        shared: dict[str, Any] = {
            key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters
        }
        try:
            rule = json_rule({**shared, **schema}, _param(tool))
            grammars.check(rule, _param(tool))
        except ApiError as error:
            if tool.strict or error.status == 501:
                raise
            rule = json_rule({"type": kind}, _param(tool))
        return name, False, [f"{name}: {rule}"]
    choices = schema.get("enum") if kind == "string" else None
    if isinstance(choices, list) and choices and all(isinstance(one, str) and one for one in choices):
        return name, False, [f"{name}: {' | '.join(grammars.literal(one) for one in choices)}"]
    if tool.strict and (kind != "string" or set(schema) - TEXT_KEYS):
        raise refused(_param(tool), "this model writes arguments as text, whose schema can't be enforced with strict")
    return name, True, [f"{name}[suffix={_quoted(after)}]: /(?s:.*)/"]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
