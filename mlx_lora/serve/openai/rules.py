"""Which grammar a chat's answer must keep to: of its `response_format`, its tools and its `tool_choice`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mlx_lora.models.tool_calls import ARGUMENTS, NAME, NUMBER, Shape, ToolFormat
from mlx_lora.serve.openai.bodies import ChatBody, Function, NamedTool
from mlx_lora.serve.openai.errors import ApiError, refused
from mlx_lora.serve.openai.grammar import Grammars, json_rule

# Calls of one answer that a grammar allows.
MOST_CALLS = 16
SCHEMA = "response_format"


class Rules(NamedTuple):
    """A grammar without its `start`: the alternatives, each a rule's name, and the rules. `param` asked for it.

    Where it is `triggered`, it holds from the first call of a tool on, and text may come before.
    """

    alternatives: list[str]
    lines: list[str]
    param: str
    triggered: bool = False

    def text(self, *, after_reasoning: bool) -> str:
        """The grammar; after reasoning, models go on behind an empty line."""
        either = " | ".join(self.alternatives)
        head = [f"start: {either}"]
        if after_reasoning:
            head = ["start: body | BREAK body", f"body: {either}", "BREAK: /[ \\n]{1,3}/"]
        return "\n".join([*head, *self.lines]) + "\n"


def rules(body: ChatBody, form: ToolFormat | None, grammars: Grammars) -> Rules | None:
    """The grammar of an answer, None where any text will do. Raises ApiError for what can't be enforced."""
    schema, choice = body.response_format.schema_to_keep, body.tool_choice
    answer = [] if schema is None else [f"answer: {json_rule(schema, SCHEMA)}"]
    tools = [tool.function for tool in body.tools]
    if choice == "none" or not tools:
        return Rules(["answer"], answer, SCHEMA) if answer else None
    forced = choice == "required" or isinstance(choice, NamedTool)
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.name == choice.function.name]
    strict = any(tool.strict for tool in tools)
    if form is None or form.shape is None:
        if forced or answer or strict:
            raise _unknown(form, "tool_choice" if forced else SCHEMA if answer else "tools")
        return None
    try:
        calls = _calls(tools, form.shape, grammars, several=body.parallel_tool_calls)
    except ApiError as error:
        if forced or answer or strict or error.status != 501:
            raise
        return None
    if forced:
        return Rules(["calls"], calls, "tool_choice")
    if answer:
        return Rules(["calls", "answer"], [*calls, *answer], SCHEMA)
    if not form.start:
        if strict:
            raise _unknown(form, "tools")
        return None
    return Rules(["calls"], calls, "tools", triggered=True)


def _unknown(form: ToolFormat | None, param: str) -> ApiError:
    known = f"the format {form.name}" if form else "this model's tool calls"
    what = {"tool_choice": "tool_choice", SCHEMA: "response_format beside tools", "tools": "strict: true"}[param]
    return refused(param, f"{what} can't be enforced for {known}", "unsupported_value")


def _calls(tools: Sequence[Function], shape: Shape, grammars: Grammars, *, several: bool) -> list[str]:
    """The rules of `calls`: one or several, each of one of the tools."""
    literal = grammars.literal
    more = (
        f" ({literal(shape.between)} call){{0,{MOST_CALLS - 1}}}" if shape.between else f" call{{0,{MOST_CALLS - 1}}}"
    )
    parts = [literal(shape.before), f"call{more if several and shape.many else ''}", literal(shape.after)]
    lines = [f"calls: {' '.join(part for part in parts if part)}"]
    lines.append(f"call: {' | '.join(f'call{index}' for index in range(len(tools)))}")
    for index, tool in enumerate(tools):
        before, _, after = shape.call.replace(NAME, tool.name).partition(ARGUMENTS)
        start, number, middle = before.partition(NUMBER)
        numbered = [literal(start), *(["/[0-9]{1,2}/", literal(middle)] if number else [])]
        lines.append(f"call{index}: {' '.join(part for part in numbered if part)} args{index} {literal(after)}")
        lines.append(f"args{index}: {_arguments(tool, grammars)}")
    return lines


def _arguments(tool: Function, grammars: Grammars) -> str:
    """The arguments of a tool; any object where it isn't strict and its schema can't be enforced."""
    schema = {"type": "object", **tool.parameters}
    param = f"tools.{tool.name}.parameters"
    try:
        rule = json_rule(schema, param)
        grammars.compiled(f"start: {rule}\n", param)
        return rule
    except ApiError as error:
        if tool.strict or error.status == 501:
            raise
        return json_rule({"type": "object"}, param)
