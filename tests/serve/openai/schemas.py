"""Random schemas whose every value is bounded, and a check of values that has nothing to do with any grammar."""

from __future__ import annotations

import random
import re
from typing import Any

WORDS = ("red", "green", "a b", "x-1", "ü", 'q"q')


def random_schema(draw: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema whose values have a few hundred characters at most."""
    kinds = ["integer", "string", "enum", "boolean", "null", "const", "number", "pattern"]
    kind = draw.choice([*kinds, *(["object", "object", "array", "anyOf"] * 2 if depth else [])])
    low = draw.randint(-50, 50)
    match kind:
        case "object":
            names = draw.sample(["id", "name", "tags", "when", "n 1", "ß"], draw.randint(0, 3))
            return {
                "type": "object", "properties": {name: random_schema(draw, depth - 1) for name in names},
                "required": draw.sample(names, draw.randint(0, len(names))), "additionalProperties": False,
            }  # fmt: skip
        case "array":
            least = draw.randint(0, 2)
            items = random_schema(draw, depth - 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + draw.randint(0, 2)}
        case "anyOf":
            return {"anyOf": [random_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]}
        case "integer":
            return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 500)}
        case "number":  # of integers alone: decimals have no longest form
            return {"enum": [low / 8, low, low + 0.5]}
        case "string":
            least = draw.randint(0, 4)
            return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 10)}
        case "pattern":
            return {"type": "string", "pattern": draw.choice(["^[a-c]{2,5}$", "^x[0-9]{3}$", "^(on|off)$"])}
        case "enum":
            return {"enum": [*draw.sample(WORDS, draw.randint(1, 3)), low]}
        case "const":
            return {"const": draw.choice([*WORDS, low, True, None])}
    return {"type": kind}


def satisfies(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value satisfies a schema of `random_schema`."""
    if "anyOf" in schema:
        return any(satisfies(value, one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        known = schema["enum"] if "enum" in schema else [schema["const"]]
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in known)
    match schema["type"]:
        case "object":
            known = schema["properties"]
            fits = isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(known)
            return fits and all(satisfies(one, known[name]) for name, one in value.items())
        case "array":
            fits = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
            return fits and all(satisfies(one, schema["items"]) for one in value)
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            if not isinstance(value, str):
                return False
            if "pattern" in schema:
                return re.search(schema["pattern"], value) is not None
            return bool(schema["minLength"] <= len(value) <= schema["maxLength"])
        case "boolean":
            return isinstance(value, bool)
    return value is None
