"""Recipes as they are written: YAML files and `key=value` words in, a validated `config.Recipe` or every fault out.

Knows what a misspelt key was meant to be; which keys there are, and what they mean, `settings` and `config` know.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mlx_lora import files, paths
from mlx_lora.config import Recipe
from mlx_lora.errors import RecipeError, nearest
from mlx_lora.settings import FAMILIAR, SECTIONS, dotted_keys, translated

ENDINGS = (".yaml", ".yml")
LARGEST = 1 << 20  # bytes of a recipe


class _Loader(yaml.SafeLoader):
    """Plain values only. A key given twice is an error; YAML would keep the last one in silence.

    So is an alias: ten lines of them stand for more values than memory holds.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases have no use here", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        """Any base, but no more digits than a setting has: Python refuses to write longer ones out."""
        if abs(value := int(super().construct_yaml_int(node))) >= 2**64:
            raise yaml.constructor.ConstructorError(None, None, "a number with too many digits", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def load_recipe(
    file: Path | None = None,
    overrides: Iterable[str] = (),
    *,
    settings: dict[str, Any] | None = None,
    where: str = "recipe",
) -> Recipe:
    """Read a recipe file, then `settings` (dotted keys), then `key=value` overrides, each winning over the former.

    A file that isn't there is looked up among the recipes that come with the package. The run's name defaults to the
    file's. An override may have a short or a familiar name, `lr=1e-4` (`settings.translated`). Raises RecipeError
    naming every fault at once, with the nearest key where one is close.
    """
    values: dict[str, Any] = {}
    if file is not None:
        file = _find_recipe(file)
        values = _read_yaml(file)
        values["name"] = file.stem if values.get("name") is None else values["name"]
    for key, value in (settings or {}).items():
        _set(values, key, value)
    for override in map(translated, overrides):
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"{override!r} is not key=value", hint="for example: adapter.rank=16")
        _set(values, key, _parse_yaml(text, f"override {override!r}"))
    return parse_recipe(values, str(file) if file else where)


def parse_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a mapping. Raises RecipeError listing all faults."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: " + "\n  ".join(_faults(error))) from None


def _faults(error: ValidationError) -> list[str]:
    """One line for each faulty key, however many forms of its value were tried."""
    lines: dict[str, list[str]] = {}
    for fault in error.errors():
        key = str(fault["input"]) if fault["type"] == "invalid_key" else _key(fault["loc"])
        if fault["type"] in ("extra_forbidden", "invalid_key"):
            lines[f"unknown key {key!r}{_nearest_key(key)}"] = []
            continue
        given = "" if fault["type"] == "value_error" else f" {str(fault['input'])[:40]!r} is refused:"
        wanted = lines.setdefault(f"{key}:{given} ", [])
        wanted += [reason for reason in [_reason(fault)] if reason not in wanted]
    return [line + ", or ".join(wanted) for line, wanted in lines.items()]


def _key(location: tuple[int | str, ...]) -> str:
    """The dotted key of a fault, without the forms of its value that pydantic adds."""
    parts = [str(part) for part in location]
    if parts[0] not in SECTIONS:
        return parts[0]
    return ".".join(parts[: 3 if parts[1:2] in (["rank_pattern"], ["alpha_pattern"], ["columns"]) else 2])


def _reason(fault: Any) -> str:
    if fault["type"] == "none_required":
        return "only null is known here"
    if fault["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", fault["ctx"]["expected"])
        word = str(fault["input"])
        return f"not known here{nearest(word, known)}" if known else "only false is known here"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "model_type":
        message = "a section is a mapping of keys to values"
    return message[0].lower() + message[1:]


def _nearest_key(key: str) -> str:
    """What `key` was meant to be: a familiar name, the same word in another place, or a similar one in its own."""
    section, _, word = key.rpartition(".")
    if word in FAMILIAR:
        return f"; did you mean {FAMILIAR[word]!r}?"
    words = {known.rpartition(".")[2]: known for known in dotted_keys()}
    if word in words:
        return f"; did you mean {words[word]!r}?"
    here = {known.rpartition(".")[2]: known for known in dotted_keys() if known.rpartition(".")[0] == section}
    if close := difflib.get_close_matches(word, here, n=1, cutoff=0.5):
        return f"; did you mean {here[close[0]]!r}?"
    if close := difflib.get_close_matches(word, words, n=1, cutoff=0.5):
        return f"; did you mean {words[close[0]]!r}?"
    return f"; known: {', '.join(sorted(here or Recipe.model_fields))}"


def _find_recipe(file: Path) -> Path:
    with_ending = file if file.suffix else file.with_suffix(".yaml")
    for candidate in (file, Path("recipes", with_ending.name)):
        if (found := paths.existing(candidate)) and found.is_file():
            return found
    names = [path.name for path in paths.bundled("recipes").glob("*.yaml")]
    raise RecipeError(f"{file}: no such recipe{nearest(with_ending.name, names)}")


def _read_yaml(file: Path) -> dict[str, Any]:
    if file.suffix not in ENDINGS:
        raise RecipeError(f"{file}: not a {' or '.join(ENDINGS)} file")
    values = _parse_yaml(files.read_text(file, RecipeError, most=LARGEST), str(file))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise RecipeError(f"{file}: a recipe is a mapping of keys to values", hint="see the examples in recipes/")
    return values


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # YAMLError apart: dates that don't exist, tags on values they don't fit, nesting without end
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{line}: not valid YAML ({getattr(error, 'problem', None) or error})") from None


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            inner = values[section] = {}
        values = inner
    values[last] = value
