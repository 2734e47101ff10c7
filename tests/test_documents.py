"""Documents hold what they say: every command in them parses, every module and file in them is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from mlx_lora.cli import app
from mlx_lora.recipe import load_recipe
from tests import documents
from tests.documents import ROOT, Block

BLOCKS = [block for file in documents.documents() for block in documents.blocks(file)]
RECIPES = sorted(ROOT.glob("recipes/**/*.yaml"))
MOST_LINES = 250
# What other programs a block may call. Each is run by `.ci/run`, or needs a network or several machines.
OTHERS = ("git", "cd", "python3", ".", "pip", "pytest", "python", "mlx.distributed_config", "sudo")


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in ("sh", "console")], ids=str)
def test_every_command_in_a_document_is_one_that_the_program_takes(block: Block) -> None:
    for words in documents.commands(block.text):
        if (arguments := documents.of_program(words)) is not None:
            check_arguments(arguments)
            continue
        assert words[0] in OTHERS, words
        if words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), words
        for word in words[1:] if words[0] == "pytest" else []:
            assert not word.startswith("tests/") or (ROOT / word).exists(), word


def test_blocks_are_in_languages_that_a_test_looks_at() -> None:
    assert {block.language for block in BLOCKS} <= {"sh", "console", "python", "text"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.name)
def test_every_command_in_a_recipe_s_header_is_one_that_the_program_takes(recipe: Path) -> None:
    found = documents.header_commands(recipe)
    assert {"Run", "Change"} <= {label for label, _ in found}
    for _, words in found:
        arguments = documents.of_program(words)
        assert arguments
        check_arguments(arguments)


@pytest.mark.parametrize("file", documents.documents(), ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        there = (file.parent / path).resolve() if path else file
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there / "README.md" if there.is_dir() else there), target


def test_a_document_s_python_runs(tiny: Any, tmp_path: Path) -> None:
    ran = [block for block in BLOCKS if block.language == "python"]
    assert ran
    for block in ran:
        exec(compile(block.text, str(block), "exec"), {"model": tiny.model})


def anchors(file: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_arguments(arguments: list[str]) -> None:
    """Parse arguments as the program does, without running anything, and overrides as recipes do."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("mlx-lora", list(arguments))
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    words = [word for values in context.params.values() if isinstance(values, list) for word in values]
    overrides = [word for word in map(str, words) if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
    recipe = next((Path(word) for word in map(str, words) if word.endswith(".yaml")), None)
    load_recipe(recipe, overrides)
