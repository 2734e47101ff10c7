"""The session at the top of README.md: `python -m tests.session` runs its commands and writes what they print.

Each command runs as a user would run it, in a home of its own. Numbers differ from run to run and from machine to
machine; the words don't, and a test compares those.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
START, END = "<!-- session -->\n```console\n", "```\n<!-- /session -->"
# Lines of progress, of which there are more on a slower machine.
PROGRESS = re.compile(r"\w[^/]* \d+/\d+\b.*(left|tok/s)")
NUMBER = re.compile(r"\d[\d,.:]*(e-?\d+)?( ?(B|[kK]B|MB|GB|ms|s|min|h)\b)?")


def written() -> str:
    """The session as README.md has it: commands behind `$ `, each followed by what it prints."""
    text = README.read_text(encoding="utf-8")
    return text[text.index(START) + len(START) : text.index(END)]


def run(session: str, home: Path) -> str:
    """Run a session's commands again in `home` and return the session with what they print now."""
    environment = {**os.environ, "MLX_LORA_HOME": str(home), "NO_COLOR": "1", "COLUMNS": "110"}
    environment.pop("PYTEST_CURRENT_TEST", None)
    shown = []
    for line in session.splitlines():
        if not line.startswith("$ "):
            continue
        words = shlex.split(line[2:])
        assert words[0] == "mlx-lora"
        done = subprocess.run(
            [sys.executable, "-m", "mlx_lora", *words[1:]],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        lines = [text for text in done.stdout.splitlines() if not PROGRESS.match(text)]
        shown.append("\n".join([line, *lines]).replace(str(home), "~/.mlx-lora") + "\n")
    return "\n".join(shown)


def words(session: str) -> str:
    """A session without its numbers and their units, and without the progress that only slow work shows."""
    steady = "".join(line for line in session.splitlines(keepends=True) if not line.startswith("reading "))
    return re.sub(r" +", " ", NUMBER.sub("N", steady))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        now = run(written(), Path(folder) / "home")
    text = README.read_text(encoding="utf-8")
    README.write_text(text.replace(written(), now), encoding="utf-8")
