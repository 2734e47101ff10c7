"""Which grammar a chat's answer must keep to: of its `response_format`, its tools and its `tool_choice`."""

from __future__ import annotations

from typing import NamedTuple

from mlx_lora.models.tool_calls import ToolFormat
from mlx_lora.serve.openai.bodies import ChatBody, NamedTool
from mlx_lora.serve.openai.errors import ApiError, refused
from mlx_lora.serve.openai.grammar import Grammars, json_rule
from mlx_lora.serve.openai.tool_rules import call_rules

SCHEMA = "response_format"


class Rules(NamedTuple):
    """A grammar without its `start`: the alternatives, each a rule's name, and the rules. `param` asked for it.

    Where it is `triggered`, it holds from the first call of a tool on, and text may come before. An `optional` one
    isn't asked for: it makes calls better where it can be had.
    """

    alternatives: list[str]
    lines: list[str]
    param: str
    triggered: bool = False
    optional: bool = False

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
        calls = call_rules(tools, form.shape, grammars, several=body.parallel_tool_calls)
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
    return Rules(["calls"], calls, "tools", triggered=True, optional=not strict)


def _unknown(form: ToolFormat | None, param: str) -> ApiError:
    known = f"the format {form.name}" if form else "this model's tool calls"
    what = {"tool_choice": "tool_choice", SCHEMA: "response_format beside tools", "tools": "strict: true"}[param]
    return refused(param, f"{what} can't be enforced for {known}", "unsupported_value")
