"""The house rules, kept by reading the source: directions between rooms, sizes, printing, network, README."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from mlx_lora.recipe import load_recipe
from tests.readme import README, written

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_lora"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room imports only rooms of a lower rank, or itself.
RANKS = {
    "errors": 0, "methods": 1, "paths": 1, "files": 1, "config_base": 1, "config_adapter": 1, "config": 1,
    "settings": 1, "recipe": 1, "ui": 1, "panel": 1, "machine": 1,
    "quant": 2, "places": 2, "models": 3, "adapters": 4, "data": 5, "measure": 6, "store": 6, "train": 7, "interop": 7,
    "serve": 7,
    "study": 8, "report": 9, "tasks": 10, "cli": 11, "__main__": 12,
}  # fmt: skip
STRANGERS = {"train", "interop", "serve"}
MOST_LINES, MOST_FUNCTION_LINES = 300, 40
# Functions that are longer, with the reason.
OPTIONS = "a command's options are its parameters, each with its help"
DERIVATIVE = "a custom function and its derivative share what is defined around both"
LONGER = {
    ("cli/adapters.py", "blend"): OPTIONS,
    ("cli/adapters.py", "merge"): OPTIONS,
    ("cli/base.py", "import_gguf"): OPTIONS,
    ("cli/base.py", "quantize"): OPTIONS,
    ("cli/compare.py", "compare"): OPTIONS,
    ("cli/leaks.py", "leaks"): OPTIONS,
    ("cli/serve.py", "serve"): OPTIONS,
    ("cli/train.py", "train"): OPTIONS,
    ("cli/verdict.py", "verdict"): OPTIONS,
    ("adapters/glora.py", "multiply_hadamard"): DERIVATIVE,
    ("models/recurrence/convolution.py", "_tapped"): DERIVATIVE,
    ("models/recurrence/scan.py", "_spans"): DERIVATIVE,
}


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of everything imported, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_rooms_import_only_to_their_left(file: Path) -> None:
    here = room(file)
    if here == "__init__":
        return
    wrong = []
    for name in imports(ast.parse(file.read_text())):
        package, _, rest = name.partition(".")
        there = rest.split(".")[0]
        if package != "mlx_lora" or there in (here, "__version__"):
            continue
        same_rank = RANKS[there] == RANKS[here] and not {here, there} <= STRANGERS and RANKS[here] in (1, 6)
        if RANKS[there] > RANKS[here] or (RANKS[there] == RANKS[here] and not same_rank):
            wrong.append(name)
    assert not wrong, f"{here} imports to its right: {wrong}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            longer = (str(file.relative_to(PACKAGE)), node.name) in LONGER
            assert (lines > MOST_FUNCTION_LINES) == longer, f"{node.name} has {lines} lines"


def test_only_ui_prints() -> None:
    for file in FILES:
        calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        printing = [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
        assert not printing or file.name == "ui.py", file


# Beside models/: what generates with mlx_lm's batches and caches.
DOORS = {
    "serve/engine.py", "serve/lane.py", "serve/lookup.py", "serve/memory.py", "serve/prompt_cache.py",
    "serve/quantized.py", "serve/ways.py",
}  # fmt: skip


def test_mlx_lm_enters_by_its_doors() -> None:
    for file in FILES:
        uses = any(name.split(".")[0] == "mlx_lm" for name in imports(ast.parse(file.read_text())))
        assert not uses or room(file) == "models" or file.relative_to(PACKAGE).as_posix() in DOORS, file


# pull connects, serve listens.
NETWORK = {"models/pull.py", "serve/http/server.py"}


def test_only_pull_and_serve_import_network_code() -> None:
    network = {"requests", "httpx", "urllib.request", "http.client", "socket", "aiohttp", "huggingface_hub"}
    for file in FILES:
        for name in imports(ast.parse(file.read_text())):
            if any(name == module or name.startswith(f"{module}.") for module in network):
                known = file.relative_to(PACKAGE).as_posix() in NETWORK or name == "huggingface_hub.constants"
                assert known, f"{file}: {name}"


def test_every_package_that_is_imported_is_declared() -> None:
    """A package that only another one brings along goes when that one changes its mind."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {re.split(r"[^\w.-]", line)[0].replace("_", "-").lower() for line in lines}
    imported = {name.partition(".")[0] for file in FILES for name in imports(ast.parse(file.read_text()))}
    owners = packages_distributions()
    for package in imported - sys.stdlib_module_names - {"mlx_lora"}:
        names = {owner.replace("_", "-").lower() for owner in owners.get(package, [package])}
        assert names & declared, f"{package} is imported, and not in pyproject.toml"


@pytest.mark.parametrize("file", sorted(ROOT.glob("recipes/**/*.yaml")), ids=lambda file: file.name)
def test_recipes_parse_and_say_how_to_run_them(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.name == file.stem
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    for word in ("Needs:", "Run:", "Change:"):
        assert any(word in line for line in header), f"{file.name} has no {word}"


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("mlx.core", "mlx_lm", "transformers", "numpy")
    code = f"import sys, mlx_lora, mlx_lora.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


QUICK = {
    "--help": ("pydantic", "yaml"), "train --help": ("yaml",), "adapters list": (), "models list": (),
    "--version": ("pydantic",),
}  # fmt: skip


@pytest.mark.parametrize("words", QUICK)
def test_commands_that_load_no_model_start_without_heavy_imports(words: str, tmp_path: Path) -> None:
    """Half a second each: what takes longer to import is counted here, seconds depend on the machine."""
    heavy = ("mlx.core", "mlx_lm", "transformers", "numpy", "torch", "prompt_toolkit", "huggingface_hub", *QUICK[words])
    code = (
        "import sys\nfrom mlx_lora.cli import main\n"
        f"try: main({words.split()})\nexcept SystemExit: pass\n"
        f"print([module for module in {heavy} if module in sys.modules], len(sys.modules) < 900, file=sys.stderr)"
    )
    environment = os.environ | {"MLX_LORA_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stderr.splitlines()[-1] == "[] True"


def test_readme_shows_the_commands_as_they_are() -> None:
    assert README.read_text() == written(), "run: python -m tests.readme"


def test_the_device_is_asked_through_its_module() -> None:
    """As `device.on_gpu()`, when it matters: `pytest --as-gpu` changes the answer there, and MLX's may change as well.

    A name imported from the module, a default value, or what a module asks while it is imported would keep an old one.
    """
    for file in FILES:
        if file == PACKAGE / "machine" / "device.py":
            continue
        tree = ast.parse(file.read_text())
        names = list(imports(tree))
        assert not [name for name in names if name.startswith("mlx_lora.machine.device.")], file
        inside = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.Lambda)
            for part in (function.body if isinstance(function, ast.FunctionDef) else [function.body])
            for node in ast.walk(part)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("on_gpu", "activation_dtype"):
                assert isinstance(node.value, ast.Name) and node.value.id == "device", (file, node.lineno)
                assert id(node) in inside, (file, node.lineno)
            asked = isinstance(node, ast.Attribute) and node.attr in ("is_available", "metal")
            assert not asked or ast.unparse(node).split(".")[0] not in ("mx", "mlx"), (file, node.lineno)


def test_the_package_knows_nothing_of_pytests_mode() -> None:
    for file in FILES:
        assert not any(word in file.read_text().lower() for word in ("as_gpu", "as-gpu", "sitecustomize")), file
