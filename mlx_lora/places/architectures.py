"""Which architectures are known, told without importing the libraries that know them: a list must not take seconds."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

# The `general.architecture` values that `import-gguf` reads. Its own table needs libraries that take a second to load;
# a test holds this against it.
IMPORTABLE = frozenset(
    ("gemma2", "gemma3", "gpt-oss", "granite", "lfm2", "llama", "phi3", "qwen2", "qwen3", "qwen3moe")
)  # fmt: skip
# Names in mlx_lm's loader that stand for the module of another architecture.
_RENAMED = "MODEL_REMAPPING"


def known_to_mlx_lm(config: dict[str, Any]) -> bool:
    """Whether the installed mlx_lm has a model of this config.json: a file of that name, after its own renaming.

    `models.open.check_architecture` has the last word, when the model is opened.
    """
    named = str(config.get("model_type", ""))
    folder = _folder()
    if folder is None or not named.isidentifier():
        return named in _renamed()
    return (folder / "models" / f"{_renamed().get(named, named)}.py").is_file()


def _folder() -> Path | None:
    found = importlib.util.find_spec("mlx_lm")
    places = found.submodule_search_locations if found else None
    return Path(next(iter(places))) if places else None


@cache
def _renamed() -> dict[str, str]:
    """mlx_lm's table of renamed architectures, read from its source: importing it takes two seconds."""
    if (folder := _folder()) is None:
        return {}
    try:
        tree = ast.parse((folder / "utils.py").read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == _RENAMED for t in node.targets):
            table = ast.literal_eval(node.value)
            return {str(old): str(new) for old, new in table.items()}
    return {}
