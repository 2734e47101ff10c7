"""How a model writes its calls of tools: what opens and closes them, how they are read, and how they could be written.

mlx_lm has a reader for most formats and finds it by the chat template. Two formats that it lacks are here: the JSON
that Llama 3 answers with, and DeepSeek V3's.

A `Shape` is a format whose arguments are JSON, written down so that a grammar can be made of it.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from mlx_lora.machine import allocation

with allocation.file_limits_kept():
    from mlx_lm import tokenizer_utils

NAME, ARGUMENTS, NUMBER = "$NAME", "$ARGUMENTS", "$NUMBER"


@dataclass(frozen=True)
class Shape:
    """One answer's calls: `before`, then calls with `between` between them, then `after`.

    `call` has NAME, ARGUMENTS (a JSON object) and perhaps NUMBER where they belong. Not `many`: one call an answer.
    """

    call: str
    before: str = ""
    between: str = "\n"
    after: str = ""
    many: bool = True


@dataclass(frozen=True)
class Call:
    """A call that a model has made; `arguments` is JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written. An empty `start`: the answer as a whole is a call; an empty `end`: up to its end.

    `read(text, tools)` gives what one pair of `start` and `end` holds. `shape` is None where no grammar is known.
    """

    name: str
    start: str
    end: str
    reader: Callable[[str, Sequence[Any]], Any]
    shape: Shape | None = None

    def read(self, text: str, tools: Sequence[Any]) -> list[Call]:
        """The calls in `text`. Raises ValueError where it holds none."""
        try:
            found = self.reader(text, list(tools))
            return [_call(one) for one in (found if isinstance(found, list) else [found])]
        except Exception as error:  # readers raise whatever their parsing does
            raise ValueError(f"not a call of a tool: {error}") from None


def _call(found: Any) -> Call:
    arguments = found.get("arguments", {})
    if not isinstance(found["name"], str) or not isinstance(arguments, str | dict):
        raise ValueError("a call needs a name and arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Call(found["name"], text)


def _read_llama(text: str, tools: Sequence[Any]) -> dict[str, Any]:
    found = json.loads(text)
    return {"name": found["name"], "arguments": found.get("parameters", found.get("arguments", {}))}


_DEEPSEEK_CALL = re.compile(r"<｜tool▁sep｜>\s*([^\n]+?)\s*\n```json\n(.*?)\n```", re.DOTALL)


def _read_deepseek(text: str, tools: Sequence[Any]) -> list[dict[str, Any]]:
    found = [{"name": name, "arguments": json.loads(arguments)} for name, arguments in _DEEPSEEK_CALL.findall(text)]
    if not found:
        raise ValueError("no call in it")
    return found


SHAPES = {
    "json_tools": Shape(f'<tool_call>\n{{"name": "{NAME}", "arguments": {ARGUMENTS}}}\n</tool_call>'),
    "kimi_k2": Shape(
        f"<|tool_call_begin|>functions.{NAME}:{NUMBER}<|tool_call_argument_begin|>{ARGUMENTS}<|tool_call_end|>",
        "<|tool_calls_section_begin|>", "", "<|tool_calls_section_end|>",
    ),
    "mistral": Shape(f"[TOOL_CALLS]{NAME}[ARGS]{ARGUMENTS}", between=""),
    "mistral list": Shape(f'{{"name": "{NAME}", "arguments": {ARGUMENTS}}}', "[TOOL_CALLS][", ", ", "]"),
    "llama": Shape(f'{{"name": "{NAME}", "parameters": {ARGUMENTS}}}', many=False),
    "deepseek_v3": Shape(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{NAME}\n```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜>", "\n", "<｜tool▁calls▁end｜>",
    ),
}  # fmt: skip
OWN = {
    "llama": ToolFormat("llama", "", "", _read_llama, SHAPES["llama"]),
    "deepseek_v3": ToolFormat(
        "deepseek_v3", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _read_deepseek, SHAPES["deepseek_v3"]
    ),
}


def tool_format(tokenizer: Any, template: str | None = None) -> ToolFormat | None:
    """How calls are written with `template`, None for the tokenizer's own; None where that isn't known."""
    own = getattr(tokenizer, "chat_template", None)
    text = template if template is not None else own if isinstance(own, str) else ""
    reader = getattr(tokenizer, "tool_parser", None) if template is None else None
    name = reader.__module__.rpartition(".")[2] if reader is not None else _named(tokenizer, text)
    if name is None:
        return _own(text)
    module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    key = "mistral list" if name == "mistral" and "[ARGS]" not in text else name
    return ToolFormat(name, module.tool_call_start, module.tool_call_end, module.parse_tool_call, SHAPES.get(key))


def _named(tokenizer: Any, template: str) -> str | None:
    """mlx_lm's name of the format of a template."""
    described = SimpleNamespace(chat_template=template, get_vocab=tokenizer.get_vocab)
    return tokenizer_utils._infer_tool_parser(described)  # type: ignore[no-any-return]


def _own(template: str) -> ToolFormat | None:
    if "<｜tool▁calls▁begin｜>" in template and "<｜tool▁sep｜>" in template:
        return OWN["deepseek_v3"]
    if '"parameters"' in template and '"name"' in template and "tools" in template:
        return OWN["llama"]
    return None
