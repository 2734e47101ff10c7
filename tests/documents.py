"""The project's documents as tests read them: blocks of code, and the commands in them and in recipes' headers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDERS = ("mlx_lora", "recipes", "tests", "data")
LAUNCHED = "$(which mlx-lora)"


@dataclass(frozen=True)
class Block:
    """A fenced block: the document it is in, its language, its text, and the line on which it begins."""

    file: Path
    language: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def documents() -> list[Path]:
    """Every Markdown file of the project."""
    return sorted([*ROOT.glob("*.md"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.md"))])


def blocks(file: Path) -> Iterator[Block]:
    """The fenced blocks of a document."""
    text = file.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield Block(file, found[1], found[2], text.count("\n", 0, found.start()) + 1)


def commands(text: str) -> list[list[str]]:
    """The commands of a block of shell, or of a console session (what follows `$ `), split into words.

    Comments are dropped, `&&` parts commands, and a backslash at the end of a line continues it.
    """
    lines = text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    whole = (line.replace(LAUNCHED, shlex.quote(LAUNCHED)) for line in lines)
    return [words for line in whole for part in _parts(line) if (words := part)]


def _parts(line: str) -> Iterator[list[str]]:
    part: list[str] = []
    for word in shlex.split(line, comments=True):
        if word == "&&":
            yield part
            part = []
        else:
            part.append(word)
    yield part


def of_program(words: list[str]) -> list[str] | None:
    """The arguments of `mlx-lora` in a command, also behind mlx.launch; None for another program's command."""
    if words[0] == "mlx-lora":
        return words[1:]
    return words[words.index(LAUNCHED) + 1 :] if LAUNCHED in words else None


def header_commands(recipe: Path) -> list[tuple[str, list[str]]]:
    """The commands in the comment at the top of a recipe, each with the word before its colon (`Run`, `Change`, …)."""
    found, label = [], ""
    header = re.match(r"(#.*\n)+", recipe.read_text(encoding="utf-8"))
    for line in re.sub(r"\\\n#", " ", header[0] if header else "").splitlines():
        label = named[1] if (named := re.match(r"# (\w[\w ]*):", line)) else label
        if command := re.search(r"(?:^#\s+|:\s+)(mlx-lora .*?)(?:\s+\(.*)?$", line):
            found.append((label, shlex.split(command[1])))
    return found
