"""The command reference, mlx_lora/cli/README.md: `python -m tests.readme` writes it, a test compares it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

README = Path(__file__).parents[1] / "mlx_lora" / "cli" / "README.md"
START, END = "<!-- commands -->\n```text\n", "```\n<!-- /commands -->"


def commands() -> str:
    """The help of the program and of every command, as `--help` prints it at 80 columns."""
    from mlx_lora.cli import app

    root = typer.main.get_command(app)
    return "\n".join(_help(root, "mlx-lora", None))


def _help(command: Any, name: str, parent: Any) -> list[str]:
    context = command.make_context(name, [], parent=parent, resilient_parsing=True, terminal_width=80)
    texts = [command.get_help(context) + "\n"]
    for inner, child in getattr(command, "commands", {}).items():
        texts += _help(child, inner, context)
    return texts


def written() -> str:
    """The page with its block as it should be."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{commands()}{END}{after}"


if __name__ == "__main__":
    README.write_text(written(), encoding="utf-8")
