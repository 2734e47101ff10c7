"""What the columns of a table, or the keys of a row, mean: known names, or what `data.columns` says of them.

    {"Question": "2+2?", "Answer": "4"}      ── prompt: Question, completion: Answer ──>  {"prompt": "2+2?", …}

The first row of a file decides for all. Names are compared without case, spaces, `_` and `-`. What isn't known, or may
mean two things, is an error for the whole file that lists the choices, never a guess. The result is a row in the shape
of one of `data.sources`.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data.template_text import Template

# The names of prompt and completion that are known, in the order in which they are shown.
PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"),
    ("instruction", "response"), ("instruction", "output"), ("input", "output"), ("text", "label"),
)  # fmt: skip
# What some of these prompts are about, in a column of its own: it follows the prompt.
ABOUT = ("input", "context")
WITH_ABOUT = ("instruction", "question", "query")
MESSAGES = {"messages": "messages", "conversations": "sharegpt", "conversation": "sharegpt"}
SYSTEM = ("system", "systemprompt")
# Keys that a format has beside its roles, whose values may be JSON as text.
BESIDE = {"alpaca": ("history",), "completions": ("tools",), "messages": ("tools",), "sharegpt": ("tools",), "text": ()}
# The key that each role has in a row of `data.sources`.
KEYS = {
    "text": {"text": "text"},
    "completions": {"prompt": "prompt", "input": "input", "completion": "completion", "system": "system"},
    "alpaca": {"prompt": "instruction", "input": "input", "completion": "output", "system": "system"},
    "messages": {"messages": "messages", "system": "system"},
    "sharegpt": {"messages": "conversations", "system": "system"},
}
# Keys whose text is passed on as it is.
PLAIN = {"text", "prompt", "completion", "instruction", "output"}
# Words that YAML reads as something else than text.
YAML_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
LONGEST_NAME, MOST_NAMES, MOST_PLANS = 40, 12, 1000

Row = dict[str, Any]


class Unclear(ValueError):
    """The columns of a file can't be told. Said once for the file."""


@dataclass(frozen=True)
class Columns:
    """The format, and the column or template of each role: prompt, input, completion, system, messages, text.

    `explicit` are columns of which `data.columns` says what the prompt is: nothing is added to it.
    """

    format: str
    roles: dict[str, str]
    templates: dict[str, Template] = field(default_factory=dict)
    explicit: bool = False
    _plans: dict[tuple[str, ...], list[tuple[str, str, str]] | None] = field(default_factory=dict, repr=False)

    def row(self, row: Row) -> Row:
        """A row as `data.sources` has it. Raises ValueError naming a column that is missing, empty or no text."""
        names = tuple(row)
        if names not in self._plans:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[names] = self._plan(names)
        plan = self._plans[names]
        if plan is None:
            raise ValueError(f"not a row of format {self.format}: its keys are {shown_together(names)}")
        made = {}
        for role, key, column in plan:
            if role in self.templates:
                value: Any = self.templates[role].fill(row)
                column = f"data.columns {role}"
            else:
                value = row[column]
            made[key] = (
                value if key in PLAIN and key == column and type(value) is str else _value(value, role, column, key)
            )
        return _joined(made) if self.format == "completions" else made

    def _plan(self, names: tuple[str, ...]) -> list[tuple[str, str, str]] | None:
        """(role, key, column) for everything a row with these names has; None where a needed one is missing."""
        plain = _plain(names)
        keys = KEYS[self.format]
        plan = []
        for role, column in self.roles.items():
            if role not in self.templates and column not in names:
                if role not in ("system", "input"):
                    return None
                continue
            plan.append((role, keys[role], column))
        for role, column in optional(self.format, self.roles, plain, explicit=self.explicit).items():
            plan.append((role, keys[role], column))
        return plan + [(key, key, plain[key]) for key in BESIDE[self.format] if key in plain]


def optional(format: str, roles: dict[str, str], plain: dict[str, str], *, explicit: bool = False) -> dict[str, str]:
    """Columns that a row may have beside the needed ones, for roles that have none yet."""
    found: dict[str, str] = {}
    if format != "text" and "system" not in roles:
        found |= _first("system", SYSTEM, plain)
    if not explicit and "input" not in roles and _name(roles.get("prompt", "")) in WITH_ABOUT:
        found |= _first("input", ABOUT, plain)
    return {role: column for role, column in found.items() if column not in roles.values()}


def _first(role: str, names: Iterable[str], plain: dict[str, str]) -> dict[str, str]:
    return next(({role: plain[name]} for name in names if name in plain), {})


def find(row: Row, settings: Data) -> Columns:
    """The columns of a file by its first row. Raises Unclear where they can't be told."""
    plain = _plain(row)
    chosen = settings.columns
    if set(chosen) - {"system"}:
        return _as_chosen(row, plain, settings)
    readings = _readings(row, plain)
    if settings.format != "auto":
        readings = [[reading for reading in alike if reading[0] == settings.format] for alike in readings]
    found = next(filter(None, readings), [])
    if not found:
        raise Unclear(_unknown(row, settings))
    if len(found) > 1:
        raise Unclear(_ambiguous([roles for _, roles in found]))
    format, roles = found[0]
    templates = _templates(chosen, row)
    return Columns(format, roles | optional(format, roles, plain) | chosen, templates)


def _readings(row: Row, plain: dict[str, str]) -> list[list[tuple[str, dict[str, str]]]]:
    """What a row's names fit, as (format, roles), the most particular first: messages, then pairs, then text."""
    columns = [(plain[name], format) for name, format in MESSAGES.items() if name in plain]
    messages = [(_shape(row[column], format), {"messages": column}) for column, format in columns[:1]]
    pairs = []
    for prompt, completion in PAIRS:
        if prompt in plain and completion in plain:
            roles = {"prompt": plain[prompt], "completion": plain[completion]}
            format = "alpaca" if prompt == "instruction" else "completions"
            pairs.append((format, roles, set((roles | optional(format, roles, plain)).values())))
    # input/output inside instruction/input/output is no second reading
    own = [(format, roles) for format, roles, names in pairs if not any(names < others for *_, others in pairs)]
    return [messages, own, [("text", {"text": plain["text"]})] if "text" in plain else []]


def _as_chosen(row: Row, plain: dict[str, str], settings: Data) -> Columns:
    chosen = settings.columns
    templates = _templates(chosen, row)
    if "messages" in chosen:
        format = _shape(row.get(chosen["messages"]), "messages")
    else:
        format = "text" if "text" in chosen else "completions"
    if settings.format not in ("auto", format):
        raise Unclear(f"data.columns makes rows of format {format}, and data.format is {settings.format}")
    return Columns(format, optional(format, chosen, plain, explicit=True) | chosen, templates, explicit=True)


def _templates(chosen: dict[str, str], row: Row) -> dict[str, Template]:
    """The templates among the values of `data.columns`. Raises Unclear for a name that no column has."""
    templates = {}
    for role, value in chosen.items():
        if value in row:
            continue
        try:
            templates[role] = Template(value, row)
        except ValueError as error:
            raise Unclear(f"data.columns {role}: {error}") from None
    return templates


def _value(value: Any, role: str, column: str, key: str) -> Any:
    """What a role takes of a cell: lists and objects out of JSON, numbers of answers as text."""
    if role in ("messages", "tools", "history"):
        return _nested(value, role, column) if isinstance(value, str) else value
    if isinstance(value, float) and math.isnan(value):  # how pandas and json write a missing value
        value = None
    if role in ("system", "input") and value in (None, ""):
        return ""
    if isinstance(value, int | float) and (role == "completion" or column != key):
        return json.dumps(value)
    if column == key:  # the format's own names: its module checks them
        return value
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{column[:LONGEST_NAME]!r} is empty")
    if not isinstance(value, str):
        raise ValueError(f"{column[:LONGEST_NAME]!r} is {type(value).__name__}, not a string")
    return value


def _nested(value: str, role: str, column: str) -> Any:
    """A list that stands in a cell as JSON, or as Python writes it (what pandas makes of lists in a CSV file)."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        if role == "messages":
            raise ValueError(f"{column[:LONGEST_NAME]!r} is text, and not a JSON list of messages") from None
        return value


def _shape(value: Any, format: str) -> str:
    """messages or sharegpt, by the first turn; `format` where there is none to go by."""
    if isinstance(value, str):
        try:
            value = _nested(value, "messages", "")
        except ValueError:
            return format
    first = value[0] if isinstance(value, list) and value else None
    return "sharegpt" if isinstance(first, dict) and "from" in first and "role" not in first else format


def _joined(row: Row) -> Row:
    """A prompt and what it is about in one."""
    about = row.pop("input", "")
    return row | {"prompt": f"{row['prompt']}\n\n{about}"} if about else row


def _name(name: str) -> str:
    return re.sub(r"[-_\s]", "", name).lower()


def _plain(names: Iterable[str]) -> dict[str, str]:
    """Columns by their names without case, spaces, `_` and `-`; an exact name goes before one that is only like it."""
    plain: dict[str, str] = {}
    for name in names:
        if (like := _name(name)) not in plain or like == name:
            plain[like] = name
    return plain


def shown_together(names: Iterable[str]) -> str:
    """The first names, all together cut to what may be shown of a row."""
    text = ", ".join(repr(name) for name in list(names)[:6]) or "none"
    return text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}…"


def _shown(names: Iterable[str]) -> str:
    """Names for a choice, each whole. Where one is too long for a name they may be data, and little is shown."""
    names = list(names)
    if any(len(name) > LONGEST_NAME for name in names):
        return shown_together(names)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return (", ".join(repr(name) for name in names[:MOST_NAMES]) or "none") + more


def override(roles: dict[str, str]) -> str:
    """The override that chooses these columns, as it is typed in a shell."""
    pairs = ", ".join(f"{role}: {_quoted(column)}" for role, column in roles.items())
    return f"'data.columns={{{pairs}}}'"


def _quoted(column: str) -> str:
    plain = re.fullmatch(r"[A-Za-z_]([\w -]*\w)?", column) and column.lower() not in YAML_WORDS
    return column if plain else json.dumps(column, ensure_ascii=False)


def _unknown(row: Row, settings: Data) -> str:
    names = list(row)
    pairs = ", ".join("/".join(pair) for pair in PAIRS)
    if settings.format == "auto":
        said = f"no format has the keys {_shown(names)}"
    else:
        said = f"not a row of format {settings.format}: its keys are {_shown(names)}"
    short = [name for name in names if name and len(name) <= LONGEST_NAME]
    roles = {"prompt": short[0], "completion": short[1]} if len(short) > 1 else {"text": (*short, "COLUMN")[0]}
    return f"{said}; known are {pairs}, messages, conversations and text; others by name: {override(roles)}"


def _ambiguous(readings: list[dict[str, str]]) -> str:
    said = " and ".join("/".join(roles.values()) for roles in readings)
    return f"has {said}; choose one: {' or '.join(map(override, readings))}"
